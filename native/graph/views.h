#pragma once

#include "cache/layer.h"
#include "cache/logical-cells.h"
#include "graph/layouts.h"

#include "ggml-cpp.h"

#include <vector>

struct llama_hparams;
struct llama_ubatch;

namespace refreekv {

// What graphs see of the layers: views of their rows, the indices of new cells, the mask of a layout. The counterparts of
// llama_kv_cache's get_k, get_v, cpy_k, cpy_v and set_input_*, with the layer's capacity in the place of kv_size.
//
// reservation: the shapes of the worst case, without memory.
class views {
public:
    views(const llama_hparams & hparams, const std::vector<layer> & layers, const logical_cells & logical, const layouts & lay) :
        hparams(hparams), layers(layers), logical(logical), lay(lay) {}

    uint32_t worst_n_kv() const { return logical.size(); }

    // indices that one token of a layer takes in v_idxs
    int64_t n_v_idxs(uint32_t i_layer) const;

    ggml_tensor * get_k(ggml_context * ctx, uint32_t i_layer, bool reservation);
    ggml_tensor * get_v(ggml_context * ctx, uint32_t i_layer, bool reservation);

    // k_cur, v_cur: all heads of the layer; by_shortest: the indices are those of the shortest layout of the tails
    ggml_tensor * cpy_k(ggml_context * ctx, ggml_tensor * k_cur, ggml_tensor * k_idxs, uint32_t i_layer, bool reservation, bool by_shortest);
    ggml_tensor * cpy_v(ggml_context * ctx, ggml_tensor * v_cur, ggml_tensor * v_idxs, uint32_t i_layer, bool reservation, bool by_shortest);

    void set_input_k_idxs(ggml_tensor * dst, uint32_t i_layer, const llama_kv_cache::slot_info & sinfo) const;
    void set_input_v_idxs(ggml_tensor * dst, uint32_t i_layer, const llama_kv_cache::slot_info & sinfo) const;
    // [n_codes + n_kv, n_tokens]: the room of the layer's codes (warm_cells), and its slots
    void set_input_mask  (ggml_tensor * dst, uint32_t i_layer, const llama_ubatch & ubatch, bool causal) const;

private:
    const llama_hparams &      hparams;
    const std::vector<layer> & layers;
    const logical_cells &      logical;
    const layouts &            lay;

    // tensors of the worst case
    struct worst_rows {
        ggml_context_ptr ctx;
        ggml_tensor * k = nullptr;
        ggml_tensor * v = nullptr;
    };
    std::vector<worst_rows> worst; // [n_layers] made when they are asked for

    const worst_rows & worst_of(const layer & layer);

    // K and V of a layer as matrices
    ggml_tensor * rows_k(const layer & layer, bool reservation);
    ggml_tensor * rows_v(const layer & layer, bool reservation);

    // those that indices count from
    ggml_tensor * rows_from(ggml_context * ctx, ggml_tensor * rows, const layer & layer, bool by_shortest) const;

    // stride: numbers from one token's line to the next
    template <typename T>
    void fill_mask(T * data, int64_t n_kv, int64_t stride, const layer & layer, const llama_ubatch & ubatch, bool causal) const;
    template <typename T>
    void fill_codes_mask(T * data, int64_t stride, const warm_cells & warm, const llama_ubatch & ubatch) const;
    template <typename T>
    void fill_masks(ggml_tensor * dst, const layer & layer, const llama_ubatch & ubatch, bool causal) const;

    bool visible(uint32_t cell, const llama_ubatch & ubatch, uint32_t i, bool causal) const;
};

} // namespace refreekv
