#include "cache/store.h"

#include "api/error.h"
#include "api/process.h"
#include "kernels/codes.h"
#include "tiers/cold-store.h"

#include "policies/policy.h"

#include "llama-batch.h"
#include "llama-context.h"
#include "llama-impl.h"
#include "llama-model.h"

#include <algorithm>
#include <stdexcept>

namespace refreekv {

// construction

template <typename Layers>
static bool is_on_host(const Layers & layers) {
    return std::all_of(layers.begin(), layers.end(), [](const auto & l) { return ggml_backend_buft_is_host(ggml_backend_buffer_get_type(l.k->buffer)); });
}

// marks the backend that the tensors are on, as upstream does for hparams.no_alloc
static ggml_backend_buffer_ptr no_storage(ggml_context * ctx, ggml_backend_buffer_type_t buft) {
    ggml_backend_buffer_t buf = ggml_backend_buft_alloc_buffer(buft, 0);

    for (ggml_tensor * t = ggml_get_first_tensor(ctx); t != nullptr; t = ggml_get_next_tensor(ctx, t)) {
        t->buffer = buf;
    }

    return ggml_backend_buffer_ptr { buf };
}

store::store(cache & kv, const refreekv_params & params, bool prunes_read) :
    kv(kv), logical(kv.v_cells, kv.seq_to_stream), params(params), prunes_read(prunes_read),
    layouts(layers, logical, kv.hparams.use_alibi, kv.n_pad), views(kv.hparams, kv.v_trans, layers, logical, layouts),
    ring(params.n_window + 1, kv.n_seq_max),
    pruned(logical.n_seq_ids(), -1), spans(logical.n_seq_ids()), mover(layers, params.by_graph, n_generation),
    cold(params, kv.hparams, is_on_host(kv.layers), logical.size()), warm(kv.hparams, logical, cold, n_generation),
    transfer(logical, layouts, mover, cold, params.cold_limit > 0), evictor(this->params, kv.hparams, logical, layers, spans, ring, layouts, mover, transfer, warm),
    turn(this->params, logical, layers, layouts, cold, evictor, pruned) {
    const auto & hparams = kv.hparams;

    std::map<ggml_backend_buffer_type_t, std::vector<uint32_t>> by_buft;

    for (const auto & layer : kv.layers) {
        if (layer.k->ne[0] == 0) {
            continue; // a layer without attention
        }

        auto * buft = ggml_backend_buffer_get_type(layer.k->buffer);

        by_buft[buft].push_back(layers.size());
        il_to_layer[layer.il] = layers.size();

        if (!layer.v) {
            throw std::runtime_error("refreekv: a cache of keys without values cannot have a KV policy");
        }
        const rows::shape shape = { buft, layer.k->type, layer.v->type, layer.k->ne[0], layer.v->ne[0], kv.v_trans, layouts.padded(logical.size()) };

        layers.emplace_back((int32_t) layer.il, shape, layer.k->buffer);
        layers.back().res.reset(logical.size());
    }
    cold.reset(layers);
    warm.open(params, layers);
    const auto at_most = [&](int32_t & n) { n = std::min<int64_t>(n, logical.size()); };
    at_most(this->params.n_sink);
    at_most(this->params.n_hot);

    if (warm.theta() == 0.0f || params.policy != REFREEKV_POLICY_REFREEKV) {
        this->params.n_hot = 0; // the policy decides
    }
    if (warm.theta() > 0.0f) {
        layouts.set_pad(128); // little is held, and padding is memory
        this->params.n_block = std::min<int32_t>(params.n_block, REFREEKV_CODED_CELLS);
    }
    for (auto & layer : layers) {
        warm.make(layer);
    }

    for (const auto & [buft, ids] : by_buft) {
        if (!policy_looks(params.policy) || this->params.n_hot > 0) {
            break;
        }

        ggml_init_params ip = { ids.size()*ggml_tensor_overhead(), nullptr, true };

        ggml_context_ptr ctx { ggml_init(ip) };

        for (uint32_t i : ids) {
            const int32_t il = layers[i].il;

            layers[i].ring = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F16, (int64_t) hparams.n_embd_head_k(il)*hparams.n_head(il), ring.n_rows());
            ggml_format_name(layers[i].ring, "refreekv_ring_l%d", il);
        }

        ggml_backend_buffer_ptr buf { kv.model.hparams.no_alloc ? no_storage(ctx.get(), buft).release() : ggml_backend_alloc_ctx_tensors_from_buft(ctx.get(), buft) };
        if (!buf) {
            throw std::runtime_error("refreekv: failed to allocate the query rings");
        }
        ggml_backend_buffer_clear(buf.get(), 0);

        ring_bufs.emplace_back(std::move(ctx), std::move(buf));
    }

    update_layouts();
    publish();

    LLAMA_LOG_INFO("refreekv: the cache starts empty and grows with its contents; the sizes logged by llama_kv_cache are those of n_ctx\n");
}

refreekv::store * store::of(llama_memory_t mem) {
    auto * cache = cache::of(mem);

    return cache ? &cache->get_store() : nullptr;
}

bool store::update_layouts() {
    n_generation++;

    return layouts.update(pruned);
}

void store::apply(const slot_info & sinfo, const llama_ubatch & ubatch) {
    hook_ran(HOOK_APPLY);

    release_stale();

    for (auto & layer : layers) {
        logical.for_batch(sinfo, [&](uint32_t cell) { layer.res.assign(cell); });
        GGML_ASSERT(layer.res.n_slots() <= layer.rows.capacity());
    }

    // equal layers that take the same cells stay equal
    if (layouts.is_stale()) {
        update_layouts();
    }

    ring.note(ubatch);
    turn.apply(ubatch);

    n_expected -= std::min(n_expected, ubatch.n_tokens);

    if (prunes_read && ubatch.n_tokens > 1) {
        read.insert(ubatch.seq_id_unq, ubatch.seq_id_unq + ubatch.n_seqs_unq);
    }
}

// graphs

void store::note_attention(uint32_t i_layer, float kq_scale, ggml_tensor * sinks, bool known) {
    auto & layer = layers[i_layer];

    layer.kq_scale = kq_scale;
    layer.sinks    = sinks;
    layer.known    = known;

    const float cap        = kv.hparams.attn_soft_cap ? kv.hparams.f_attn_logit_softcapping : 0.0f;
    const bool  flash_attn = !kv.v_trans;

    // build_attn_mha scales the logits after their cap, flash attention before
    layer.softmax = { cap > 0.0f ? (flash_attn ? kq_scale : 1.0f)/cap : 1.0f, cap, cap > 0.0f && flash_attn ? 1.0f : kq_scale, kv.hparams.f_max_alibi_bias };
}

const decode_softmax * store::softmax_of(uint32_t i_layer) const {
    const auto & layer = layers[i_layer];

    return layer.known ? &layer.softmax : nullptr;
}

void store::run_with_cache(ggml_tensor * node, uint32_t i_layer) const {
    mover.run_on(node, mover.backend_of(layers[i_layer]));
}

void store::run_on_host(ggml_tensor * node) const {
    mover.run_on(node, mover.host_backend());
}

store::~store() = default;

std::map<ggml_backend_buffer_type_t, size_t> store::memory_breakdown() const {
    std::map<ggml_backend_buffer_type_t, size_t> res;

    for (const auto & layer : layers) {
        res[layer.rows.get_shape().buft] += layer.rows.bytes();
    }
    for (const auto & [buft, size] : ring_breakdown()) {
        res[buft] += size;
    }

    return res;
}

std::map<ggml_backend_buffer_type_t, size_t> store::ring_breakdown() const {
    std::map<ggml_backend_buffer_type_t, size_t> res;

    for (const auto & [ctx, buf] : ring_bufs) {
        auto * buft = ggml_backend_buffer_get_type(buf.get());
        res[buft] += kv.model.hparams.no_alloc ? ggml_backend_alloc_ctx_tensors_from_buft_size(ctx.get(), buft) : ggml_backend_buffer_get_size(buf.get());
    }

    return res;
}

const warm_view * store::warm_of(uint32_t i_layer) const {
    return layers[i_layer].warm ? &layers[i_layer].warm->view : nullptr;
}

void store::copy_cold(uint32_t first_src, uint32_t first_dst) {
    for (auto & layer : layers) {
        cold.copy(layer, first_src, first_dst, logical.stream_size());
        warm.copy(layer, first_src, first_dst, logical.stream_size());
    }
}

} // namespace refreekv
