#pragma once

#include "ggml.h"

// Attention of a few tokens to one group on the CPU, in the place of build_attn_mha's ops: each row of K and V is read once
// for all the query heads that share it, and the cells are divided among the threads (llama.cpp divides the heads, and
// reads the rows of K again for each of them).
//
// Two operations of ours (GGML_OP_CUSTOM). The first works on chunks of cells, whose size is fixed, so results are the same
// bit for bit whatever the number of threads is; the second joins the chunks. All sums are f32, while upstream rounds the
// queries and (without flash attention) the weights to f16: logits differ from upstream's by that.
//
// What becomes of the logits: times pre_scale, soft-capped, times post_scale, mask and ALiBi added, soft-max with sinks.
struct refreekv_decode_softmax {
    float pre_scale;
    float soft_cap; // 0: none
    float post_scale;
    float max_bias; // ALiBi; 0: none
};

struct refreekv_decode_call {
    ggml_tensor * q;     // [n_embd_head_k, n_head, n_tokens] f32, its heads those of k in order, n_gqa for each
    ggml_tensor * k;     // [n_embd_head_k, n_head_kv, n_kv], any type with a to_float
    ggml_tensor * v;     // [n_embd_head_v, n_head_kv, n_kv], or [n_kv, n_head_kv, n_embd_head_v]
    ggml_tensor * mask;  // [n_kv, n_tokens] f32 or f16
    ggml_tensor * sinks; // [n_head] f32; nullptr: none

    const refreekv_decode_softmax * softmax; // has to outlive the graph
};

// whether it can be computed, and faster than by upstream's ops: K and V in host memory, few tokens, lengths that are
// multiples of the vectors'; false where the compiler has no vectors
bool refreekv_decode_fits(const refreekv_decode_call & call);

// [n_embd_head_v*n_head, n_tokens] f32
ggml_tensor * refreekv_decode(ggml_context * ctx, const refreekv_decode_call & call);
