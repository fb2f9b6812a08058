#pragma once

#include "refreekv.h"

struct llama_context;

// A policy that the environment asks for, so that programs which know nothing of refreekv (upstream's own tests) run on
// the cache of native/:
//
//   REFREEKV_NATIVE_POLICY=elastic|streaming|refreekv  for every context that refreekv_next_context() set nothing for
//   REFREEKV_NATIVE_PRUNE=auto                         such a context prunes what it has read, see refreekv_after_decode()
//
// Read once per process.
struct refreekv_environment {
    bool            has_policy = false;
    bool            prunes     = false;
    refreekv_params params     = {};
};

// throws std::runtime_error, naming what is valid
const refreekv_environment & refreekv_get_environment();

// hook at the end of llama_context::decode: with REFREEKV_NATIVE_PRUNE=auto, prune the sequences that the batch added to,
// unless it was one token (what cannot be pruned is logged); and publish the figures for refreekv_get_stats() and its like
void refreekv_after_decode(llama_context * lctx);
