// What a cache with a policy says of itself, for kv_stats, tests and research.

#include "cache/figures.h"

#include "hooks.h"
#include "cache/full-cache.h"
#include "cache/store.h"

#include "llama-context.h"
#include "llama-model.h"

#include <algorithm>
#include <map>
#include <new>

namespace refreekv {

// what is protected in a cache without a policy, too
struct any_cache : llama_kv_cache {
    static const std::vector<kv_layer> & layers_of(const llama_kv_cache & kv) { return kv.*(&any_cache::layers); }

    static int32_t n_readers(const llama_kv_cache & kv, int32_t i_layer) {
        const auto & ids = kv.*(&any_cache::map_layer_ids);

        return std::count_if(ids.begin(), ids.end(), [=](const auto & id) { return id.second == i_layer; });
    }
};

uint32_t full_tokens(llama_memory_t mem) {
    const auto * full = full_cache::of(mem);

    return full ? full->n_tokens() : 0;
}

refreekv_stats full_stats(llama_memory_t mem, const llama_hparams & hparams, uint32_t n_tokens) {
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
    res.n_tokens = n_tokens;

    for (int32_t i = 0; i < res.n_layer; ++i) {
        res.bytes_full += (uint64_t) n_tokens*full_layer(mem, hparams, i, n_tokens).row_bytes;
    }

    return res;
}

static uint32_t row_numbers(const llama_hparams & hparams, uint32_t il, bool has_v) {
    return hparams.n_head_kv(il)*(hparams.n_embd_head_k(il) + (has_v ? hparams.n_embd_head_v(il) : 0));
}

refreekv_layer_info full_layer(llama_memory_t mem, const llama_hparams & hparams, uint32_t i_layer, uint32_t n_tokens) {
    const auto * kv    = cache::part_of(mem);
    const auto & layer = any_cache::layers_of(*kv)[i_layer];

    refreekv_layer_info res = {};

    res.il          = layer.il;
    res.n_head      = hparams.n_head(layer.il);
    res.n_head_kv   = hparams.n_head_kv(layer.il);
    res.n_embd_head = hparams.n_embd_head_k(layer.il);
    res.n_readers   = any_cache::n_readers(*kv, i_layer);
    res.n_capacity  = kv->get_size()*kv->get_n_stream();
    res.row_bytes   = layer.k->nb[1] + (layer.v ? layer.v->nb[1] : 0);
    res.row_numbers = row_numbers(hparams, layer.il, layer.v);
    res.n_kept      = n_tokens;

    return res;
}

static refreekv_stats stats(const parts & p) {
    refreekv_stats res = {};

    res.n_layer     = p.layers.size();
    res.n_layout    = p.layouts.n_layouts();
    res.n_prunes    = p.n_prunes;
    res.prune_us    = p.prune_us;
    res.bytes_freed = p.bytes_freed;
    res.bytes_read  = p.evictor.bytes_read();
    res.bytes_cold  = p.cold.bytes();
    res.cold        = p.cold.kind();
    res.cold_full   = p.cold.lost();
    res.n_restores  = p.n_restores;
    res.n_turns_failed = p.n_turns_failed;
    res.restore_us  = p.restore_us;

    res.theta       = p.warm.theta();
    res.codes_share = p.warm.share_of_f16(p.layers);

    res.bytes_bounced = p.evictor.bytes_bounced();

    res.n_tokens = p.logical.n_used();

    int64_t n_lines  = 0;
    int64_t by_codes = 0;

    for (const auto & layer : p.layers) {
        res.bytes      += layer.rows.bytes();
        if (layer.warm) {
            const warm_counts & counts = layer.warm->counts;

            res.n_rows_read += counts.n_read;
            res.n_rows_left += counts.n_left;
            n_lines         += counts.n_lines;
            by_codes        += counts.by_codes;
            res.error_bound  = std::max(res.error_bound, counts.worst/warm_counts::UNIT);
            res.bytes_codes += layer.warm->bytes();
        }
        res.bytes_full += (uint64_t) res.n_tokens*layer.rows.row_bytes();

        res.bytes_bounced += layer.rows.bytes_bounced();
    }
    res.by_codes = n_lines > 0 ? (float) ((double) by_codes/n_lines/warm_counts::UNIT) : 0.0f;

    for (const auto & [_, buf] : p.ring_bufs) {
        res.bytes_ring += ggml_backend_buffer_get_size(buf.get());
    }

    return res;
}

static refreekv_layer_info layer_info(const parts & p, uint32_t i_layer) {
    const auto & layer = p.layers[i_layer];

    uint32_t n_kept = layer.res.n_visible();
    if (p.stale_slots) {
        n_kept = 0;
        for (uint32_t s = 0; s < layer.res.n_slots(); ++s) {
            n_kept += layer.res.cell(s) >= 0 && !layer.res.hidden(s) && !p.logical.is_empty(layer.res.cell(s));
        }
    }

    refreekv_layer_info res = {};

    res.il          = layer.il;
    res.n_head      = p.hparams.n_head(layer.il);
    res.n_head_kv   = p.hparams.n_head_kv(layer.il);
    res.n_embd_head = p.hparams.n_embd_head_k(layer.il);
    res.n_readers   = layer.readers.size();
    res.n_kept      = n_kept;
    res.n_capacity  = layer.rows.capacity();
    res.layout      = layer.layout;
    res.row_bytes   = layer.rows.row_bytes();
    res.row_numbers = row_numbers(p.hparams, layer.il, layer.has_v());
    res.kq_scale    = layer.kq_scale;

    return res;
}

void publish(parts & p) {
    auto & next = p.board.next();

    next.stats = stats(p);

    next.layers.resize(p.layers.size());
    for (uint32_t i = 0; i < p.layers.size(); ++i) {
        next.layers[i] = layer_info(p, i);
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
    if (!p.model.hparams.no_alloc) {
        for (const auto & layer : p.layers) {
            add(layer.rows.get_shape().buft, layer.rows.bytes());
        }
        for (const auto & [_, buf] : p.ring_bufs) {
            add(ggml_backend_buffer_get_type(buf.get()), ggml_backend_buffer_get_size(buf.get()));
        }
    }

    p.board.publish();
}

publishing::~publishing() {
    if (--p.n_changes > 0) {
        return;
    }
    try {
        publish(p);
    } catch (const std::bad_alloc &) {
        // the figures of before stay
    }
}

static void write_buffers(llama_context * lctx);

void publish_buffers(llama_context * lctx) {
    try {
        write_buffers(lctx);
    } catch (const std::bad_alloc &) {
        // the figures of before stay
    }
}

static void write_buffers(llama_context * lctx) {
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

} // namespace refreekv
