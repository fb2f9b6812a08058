#pragma once

#include "refreekv.h"

namespace refreekv {

// A policy that the environment asks for, so that programs which know nothing of refreekv (upstream's own tests) run on
// the cache of native/:
//
//   REFREEKV_NATIVE_POLICY=elastic|streaming|refreekv  for every context that refreekv_next_context() set nothing for
//   REFREEKV_NATIVE_PRUNE=auto                         such a context prunes and restores by itself (REFREEKV_TURNS_RESTORE), with a
//                                                      cold store, and codes where it can have them
//   REFREEKV_NATIVE_PRUNE=tests                        such a context prunes what it has read at the end of each decode of several
//                                                      tokens, down to single cells: for upstream's tests, whose prompts are short
//
// Read once per process.
struct environment {
    bool            has_policy = false;
    bool            prunes     = false; // at the end of a decode, see after_decode()
    refreekv_params params     = {};
};

// throws std::runtime_error, naming what is valid
const refreekv::environment & get_environment();

} // namespace refreekv
