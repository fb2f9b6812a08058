#pragma once

#include "ggml.h"

#include <atomic>
#include <vector>

namespace refreekv {

struct warm_view;

// Attention of a few tokens to a layer's cache on the CPU, in the place of build_attn_mha's ops: each row of K and V is read once
// for all the query heads that share it, and the cells are divided among the threads (llama.cpp divides the heads, and
// reads the rows of K again for each of them).
//
// Operations of ours (GGML_OP_CUSTOM). The first works on chunks of cells, whose size is fixed, so results are the same
// bit for bit whatever the number of threads is; the last joins the chunks. Where a layer has warm cells (kernels/warm.h), the first
// computes their logits, too, and a second one their part of the attention. All sums are f32, while upstream rounds the queries and
// (without flash attention) the weights to f16: logits differ from upstream's by that, also before an eviction.
//
// Batches of 64 and more tokens are left to upstream's operations, unless there are warm cells: then each thread does whole tokens.
//
// What becomes of the logits: times pre_scale, soft-capped, times post_scale, mask and ALiBi added, soft-max with sinks.
struct decode_softmax {
    float pre_scale;
    float soft_cap; // 0: none
    float post_scale;
    float max_bias; // ALiBi; 0: none

    std::atomic<bool> * no_memory; // set where a thread had none for its part of the work: what comes out is worth nothing then
};

struct decode_call {
    ggml_tensor * q;     // [n_embd_head_k, n_head, n_tokens] f32, its heads those of k in order, n_gqa for each
    ggml_tensor * k;     // [n_embd_head_k, n_head_kv, n_kv], any type with a to_float
    ggml_tensor * v;     // [n_embd_head_v, n_head_kv, n_kv], or [n_kv, n_head_kv, n_embd_head_v]
    ggml_tensor * mask;  // [n_kv, n_tokens] f32 or f16
    ggml_tensor * sinks; // [n_head] f32; nullptr: none

    const decode_softmax * softmax; // has to outlive the graph

    const warm_view * warm; // likewise; nullptr, or without blocks: there are no warm cells
};

// Only in ggml's CPU backend; libllama reaches them through refreekv::kernels, which says what they do.
bool decode_fits(const decode_call & call);
ggml_tensor * decode(ggml_context * ctx, const decode_call & call, std::vector<ggml_tensor *> & nodes);

} // namespace refreekv
