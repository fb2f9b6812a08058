#pragma once

#include "evict/attention-inputs.h"
#include "policies/policy.h"

#include <memory>

namespace refreekv {

// What attention_graph computes, by a kernel of ours for keys and queries in host memory. Each row of K is read once
// for all its queries, and what the soft-max makes of a chunk of cells stays in the processor's cache meanwhile. All sums are f32.
// The queries stay what the ring has (llama.cpp rounds them to q8_0 where K is quantised). It runs on the thread that asks.

// Only in ggml's CPU backend; libllama reaches it through refreekv::kernels, which says what it does.
std::unique_ptr<refreekv::attention> make_attention_cpu(const attention_inputs & in, attention_scratch & memory);

} // namespace refreekv
