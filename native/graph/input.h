#pragma once

#include "hooks.h"
#include "cache/cache.h"

#include "llama-graph.h"

#include <map>
#include <vector>

namespace refreekv {

class warm_cells;

// What the graphs of a cache with a policy have beside upstream's inputs: a mask and indices per layout (and V indices per row
// size, when V is transposed), and the two index tensors of the query ring. For single tokens layouts that end in the same way
// share one mask and its indices, since each input of a graph on a device is a transfer of its own.
//
// It is added to a graph with its first layer (of()). Upstream's masks and indices of the same cache are in no graph then.
class graph_input final : public llm_graph_input_i {
public:
    graph_input(const llm_graph_context & graph, const cache_context & mctx);

    // that of a graph
    static graph_input & of(const llm_graph_context & graph, const cache_context & mctx);

    void set_input(const llama_ubatch * ubatch) override;
    bool can_reuse(const llm_graph_params & params) override;

    // store K and V, copy the last queries into the ring, and attend to the cache
    ggml_tensor * attention(const llm_graph_context & graph, const attention_call & call);

private:
    refreekv::store &      store;
    const cache_context * mctx;

    const bool reservation; // worst case: one layout of n_ctx cells
    const bool decodes;     // few tokens by our own kernel; the elastic full cache is upstream's bit for bit
    const bool causal;

    const uint64_t generation;
    const uint32_t n_tokens;

    // tensors that layers share
    struct kind {
        uint32_t i_layer; // one of them
        uint32_t layout;
        int64_t  n_v_idxs;
        const warm_cells * codes; // like those of each of them; nullptr: they have none as tensors
        bool     first;   // of its layout: the others share its mask and K indices
        ggml_backend_buffer_type_t buft; // nullptr: any

        ggml_tensor * mask;   // F32/F16 [n_codes + n_kv, n_tokens]
        ggml_tensor * k_idxs; // I64 [n_tokens]
        ggml_tensor * v_idxs; // I64 [n_tokens*n_v_idxs]
    };
    std::vector<kind> kinds;

    // of the layouts that end in the same way; nullptr: no layouts share anything
    ggml_tensor * tail_mask = nullptr; // of the longest
    ggml_tensor * tail_idxs = nullptr; // of the shortest

    std::map<ggml_backend_buffer_type_t, ggml_tensor *> tail_masks; // where the caches are

    ggml_tensor * ring_src = nullptr; // I32 [n_copy]
    ggml_tensor * ring_dst = nullptr; // I64 [n_copy]

    bool is_tail(uint32_t layout) const;

    ggml_tensor * tail_mask_for(ggml_context * ctx, uint32_t i_layer);

    const warm_cells * codes_of(uint32_t i_layer) const;

    const kind * find   (uint32_t i_layer) const;
    const kind & kind_of(uint32_t i_layer) const { return *find(i_layer); }

    uint32_t layout_of(uint32_t i_layer) const;

    ggml_tensor * decode(ggml_context * ctx, uint32_t i_layer, const attention_call & attn);
};

} // namespace refreekv
