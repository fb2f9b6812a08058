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
#include <atomic>
#include <limits>
#include <numeric>
#include <stdexcept>

// construction

template <typename Layers>
static bool refreekv_is_on_host(const Layers & layers) {
    return std::all_of(layers.begin(), layers.end(), [](const auto & l) { return ggml_backend_buft_is_host(ggml_backend_buffer_get_type(l.k->buffer)); });
}

// marks the backend that the tensors are on, as upstream does for hparams.no_alloc
static ggml_backend_buffer_ptr refreekv_no_storage(ggml_context * ctx, ggml_backend_buffer_type_t buft) {
    ggml_backend_buffer_t buf = ggml_backend_buft_alloc_buffer(buft, 0);

    for (ggml_tensor * t = ggml_get_first_tensor(ctx); t != nullptr; t = ggml_get_next_tensor(ctx, t)) {
        t->buffer = buf;
    }

    return ggml_backend_buffer_ptr { buf };
}

refreekv_store::refreekv_store(refreekv::cache & kv, const refreekv_params & params, bool prunes_read) :
    kv(kv), logical(kv.v_cells, kv.seq_to_stream), params(params), prunes_read(prunes_read),
    layouts(groups, logical, kv.hparams.use_alibi, kv.n_pad), views(kv.hparams, kv.v_trans, groups, logical, layouts),
    ring(params.n_window + 1, kv.n_seq_max),
    pruned(logical.n_seq_ids(), -1), coded_at(logical.n_seq_ids(), -1), spans(logical.n_seq_ids()), mover(groups, params.by_graph, n_generation),
    cold(params, kv.hparams, refreekv_is_on_host(kv.layers), logical.size()), warm(kv.hparams, logical, cold, n_generation),
    transfer(logical, layouts, mover, cold, params.cold_limit > 0), evictor(this->params, kv.hparams, logical, layers, spans, ring, layouts, mover, transfer, warm) {
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
        layers.push_back({ (int32_t) layer.il, { buft, layer.k->type, layer.v->type, layer.k->ne[0], layer.v->ne[0], kv.v_trans, layouts.padded(logical.size()) }, {}, layer.k->buffer });
    }

    warm.open(params, layers);
    if (warm.theta() == 0.0f || params.policy != REFREEKV_POLICY_REFREEKV) {
        this->params.n_hot = 0; // the policy decides
    }
    if (warm.theta() > 0.0f) {
        layouts.set_pad(128); // little is held, and padding is memory
        this->params.n_block = std::min<int32_t>(params.n_block, REFREEKV_CODED_CELLS);
    }
    make_groups({});

    for (const auto & [buft, ids] : by_buft) {
        if (!refreekv_policy_looks(params.policy) || this->params.n_hot > 0) {
            break;
        }

        ggml_init_params ip = { ids.size()*ggml_tensor_overhead(), nullptr, true };

        ggml_context_ptr ctx { ggml_init(ip) };

        for (uint32_t i : ids) {
            const int32_t il = layers[i].il;

            layers[i].ring = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F16, (int64_t) hparams.n_embd_head_k(il)*hparams.n_head(il), ring.n_rows());
            ggml_format_name(layers[i].ring, "refreekv_ring_l%d", il);
        }

        ggml_backend_buffer_ptr buf { kv.model.hparams.no_alloc ? refreekv_no_storage(ctx.get(), buft).release() : ggml_backend_alloc_ctx_tensors_from_buft(ctx.get(), buft) };
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

refreekv_store * refreekv_store::of(llama_memory_t mem) {
    auto * cache = refreekv::cache::of(mem);

    return cache ? &cache->get_store() : nullptr;
}

// the heads of a layer that policies may evict from, and those that are kept whole; either may be missing
std::vector<refreekv_store::part> refreekv_store::divide(const layer & layer, const heads_list & whole) const {
    std::vector<part> res { { {}, false }, { {}, true } };
    for (uint32_t h = 0; h < kv.hparams.n_head_kv(layer.il); ++h) {
        res[std::find(whole.begin(), whole.end(), std::make_pair(layer.il, h)) != whole.end()].heads.push_back(h);
    }

    // where heads cannot be separated (the slope of ALiBi depends on their number; they may be no whole number of blocks
    // of the cache's type), the layer stays whole
    const bool separable = !kv.hparams.use_alibi &&
                           kv.hparams.n_embd_head_k(layer.il) % ggml_blck_size(layer.shape.type_k) == 0 &&
                           kv.hparams.n_embd_head_v(layer.il) % ggml_blck_size(layer.shape.type_v) == 0;
    if (!separable && !res[1].heads.empty()) {
        res[0].heads.clear();
        res[1].heads.resize(kv.hparams.n_head_kv(layer.il));
        std::iota(res[1].heads.begin(), res[1].heads.end(), 0);
    }

    res.erase(std::remove_if(res.begin(), res.end(), [](const part & p) { return p.heads.empty(); }), res.end());

    return res;
}

refreekv_rows::shape refreekv_store::shape_of(const layer & layer, const std::vector<uint32_t> & heads) const {
    refreekv_rows::shape res = layer.shape;
    if (heads.size() < kv.hparams.n_head_kv(layer.il)) {
        res.n_embd_k = heads.size()*kv.hparams.n_embd_head_k(layer.il);
        res.n_embd_v = heads.size()*kv.hparams.n_embd_head_v(layer.il);
    }
    return res;
}

// drops what the groups hold
void refreekv_store::make_groups(const heads_list & whole) {
    groups.clear();
    views.forget();

    for (uint32_t i_layer = 0; i_layer < layers.size(); ++i_layer) {
        auto & layer = layers[i_layer];

        layer.groups.clear();

        for (auto & p : divide(layer, whole)) {
            const auto shape = shape_of(layer, p.heads);

            layer.groups.push_back(groups.size());
            groups.push_back({ layer.il, i_layer, std::move(p.heads), p.whole, 0, {}, refreekv_rows(shape, layer.il), layer.no_memory, 0, {}, {}, nullptr });
            groups.back().res.reset(logical.size());
        }
    }
    cold.reset(groups);
    for (auto & g : groups) {
        warm.make(g, layers[g.i_layer]);
    }

    layouts.make_stale();
    regrouped     = true;
    n_generation++;
}

uint32_t refreekv_store::n_heads_kv() const {
    uint32_t res = 0;
    for (const auto & layer : layers) {
        res += kv.hparams.n_head_kv(layer.il);
    }
    return res;
}

bool refreekv_store::holds_nothing() const {
    return std::all_of(groups.begin(), groups.end(), [](const group & g) { return g.res.n_used() == 0; });
}

bool refreekv_store::valid_heads(const heads_list & heads) const {
    for (const auto & [il, h] : heads) {
        if (il_to_layer.find(il) == il_to_layer.end() || h >= kv.hparams.n_head_kv(il)) {
            refreekv_set_error("whole heads: layer %d has no KV head %u", il, h);
            return false;
        }
    }
    return true;
}

refreekv_store::heads_list refreekv_store::whole_heads() const {
    heads_list res;
    for (const auto & g : groups) {
        for (uint32_t h : g.heads) {
            if (g.whole) {
                res.emplace_back(g.il, h);
            }
        }
    }
    return res;
}

int64_t refreekv_store::set_whole_heads(llama_context * lctx, const heads_list & heads) {
    if (!valid_heads(heads)) {
        return REFREEKV_ERR_ARGUMENT;
    }
    return run_job(lctx, [this, heads]() -> int64_t {
        if (!holds_nothing()) {
            refreekv_set_error("whole heads: only an empty cache can be divided; clear it first");
            return REFREEKV_ERR_STATE;
        }
        make_groups(heads);
        update_layouts();

        return REFREEKV_OK;
    });
}

bool refreekv_store::update_layouts() {
    n_generation++;

    return layouts.update(pruned);
}

void refreekv_store::apply(const slot_info & sinfo, const llama_ubatch & ubatch) {
    refreekv::hook_ran(refreekv::HOOK_APPLY);

    release_stale();

    for (auto & g : groups) {
        logical.for_batch(sinfo, [&](uint32_t cell) { g.res.assign(cell); });
        GGML_ASSERT(g.res.n_slots() <= g.rows.capacity());
    }

    // equal groups that take the same cells stay equal
    if (layouts.is_stale()) {
        update_layouts();
    }

    ring.note(ubatch);

    n_expected -= std::min(n_expected, ubatch.n_tokens);

    if (prunes_read && ubatch.n_tokens > 1) {
        read.insert(ubatch.seq_id_unq, ubatch.seq_id_unq + ubatch.n_seqs_unq);
    }
}

// graphs

void refreekv_store::note_attention(int32_t il, float kq_scale, ggml_tensor * sinks, bool known) {
    auto & layer = layers[il_to_layer.at(il)];

    layer.kq_scale = kq_scale;
    layer.sinks    = sinks;
    layer.known    = known;

    const float cap        = kv.hparams.attn_soft_cap ? kv.hparams.f_attn_logit_softcapping : 0.0f;
    const bool  flash_attn = !kv.v_trans;

    // build_attn_mha scales the logits after their cap, flash attention before
    layer.softmax = { cap > 0.0f ? (flash_attn ? kq_scale : 1.0f)/cap : 1.0f, cap, cap > 0.0f && flash_attn ? 1.0f : kq_scale, kv.hparams.f_max_alibi_bias };
}

const refreekv_decode_softmax * refreekv_store::softmax_of(int32_t il) const {
    const auto & layer = layers[il_to_layer.at(il)];

    return layer.known ? &layer.softmax : nullptr;
}

void refreekv_store::run_with_cache(ggml_tensor * node, uint32_t i_group) const {
    mover.run_on(node, mover.backend_of(groups[i_group]));
}

void refreekv_store::run_on_host(ggml_tensor * node) const {
    mover.run_on(node, mover.host_backend());
}

refreekv_store::~refreekv_store() = default;

std::map<ggml_backend_buffer_type_t, size_t> refreekv_store::memory_breakdown() const {
    std::map<ggml_backend_buffer_type_t, size_t> res;

    for (const auto & g : groups) {
        res[g.rows.get_shape().buft] += g.rows.bytes();
    }
    for (const auto & [buft, size] : ring_breakdown()) {
        res[buft] += size;
    }

    return res;
}

std::map<ggml_backend_buffer_type_t, size_t> refreekv_store::ring_breakdown() const {
    std::map<ggml_backend_buffer_type_t, size_t> res;

    for (const auto & [ctx, buf] : ring_bufs) {
        auto * buft = ggml_backend_buffer_get_type(buf.get());
        res[buft] += kv.model.hparams.no_alloc ? ggml_backend_alloc_ctx_tensors_from_buft_size(ctx.get(), buft) : ggml_backend_buffer_get_size(buf.get());
    }

    return res;
}

const refreekv_warm_view * refreekv_store::warm_of(uint32_t i_group) const {
    const auto & g = groups[i_group];

    return g.warm ? &g.warm->view : nullptr;
}

void refreekv_store::copy_cold(uint32_t first_src, uint32_t first_dst) {
    for (auto & g : groups) {
        cold.copy(g, first_src, first_dst, logical.stream_size());
        warm.copy(g, first_src, first_dst, logical.stream_size());
    }
}
