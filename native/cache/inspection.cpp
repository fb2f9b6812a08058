#include "cache/inspection.h"

#include "api/error.h"

#include <algorithm>
#include <cstring>

namespace refreekv {

std::vector<llama_pos> inspection::kept(llama_seq_id seq_id, uint32_t i_layer) const {
    std::vector<llama_pos> res;
    for (const auto & c : p.evictor.held_by(p.layers[i_layer], p.evictor.cells_of(seq_id))) {
        res.push_back(c.pos);
    }
    return res;
}

// n elements of a row, from the i-th on (a whole number of blocks)
static void read_row(const ggml_tensor * t, int64_t row, int64_t i, int64_t n, float * out) {
    std::vector<uint8_t> bytes(ggml_row_size(t->type, n));

    ggml_backend_tensor_get(t, bytes.data(), row*t->nb[1] + ggml_row_size(t->type, i), bytes.size());

    if (t->type == GGML_TYPE_F32) {
        memcpy(out, bytes.data(), bytes.size());
    } else {
        ggml_get_type_traits(t->type)->to_float(bytes.data(), out, n);
    }
}

int32_t inspection::read_queries(llama_seq_id seq_id, uint32_t i_layer, float * out, llama_pos * pos, int32_t n_max) const {
    std::vector<int32_t>   rows;
    std::vector<llama_pos> row_pos;

    p.ring.rows(seq_id, p.logical.table_of_seq(seq_id).seq_pos_max(seq_id), p.params.n_window, 1, rows, row_pos);

    const auto * t = p.layers[i_layer].readers[0].ring;
    if (!t) {
        return 0;
    }

    for (int32_t i = 0; i < std::min<int32_t>(n_max, rows.size()); ++i) {
        read_row(t, rows[i], 0, t->ne[0], out + i*t->ne[0]);
        pos[i] = row_pos[i];
    }

    return rows.size();
}

int32_t inspection::read_keys(llama_seq_id seq_id, uint32_t i_layer, float * out, llama_pos * pos, int32_t n_max) const {
    const auto & layer = p.layers[i_layer];
    const auto   list  = p.evictor.held_by(layer, p.evictor.cells_of(seq_id));

    for (int32_t i = 0; i < std::min<int32_t>(n_max, list.size()); ++i) {
        read_row(layer.rows.k(), list[i].slot, 0, layer.rows.k()->ne[0], out + i*layer.rows.k()->ne[0]);
        pos[i] = list[i].pos;
    }

    return list.size();
}

int32_t inspection::read_attention(llama_context * lctx, llama_seq_id seq_id, uint32_t i_layer, float * out, uint64_t n_max, int32_t * shape) {
    p.mover.set_context(lctx);

    publishing publish(p); // what was read back

    const auto & layer = p.layers[i_layer];
    const auto   list  = p.evictor.held_by(layer, p.evictor.cells_of(seq_id));

    const bool has_rings = layer.readers[0].ring;

    if (list.empty() || !has_rings) {
        set_error("read_attention: layer %d has no %s of sequence %d", layer.il, has_rings ? "cells" : "queries", seq_id);
        return REFREEKV_ERR_STATE;
    }

    refreekv_params every = p.params;
    every.window_step = 1;

    attention_scratch          scratch;
    std::unique_ptr<refreekv::attention> attn;
    if (const int32_t status = p.evictor.look(layer, seq_id, list, every, scratch, attn)) {
        return status;
    }

    shape[0] = attn->n_head;
    shape[1] = attn->n_rows;
    shape[2] = attn->n_cells;

    if ((uint64_t) attn->n_head*attn->n_rows*attn->n_cells > n_max) {
        return REFREEKV_OK;
    }

    const bool ok = attn->read(out);

    p.evictor.count(*attn);

    if (!ok) {
        set_error("layer %d: backend %s could not compute the attention rows", layer.il, ggml_backend_name(p.mover.backend_of(layer)));
        return REFREEKV_ERR_COMPUTE;
    }

    return REFREEKV_OK;
}

} // namespace refreekv
