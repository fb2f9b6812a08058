// The part of the C API that looks: statistics, kept cells, queries, keys, attention.

#include "refreekv.h"

#include "api/checks.h"
#include "api/error.h"
#include "cache/figures.h"
#include "cache/store.h"
#include "evict/attention-host.h"
#include "policies/policy.h"

#include "llama-context.h"
#include "llama-ext.h"
#include "llama-model.h"

#include <algorithm>
#include <mutex>
#include <vector>

// the part of a context's memory that is not the store's, or that of upstream's cache, by buffer type
template <typename F>
static void read_buffers(llama_context * ctx, F && f) {
    if (ctx->buffers) {
        std::lock_guard<std::mutex> lock(ctx->buffers->mutex);
        for (const auto & info : ctx->buffers->infos) {
            f(info);
        }
    }
}

static int32_t get_stats(llama_context * ctx, llama_memory_t mem, refreekv_stats * stats, refreekv_layer_info * layers, int32_t n_max) {
    const auto * store = refreekv::store::of(mem);
    if (store) {
        store->get_figures().read([&](const refreekv::figures & f) {
            *stats = f.stats;
            std::copy_n(f.layers.begin(), std::min<int32_t>(n_max, f.layers.size()), layers);
        });
    } else {
        const uint32_t n_tokens = refreekv::full_tokens(mem);

        *stats = refreekv::full_stats(mem, ctx->get_model().hparams, n_tokens);
        for (int32_t i = 0; i < std::min(n_max, stats->n_layer); ++i) {
            layers[i] = refreekv::full_layer(mem, ctx->get_model().hparams, i, n_tokens);
        }
    }

    read_buffers(ctx, [&](const refreekv_buffer_info & info) { stats->bytes_other += info.bytes_context; });
    if (!store) {
        stats->bytes_other -= stats->bytes;
    }

    return stats->n_layer;
}

int32_t refreekv_get_stats(struct llama_context * ctx, struct refreekv_stats * stats, struct refreekv_layer_info * layers, int32_t n_max) {
    auto * mem = refreekv::get_memory(ctx);
    if (!mem) {
        return REFREEKV_ERR_NO_POLICY;
    }
    return refreekv::guard([&]() { return get_stats(ctx, mem, stats, layers, n_max); });
}

int32_t refreekv_get_buffers(struct llama_context * ctx, struct refreekv_buffer_info * infos, int32_t n_max) {
    refreekv::clear_error();

    if (!ctx) {
        refreekv::set_error("there is no context");
        return REFREEKV_ERR_ARGUMENT;
    }

    int32_t n = 0;
    read_buffers(ctx, [&](const refreekv_buffer_info & info) {
        if (n < n_max) {
            infos[n] = info;
        }
        n++;
    });

    if (const auto * store = refreekv::store::of(ctx->get_memory())) {
        store->get_figures().read([&](const refreekv::figures & f) {
            for (const auto & [buft, size] : f.bytes) {
                for (int32_t i = 0; i < std::min(n, n_max); ++i) {
                    if (infos[i].name == ggml_backend_buft_name(buft)) {
                        infos[i].bytes_context += size;
                        break;
                    }
                }
            }
        });
    }

    return n;
}

int32_t refreekv_get_kept(struct llama_context * ctx, llama_seq_id seq_id, int32_t i_layer, llama_pos * pos, int32_t n_max) {
    auto * store = refreekv::get_store(ctx);
    if (!store) {
        return REFREEKV_ERR_NO_POLICY;
    }
    if (!store->valid_seq(seq_id) || !refreekv::check_layer(store->n_layers(), i_layer)) {
        return REFREEKV_ERR_ARGUMENT;
    }

    return refreekv::guard([&]() {
        const auto kept = store->look.kept(seq_id, i_layer);
        std::copy_n(kept.begin(), std::min<int32_t>(n_max, kept.size()), pos);

        return (int32_t) kept.size();
    });
}

// f(inspection) once nothing is being computed; a refreekv_status where there is no such sequence or layer
template <typename F>
static int32_t look_at(llama_context * ctx, llama_seq_id seq_id, int32_t i_layer, F && f) {
    auto * store = refreekv::get_store(ctx);
    if (!store) {
        return REFREEKV_ERR_NO_POLICY;
    }
    if (!refreekv::check_seq(*store, seq_id, ctx) || !refreekv::check_layer(store->n_layers(), i_layer)) {
        return REFREEKV_ERR_ARGUMENT;
    }
    llama_synchronize(ctx);

    return refreekv::guard([&]() { return f(store->look); });
}

int32_t refreekv_read_queries(struct llama_context * ctx, llama_seq_id seq_id, int32_t i_layer, float * out, llama_pos * pos, int32_t n_max) {
    return look_at(ctx, seq_id, i_layer, [&](refreekv::inspection & look) { return look.read_queries(seq_id, i_layer, out, pos, n_max); });
}

int32_t refreekv_read_keys(struct llama_context * ctx, llama_seq_id seq_id, int32_t i_layer, float * out, llama_pos * pos, int32_t n_max) {
    return look_at(ctx, seq_id, i_layer, [&](refreekv::inspection & look) { return look.read_keys(seq_id, i_layer, out, pos, n_max); });
}

int32_t refreekv_read_attention(struct llama_context * ctx, llama_seq_id seq_id, int32_t i_layer, float * out, uint64_t n_max, int32_t * shape) {
    return look_at(ctx, seq_id, i_layer, [&](refreekv::inspection & look) { return look.read_attention(ctx, seq_id, i_layer, out, n_max, shape); });
}

static int32_t select(const refreekv_params * params, const float * attn, int32_t n_head, int32_t n_rows, int32_t n_cells, int32_t i_layer, int32_t n_layer, uint8_t * kept) {
    if (const char * why = refreekv::policy_check(*params)) {
        refreekv::set_error("%s", why);
        return REFREEKV_ERR_ARGUMENT;
    }
    if (n_head < 1 || n_rows < 1 || n_cells < 1) {
        refreekv::set_error("select: n_head, n_rows and n_cells must be positive");
        return REFREEKV_ERR_ARGUMENT;
    }
    if (i_layer < 0 || i_layer >= n_layer) {
        refreekv::set_error("select: i_layer: must be 0 to n_layer - 1");
        return REFREEKV_ERR_ARGUMENT;
    }

    refreekv::attention_host host(attn, n_head, n_rows, n_cells);
    refreekv::selection      sel;

    host.i_layer = i_layer;
    host.n_layer = n_layer;

    const auto * policy = refreekv::policy_find(params->policy);
    if (!policy->select) {
        refreekv::set_error("select: this policy evicts nothing");
        return REFREEKV_ERR_ARGUMENT;
    }
    policy->select(*params, host, {}, sel);

    std::fill_n(kept, n_cells, 0);
    for (uint32_t r = 0; r < sel.n_keep; ++r) {
        kept[sel.order[r]] = 1;
    }

    return sel.n_keep;
}

int32_t refreekv_select(const struct refreekv_params * params, const float * attn, int32_t n_head, int32_t n_rows, int32_t n_cells, int32_t i_layer, int32_t n_layer, uint8_t * kept) {
    refreekv::clear_error();

    return refreekv::guard([&]() { return select(params, attn, n_head, n_rows, n_cells, i_layer, n_layer, kept); });
}
