#pragma once

#include "evict/attention-inputs.h"
#include "policies/policy.h"

#include <memory>

// What refreekv_attention_graph computes, by a kernel of ours for keys and queries in host memory. Each row of K is read once
// for all its queries, and what the soft-max makes of a chunk of cells stays in the processor's cache meanwhile. All sums are f32.
// The queries stay what the ring has (llama.cpp rounds them to q8_0 where K is quantised). It runs on the thread that asks.

// Only in ggml's CPU backend; libllama reaches it through refreekv_kernels, which says what it does.
std::unique_ptr<refreekv_attention> refreekv_attention_cpu_make(const refreekv_attention_inputs & in, refreekv_attention_scratch & memory);
