// What a refreekv::store says of itself, for kv_stats, tests and research.

#include "cache/figures.h"

#include "hooks.h"
#include "cache/store.h"

#include "api/error.h"
#include "evict/attention-inputs.h"
#include "tiers/cold-store.h"

#include "llama-context.h"
#include "llama-model.h"

#include <algorithm>
#include <cstring>

namespace refreekv {

// what is protected in a cache without a policy, too
struct any_cache : llama_kv_cache {
    static const std::vector<kv_layer> & layers_of(const llama_kv_cache & kv) { return kv.*(&any_cache::layers); }
};

static uint32_t n_tokens(const llama_kv_cache & kv) {
    uint32_t res = 0;
    for (uint32_t s = 0; s < kv.get_n_stream(); ++s) {
        res += kv.get_cells(s).get_used(); // a stream is that of the sequence with its number
    }
    return res;
}

refreekv_stats full_stats(llama_memory_t mem, const llama_hparams & hparams) {
    refreekv_stats res = {};

    const auto * kv = cache::part_of(mem);
    if (!kv) {
        return res;
    }

    res.n_layer  = any_cache::layers_of(*kv).size();
    res.n_layout = 1;

    for (const auto & [_, size] : kv->memory_breakdown()) {
        res.bytes += size;
    }
    res.n_tokens = n_tokens(*kv);

    for (int32_t i = 0; i < res.n_layer; ++i) {
        res.bytes_full += (uint64_t) res.n_tokens*full_layer(mem, hparams, i).row_bytes;
    }

    return res;
}

refreekv_layer_info full_layer(llama_memory_t mem, const llama_hparams & hparams, uint32_t i_layer) {
    const auto * kv    = cache::part_of(mem);
    const auto & layer = any_cache::layers_of(*kv)[i_layer];

    refreekv_layer_info res = {};

    res.il          = layer.il;
    res.n_head      = hparams.n_head(layer.il);
    res.n_head_kv   = hparams.n_head_kv(layer.il);
    res.n_embd_head = hparams.n_embd_head_k(layer.il);
    res.n_capacity  = kv->get_size()*kv->get_n_stream();
    res.row_bytes   = layer.k->nb[1] + (layer.v ? layer.v->nb[1] : 0);
    res.n_kept      = n_tokens(*kv);

    return res;
}

refreekv_stats store::stats() const {
    refreekv_stats res = {};

    res.n_layer     = layers.size();
    res.n_layout    = layouts.n_layouts();
    res.n_prunes    = n_prunes;
    res.prune_us    = prune_us;
    res.bytes_freed = bytes_freed;
    res.bytes_read  = evictor.bytes_read();
    res.bytes_cold  = cold.bytes();
    res.cold        = cold.kind();
    res.cold_full   = cold.lost();
    res.n_restores  = n_restores;
    res.n_turns_failed = n_turns_failed;
    res.restore_us  = restore_us;

    res.theta       = warm.theta();

    res.bytes_bounced = evictor.bytes_bounced();

    res.n_tokens = logical.n_used();

    for (const auto & layer : layers) {
        res.bytes      += layer.rows.bytes();
        if (layer.warm) {
            res.n_rows_read += layer.warm->n_read;
            res.n_rows_left += layer.warm->n_left;
            res.bytes_codes += layer.warm->bytes();
        }
        res.bytes_full += (uint64_t) res.n_tokens*layer.rows.row_bytes();

        res.bytes_bounced += layer.rows.bytes_bounced();
    }
    for (const auto & [_, buf] : ring_bufs) {
        res.bytes_ring += ggml_backend_buffer_get_size(buf.get());
    }

    return res;
}

refreekv_layer_info store::layer_info(uint32_t i_layer) const {
    const auto & layer = layers[i_layer];

    uint32_t n_kept = layer.res.n_visible();
    if (stale_slots) {
        n_kept = 0;
        for (uint32_t s = 0; s < layer.res.n_slots(); ++s) {
            n_kept += layer.res.cell(s) >= 0 && !layer.res.hidden(s) && !logical.is_empty(layer.res.cell(s));
        }
    }

    refreekv_layer_info res = {};

    res.il          = layer.il;
    res.n_head      = kv.hparams.n_head(layer.il);
    res.n_head_kv   = kv.hparams.n_head_kv(layer.il);
    res.n_embd_head = kv.hparams.n_embd_head_k(layer.il);
    res.n_kept      = n_kept;
    res.n_capacity  = layer.rows.capacity();
    res.layout      = layer.layout;
    res.row_bytes   = layer.rows.row_bytes();
    res.kq_scale    = layer.kq_scale;

    return res;
}

void store::publish() {
    auto & next = board.next();

    next.stats = stats();

    next.layers.resize(layers.size());
    for (uint32_t i = 0; i < layers.size(); ++i) {
        next.layers[i] = layer_info(i);
    }

    next.bytes.clear();
    const auto add = [&](ggml_backend_buffer_type_t buft, size_t size) {
        for (auto & [known, sum] : next.bytes) {
            if (known == buft) {
                sum += size;
                return;
            }
        }
        next.bytes.emplace_back(buft, size);
    };
    if (!kv.model.hparams.no_alloc) {
        for (const auto & layer : layers) {
            add(layer.rows.get_shape().buft, layer.rows.bytes());
        }
        for (const auto & [_, buf] : ring_bufs) {
            add(ggml_backend_buffer_get_type(buf.get()), ggml_backend_buffer_get_size(buf.get()));
        }
    }

    board.publish();
}

publishing::~publishing() {
    if (!store) {
        return;
    }
    try {
        store->publish();
    } catch (const std::bad_alloc &) {
        // the figures of before stay
    }
}

void publish_buffers(llama_context * lctx) {
    auto * sched = lctx->get_sched();

    uint64_t bytes_compute = 0;
    for (int i = 0; i < ggml_backend_sched_get_n_backends(sched); ++i) {
        bytes_compute += ggml_backend_sched_get_buffer_size(sched, ggml_backend_sched_get_backend(sched, i));
    }

    if (!lctx->buffers) {
        lctx->buffers = std::make_shared<refreekv_buffers>();
    } else if (lctx->buffers->bytes_compute == bytes_compute) {
        return;
    }

    const auto * store = store::of(lctx->get_memory());

    std::map<ggml_backend_buffer_type_t, size_t> own;
    if (store) {
        store->get_figures().read([&](const figures & f) { own.insert(f.bytes.begin(), f.bytes.end()); });
    }

    std::vector<refreekv_buffer_info> infos;
    for (const auto & [buft, data] : lctx->memory_breakdown()) {
        infos.push_back({ ggml_backend_buft_name(buft), data.model, data.context - own[buft], data.compute });
    }

    std::lock_guard<std::mutex> lock(lctx->buffers->mutex);
    lctx->buffers->infos         = std::move(infos);
    lctx->buffers->bytes_compute = bytes_compute;
}

std::vector<llama_pos> store::kept(llama_seq_id seq_id, uint32_t i_layer) const {
    std::vector<llama_pos> res;
    for (const auto & c : evictor.held_by(layers[i_layer], evictor.cells_of(seq_id))) {
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

int32_t store::read_queries(llama_seq_id seq_id, uint32_t i_layer, float * out, llama_pos * pos, int32_t n_max) const {
    std::vector<int32_t>   rows;
    std::vector<llama_pos> row_pos;

    ring.rows(seq_id, logical.table_of_seq(seq_id).seq_pos_max(seq_id), params.n_window, 1, rows, row_pos);

    const auto * t = layers[i_layer].ring;
    if (!t) {
        return 0;
    }

    for (int32_t i = 0; i < std::min<int32_t>(n_max, rows.size()); ++i) {
        read_row(t, rows[i], 0, t->ne[0], out + i*t->ne[0]);
        pos[i] = row_pos[i];
    }

    return rows.size();
}

int32_t store::read_keys(llama_seq_id seq_id, uint32_t i_layer, float * out, llama_pos * pos, int32_t n_max) const {
    const auto & layer = layers[i_layer];
    const auto   list  = evictor.held_by(layer, evictor.cells_of(seq_id));

    for (int32_t i = 0; i < std::min<int32_t>(n_max, list.size()); ++i) {
        read_row(layer.rows.k(), list[i].slot, 0, layer.rows.k()->ne[0], out + i*layer.rows.k()->ne[0]);
        pos[i] = list[i].pos;
    }

    return list.size();
}

int32_t store::read_attention(llama_context * lctx, llama_seq_id seq_id, uint32_t i_layer, float * out, uint64_t n_max, int32_t * shape) {
    mover.set_context(lctx);

    publishing publish(this); // what was read back

    const auto & layer = layers[i_layer];
    const auto   list  = evictor.held_by(layer, evictor.cells_of(seq_id));

    if (list.empty() || !layer.ring) {
        set_error("read_attention: layer %d has no %s of sequence %d", layer.il, layer.ring ? "cells" : "queries", seq_id);
        return REFREEKV_ERR_STATE;
    }

    refreekv_params every = params;
    every.window_step = 1;

    attention_scratch          scratch;
    std::unique_ptr<refreekv::attention> attn;
    if (const int32_t status = evictor.look(layer, seq_id, list, every, scratch, attn)) {
        return status;
    }

    shape[0] = attn->n_head;
    shape[1] = attn->n_rows;
    shape[2] = attn->n_cells;

    if ((uint64_t) attn->n_head*attn->n_rows*attn->n_cells > n_max) {
        return REFREEKV_OK;
    }

    const bool ok = attn->read(out);

    evictor.count(*attn);

    if (!ok) {
        set_error("layer %d: backend %s could not compute the attention rows", layer.il, ggml_backend_name(mover.backend_of(layer)));
        return REFREEKV_ERR_COMPUTE;
    }

    return REFREEKV_OK;
}

} // namespace refreekv
