#include "graph/views.h"

#include "tiers/warm-cells.h"

#include "llama-batch.h"
#include "llama-hparams.h"
#include "llama-impl.h"

#include <algorithm>
#include <cmath>
#include <map>

namespace refreekv {

// A graph with as many nodes and leafs as its reservation runs on the plan made for that: so a reservation has a leaf for each
// layer, too. A plan of its own would leave tensors at multiples of 32 bytes only, and the product of K and Q takes 1.5 times as
// long where its lines are split.
const views::worst_rows & views::worst_of(const layer & layer) {
    worst.resize(layers.size());

    auto & res = worst[&layer - layers.data()];
    if (!res.ctx) {
        ggml_init_params params = { 2*ggml_tensor_overhead(), nullptr, true };
        res.ctx.reset(ggml_init(params));

        const auto & shape = layer.rows.get_shape();

        res.k = ggml_new_tensor_2d(res.ctx.get(), shape.type_k, shape.n_embd_k, worst_n_kv());
        res.k->buffer = layer.no_memory;
        if (!layer.has_v()) {
            return res;
        }
        res.v = shape.v_trans ? ggml_new_tensor_2d(res.ctx.get(), shape.type_v, worst_n_kv(), shape.n_embd_v)
                              : ggml_new_tensor_2d(res.ctx.get(), shape.type_v, shape.n_embd_v, worst_n_kv());

        res.v->buffer = layer.no_memory;
    }

    return res;
}

ggml_tensor * views::rows_k(const layer & layer, bool reservation) {
    return reservation ? worst_of(layer).k : layer.rows.k();
}

ggml_tensor * views::rows_v(const layer & layer, bool reservation) {
    return reservation ? worst_of(layer).v : layer.rows.v();
}

ggml_tensor * views::rows_from(ggml_context * ctx, ggml_tensor * rows, const layer & layer, bool by_shortest) const {
    if (!by_shortest) {
        return rows;
    }
    const int64_t n = layer.res.n_slots() - layers[lay.layer_of_shortest()].res.n_slots();

    // no view, which would be a node between K's RoPE and its store: backends make one operation of these where they follow each other
    ggml_tensor * res = ggml_new_tensor_2d(ctx, rows->type, rows->ne[0], rows->ne[1] - n);

    res->buffer = rows->buffer;
    res->data   = (char *) rows->data + n*rows->nb[1];

    return res;
}

ggml_tensor * views::get_k(ggml_context * ctx, uint32_t i_layer, bool reservation) {
    const auto & layer = layers[i_layer];

    const int64_t n_head_kv   = hparams.n_head_kv(layer.il);
    const int64_t n_embd_head = hparams.n_embd_head_k(layer.il);
    const int64_t n_kv        = reservation ? worst_n_kv() : lay.n_kv(layer.layout);

    ggml_tensor * k = rows_k(layer, reservation);

    return ggml_view_4d(ctx, k, n_embd_head, n_head_kv, n_kv, 1,
            ggml_row_size(k->type, n_embd_head), k->nb[1], k->nb[1]*n_kv, 0);
}

ggml_tensor * views::get_v(ggml_context * ctx, uint32_t i_layer, bool reservation) {
    const auto & layer = layers[i_layer];

    const int64_t n_head_kv   = hparams.n_head_kv(layer.il);
    const int64_t n_embd_head = hparams.n_embd_head_v(layer.il);
    const int64_t n_kv        = reservation ? worst_n_kv() : lay.n_kv(layer.layout);

    if (!layer.has_v()) {
        ggml_tensor * k = get_k(ctx, i_layer, reservation);

        return ggml_view_4d(ctx, k, n_embd_head, k->ne[1], k->ne[2], k->ne[3], k->nb[1], k->nb[2], k->nb[3], 0);
    }
    ggml_tensor * v = rows_v(layer, reservation);

    if (!layer.rows.get_shape().v_trans) {
        return ggml_view_4d(ctx, v, n_embd_head, n_head_kv, n_kv, 1,
                ggml_row_size(v->type, n_embd_head), v->nb[1], v->nb[1]*n_kv, 0);
    }

    const size_t line = v->nb[1];

    return ggml_view_4d(ctx, v, n_kv, n_head_kv, n_embd_head, 1, line*n_embd_head, line, line*n_embd_head*n_head_kv, 0);
}

ggml_tensor * views::cpy_k(ggml_context * ctx, ggml_tensor * k_cur, ggml_tensor * k_idxs, uint32_t i_layer, bool reservation, bool by_shortest) {
    const auto & layer = layers[i_layer];

    k_cur = ggml_view_2d(ctx, k_cur, k_cur->ne[0]*k_cur->ne[1], k_cur->ne[2], k_cur->nb[2], 0);

    return ggml_set_rows(ctx, rows_from(ctx, rows_k(layer, reservation), layer, by_shortest), k_cur, k_idxs);
}

ggml_tensor * views::cpy_v(ggml_context * ctx, ggml_tensor * v_cur, ggml_tensor * v_idxs, uint32_t i_layer, bool reservation, bool by_shortest) {
    const auto & layer = layers[i_layer];

    ggml_tensor * v = rows_v(layer, reservation);

    const int64_t n_embd   = v_cur->ne[0]*v_cur->ne[1];
    const int64_t n_tokens = v_cur->ne[2];

    if (!layer.rows.get_shape().v_trans) {
        return ggml_set_rows(ctx, rows_from(ctx, v, layer, by_shortest), ggml_view_2d(ctx, v_cur, n_embd, n_tokens, v_cur->nb[2], 0), v_idxs);
    }

    v_cur = ggml_row_size(v_cur->type, n_embd) == v_cur->nb[2] ? ggml_reshape_2d(ctx, v_cur, n_embd, n_tokens)
                                                               : ggml_cont_2d   (ctx, v_cur, n_embd, n_tokens);

    // [TAG_V_CACHE_VARIABLE]
    const int64_t n_embd_row = layer.rows.get_shape().n_embd_v;
    if (n_embd < n_embd_row) {
        v_cur = ggml_pad(ctx, v_cur, n_embd_row - n_embd, 0, 0, 0);
    }

    // each element is a row of its own
    return ggml_set_rows(ctx,
            ggml_reshape_2d(ctx, v,     1, ggml_nelements(v)),
            ggml_reshape_2d(ctx, v_cur, 1, ggml_nelements(v_cur)), v_idxs);
}

int64_t views::n_v_idxs(uint32_t i_layer) const {
    const auto & shape = layers[i_layer].rows.get_shape();

    return shape.v_trans ? shape.n_embd_v : 1;
}

void views::set_input_k_idxs(ggml_tensor * dst, uint32_t i_layer, const llama_kv_cache::slot_info & sinfo) const {
    const auto & res = layers[i_layer].res;

    int64_t * data = (int64_t *) dst->data;
    logical.for_batch(sinfo, [&](uint32_t cell) { *data++ = res.slot(cell); });
}

void views::set_input_v_idxs(ggml_tensor * dst, uint32_t i_layer, const llama_kv_cache::slot_info & sinfo) const {
    const auto & layer = layers[i_layer];

    const int64_t n_row    = n_v_idxs(i_layer);
    const int64_t capacity = layer.rows.capacity();

    int64_t * data = (int64_t *) dst->data;
    logical.for_batch(sinfo, [&](uint32_t cell) {
        const int64_t slot = layer.res.slot(cell);
        for (int64_t j = 0; j < n_row; ++j) {
            *data++ = j*capacity + slot;
        }
    });
}

// of a cell of the token's own sequence: upstream's rules (set_input_kq_mask_impl in llama-kv-cache.cpp)
bool views::visible(uint32_t cell, const llama_ubatch & ubatch, uint32_t i, bool causal) const {
    const llama_pos p = logical.pos_of(cell);

    if (!causal || p < ubatch.pos[i]) {
        return true;
    }
    if (p > ubatch.pos[i]) {
        return false;
    }

    // M-RoPE: the cells of one image share a position and are ordered by row and column
    return !ubatch.is_pos_2d() ||
        !logical.table_of(cell).ext_get(logical.index_of(cell)).is_2d_gt(ubatch.pos[i + 2*ubatch.n_tokens], ubatch.pos[i + ubatch.n_tokens]);
}

// slot by slot where upstream goes cell by cell
template <typename T>
void views::fill_mask(T * data, int64_t n_kv, int64_t stride, const layer & layer, const llama_ubatch & ubatch, bool causal) const {
    const T keep = llama_cast<T>(0.0f);
    const T drop = llama_cast<T>(-INFINITY);

    const bool alibi = hparams.use_alibi;

    std::map<llama_seq_id, llama_pos> pos_min;
    for (uint32_t i = 0; i < ubatch.n_tokens; ++i) {
        const auto it = pos_min.emplace(ubatch.seq_id[i][0], ubatch.pos[i]).first;
        it->second = std::min(it->second, ubatch.pos[i]);
    }

    // rows of one sequence differ only where the batch's own positions are: there causality decides
    struct base_row {
        uint32_t i;
        std::vector<uint32_t> open; // slots
    };
    std::map<llama_seq_id, base_row> bases;

    for (uint32_t i = 0; i < ubatch.n_tokens; ++i) {
        const llama_seq_id seq_id = ubatch.seq_id[i][0];
        const llama_pos    pos    = ubatch.pos[i];

        T * row = data + i*stride;

        auto it = bases.find(seq_id);
        if (it == bases.end()) {
            it = bases.emplace(seq_id, base_row { i, {} }).first;

            std::fill(row, row + n_kv, drop);

            const auto &   table = logical.table_of_seq(seq_id);
            const uint32_t first = logical.first_of(seq_id);

            for (uint32_t s = 0; s < layer.res.n_slots(); ++s) {
                const int64_t index = (int64_t) layer.res.cell(s) - first;
                if (index < 0 || index >= logical.stream_size() || layer.res.hidden(s) || !table.seq_has(index, seq_id)) {
                    continue;
                }
                if (table.pos_get(index) >= pos_min[seq_id] || alibi) {
                    it->second.open.push_back(s);
                } else {
                    row[s] = keep;
                }
            }
        } else {
            std::copy_n(data + it->second.i*stride, n_kv, row);
        }

        for (uint32_t s : it->second.open) {
            const uint32_t cell = layer.res.cell(s);

            row[s] = !visible(cell, ubatch, i, causal) ? drop : alibi ? llama_cast<T>((float) -std::abs(logical.pos_of(cell) - pos)) : keep;
        }
    }
}

// of cells in codes: those of a block are seen by the same tokens
template <typename T>
void views::fill_codes_mask(T * data, int64_t stride, const warm_cells & warm, const llama_ubatch & ubatch) const {
    const T keep = llama_cast<T>(0.0f);
    const T drop = llama_cast<T>(-INFINITY);

    const uint32_t n_blocks = warm.n_blocks();

    std::vector<uint8_t> seen(n_blocks);
    std::vector<uint8_t> before; // by the token before

    for (uint32_t i = 0; i < ubatch.n_tokens; ++i, data += stride) {
        for (uint32_t b = 0; b < n_blocks; ++b) {
            seen[b] = logical.seen_by(warm.first_cell(b), ubatch.seq_id[i][0], ubatch.pos[i]);
        }
        if (seen == before) {
            std::copy_n(data - stride, warm.n_places(), data);
            continue;
        }
        std::fill_n(data, warm.n_places(), drop);
        for (uint32_t b = 0; b < n_blocks; ++b) {
            for (uint64_t left = seen[b] ? warm.cells_there(b) : 0; left; left &= left - 1) {
                data[b*code_tensors::N_CELLS + lowest_bit(left)] = keep;
            }
        }
        before = seen;
    }
}

template <typename T>
void views::fill_masks(ggml_tensor * dst, const layer & layer, const llama_ubatch & ubatch, bool causal) const {
    const int64_t n_codes = layer.warm ? layer.warm->n_places() : 0;

    if (n_codes > 0) {
        fill_codes_mask((T *) dst->data, dst->ne[0], *layer.warm, ubatch);
    }
    fill_mask((T *) dst->data + n_codes, dst->ne[0] - n_codes, dst->ne[0], layer, ubatch, causal);
}

void views::set_input_mask(ggml_tensor * dst, uint32_t i_layer, const llama_ubatch & ubatch, bool causal) const {
    GGML_ASSERT(ggml_backend_buffer_is_host(dst->buffer));

    if (dst->type == GGML_TYPE_F16) {
        fill_masks<ggml_fp16_t>(dst, layers[i_layer], ubatch, causal);
    } else {
        fill_masks<float>(dst, layers[i_layer], ubatch, causal);
    }
}

} // namespace refreekv
