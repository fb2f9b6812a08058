#pragma once

#include "tiers/sketch.h"

#include "ggml.h"

#include <atomic>
#include <functional>
#include <vector>

// Attention of a few tokens to one group on the CPU, in the place of build_attn_mha's ops: each row of K and V is read once
// for all the query heads that share it, and the cells are divided among the threads (llama.cpp divides the heads, and
// reads the rows of K again for each of them).
//
// Operations of ours (GGML_OP_CUSTOM). The first works on chunks of cells, whose size is fixed, so results are the same
// bit for bit whatever the number of threads is; the last joins the chunks. Three between them see to what is evicted
// (kernels/decode-evicted.h): its blocks are judged by their sketches, those that count are chosen, and read. All sums are f32, while upstream rounds the
// queries and (without flash attention) the weights to f16: logits differ from upstream's by that, also before an eviction.
//
// What becomes of the logits: times pre_scale, soft-capped, times post_scale, mask and ALiBi added, soft-max with sinks.
struct refreekv_decode_softmax {
    float pre_scale;
    float soft_cap; // 0: none
    float post_scale;
    float max_bias; // ALiBi; 0: none
};

// What a group has evicted. By their sketches, the blocks that draw most of some head's attention take part in it with their own
// rows, which are read from where they wait, until what the others would draw is within the tolerance, all together.
struct refreekv_decode_evicted {
    const refreekv_decode_softmax * softmax;

    refreekv_sketch sketch;
    float           tolerance;

    // whether a token of the batch may see the cells of a block
    std::function<bool(int64_t token, uint32_t block)> sees;

    // K and V of the cells of a block that are still evicted, one after the other, in rows of so many bytes (upstream may pad
    // those of V) and the cache's types; false: they are lost. From several threads
    size_t row_k;
    size_t row_v;
    std::function<bool(uint32_t block, uint8_t * k, uint8_t * v)> read;

    std::atomic<int64_t> n_faults { 0 }; // blocks that were read
    std::atomic<int64_t> n_lost   { 0 }; // that could not be
};

struct refreekv_decode_call {
    ggml_tensor * q;     // [n_embd_head_k, n_head, n_tokens] f32, its heads those of k in order, n_gqa for each
    ggml_tensor * k;     // [n_embd_head_k, n_head_kv, n_kv], any type with a to_float
    ggml_tensor * v;     // [n_embd_head_v, n_head_kv, n_kv], or [n_kv, n_head_kv, n_embd_head_v]
    ggml_tensor * mask;  // [n_kv, n_tokens] f32 or f16
    ggml_tensor * sinks; // [n_head] f32; nullptr: none

    const refreekv_decode_softmax * softmax; // has to outlive the graph

    refreekv_decode_evicted * evicted; // likewise; nullptr: what is evicted takes no part
};

// Only in ggml's CPU backend; libllama reaches them through refreekv_kernels, which says what they do.
bool refreekv_decode_fits(const refreekv_decode_call & call);
bool refreekv_decode_can_fault(int64_t n_embd_head_k, int64_t n_embd_head_v, ggml_type type_k, ggml_type type_v);
ggml_tensor * refreekv_decode(ggml_context * ctx, const refreekv_decode_call & call, std::vector<ggml_tensor *> & nodes);
