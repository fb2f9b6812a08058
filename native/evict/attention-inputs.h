#pragma once

#include "cache/pages.h"

#include "ggml-backend.h"
#include "ggml-cpp.h"
#include "llama.h"

#include <map>
#include <utility>
#include <vector>

namespace refreekv {

// A layer's stored queries and keys, and what becomes of their products: upstream's build_attn_mha (llama-graph.cpp), i.e.
// scale, mask, ALiBi, soft-cap, sinks.
struct attention_inputs {
    ggml_backend_t backend;
    ggml_backend_t host; // the last resort

    ggml_tensor * k;    // [n_embd_head*n_head_kv, capacity]
    ggml_tensor * ring; // [n_embd_head*n_head, n]

    int64_t n_embd_head;
    int64_t n_head_kv;
    int64_t n_gqa;      // query heads per KV head
    int64_t n_kv;       // slots that are looked at: [0, n_kv)

    std::vector<int32_t>   rows;    // ring rows, oldest first
    std::vector<llama_pos> row_pos; // their positions
    std::vector<int32_t>   slots;   // slot of cell j
    std::vector<llama_pos> pos;     // its position, ascending
    std::vector<float>     sinks;   // [n_head_kv*n_gqa], or empty

    bool  use_alibi;
    float max_bias;
    float soft_cap;    // 0: none
    float pre_scale;   // applied before the soft-cap
    float post_scale;  // applied by the soft-max
};

// memory for one layer after the other
struct attention_scratch {
    refreekv::bytes weights; // the kernel's

    size_t weights_limit = 8u*1024*1024; // of their bytes, where one query head's do not take more

    std::map<std::pair<int, ggml_backend_t>, ggml_gallocr_ptr> graphs; // of each kind
};

} // namespace refreekv
