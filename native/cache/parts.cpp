#include "cache/parts.h"

#include "api/error.h"
#include "kernels/codes.h"
#include "policies/policy.h"

#include "llama-batch.h"
#include "llama-impl.h"
#include "llama-model.h"

#include <algorithm>
#include <cinttypes>
#include <stdexcept>

namespace refreekv {

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

parts::parts(cache & kv, const refreekv_params & params) :
    kv(kv), model(kv.model), hparams(kv.hparams), v_trans(kv.v_trans), n_stream(kv.n_stream), logical(kv.v_cells, kv.seq_to_stream), params(params),
    layouts(layers, logical, kv.hparams.use_alibi, kv.n_pad),
    ring(params.n_window + 1, kv.n_seq_max),
    pruned(logical.n_seq_ids(), -1), exact(logical.n_seq_ids(), 0), loaded(logical.n_seq_ids(), 0), spans(logical.n_seq_ids()), mover(layers, params.by_graph, n_generation),
    cold(params, kv.hparams, is_on_host(kv.layers), logical.size()), warm(kv.hparams, logical, mover, cold, n_generation),
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

        // multi-head latent attention: V is the beginning of K
        const ggml_type type_v   = layer.v ? layer.v->type : layer.k->type;
        const int64_t   n_embd_v = layer.v ? layer.v->ne[0] : 0;

        const rows::shape shape = { buft, layer.k->type, type_v, layer.k->ne[0], n_embd_v, layer.v && kv.v_trans, layouts.padded(logical.size()) };

        layers.emplace_back((int32_t) layer.il, shape, layer.k->buffer);
        layers.back().res.reset(logical.size());
    }
    add_readers();
    cold.reset(layers);
    warm.open(params, layers);
    if (auto * buft = warm.shared_memory()) {
        cold.share_by(buft, [this]() { mover.synchronize(); });
    }
    const auto at_most = [&](int32_t & n) { n = std::min<int64_t>(n, logical.size()); };
    at_most(this->params.n_sink);
    at_most(this->params.n_hot);

    if (!warm.exists() || params.policy != REFREEKV_POLICY_REFREEKV) {
        this->params.n_hot = 0; // the policy decides
    }
    if (warm.exists()) {
        // little is held, and padding is memory. Flash attention on devices wants upstream's
        layouts.set_pad(warm.has_tensors() ? 256 : 128);

        // where layers hold different cells they are to stay equal modulo the padding
        if (!warm.has_tensors() || this->params.n_hot > 0) {
            this->params.n_block = std::min<int32_t>(params.n_block, REFREEKV_CODED_CELLS);
        }
    }
    for (auto & layer : layers) {
        warm.make(layer);
    }

    for (const auto & [buft, ids] : by_buft) {
        if (!policy_find(params.policy)->needs_attention || this->params.n_hot > 0) {
            break;
        }

        size_t n_readers = 0;
        for (uint32_t i : ids) {
            n_readers += layers[i].readers.size();
        }
        ggml_init_params ip = { n_readers*ggml_tensor_overhead(), nullptr, true };

        ggml_context_ptr ctx { ggml_init(ip) };

        for (uint32_t i : ids) {
            for (auto & r : layers[i].readers) {
                r.ring = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F16, (int64_t) hparams.n_embd_head_k(r.il)*hparams.n_head(r.il), ring.n_rows());
                ggml_format_name(r.ring, "refreekv_ring_l%d", r.il);
            }
        }

        ggml_backend_buffer_ptr buf { kv.model.hparams.no_alloc ? no_storage(ctx.get(), buft).release() : ggml_backend_alloc_ctx_tensors_from_buft(ctx.get(), buft) };
        if (!buf) {
            throw std::runtime_error("refreekv: failed to allocate the query rings");
        }
        ggml_backend_buffer_clear(buf.get(), 0);

        ring_bufs.emplace_back(std::move(ctx), std::move(buf));
    }

    update_layouts();
}

// which layers of the model attend to the cells of each layer
void parts::add_readers() {
    std::map<int32_t, uint32_t> owners;
    for (uint32_t i = 0; i < layers.size(); ++i) {
        owners [layers[i].il] = i;
        readers[layers[i].il] = { i, 0 };
    }
    for (int32_t il = 0; il < (int32_t) hparams.n_layer_all; ++il) {
        const auto it = kv.map_layer_ids.find(il);
        if (it == kv.map_layer_ids.end() || readers.count(il) > 0) {
            continue;
        }
        const auto owner = owners.find(kv.layers[it->second].il);
        if (owner != owners.end()) {
            auto & its = layers[owner->second].readers;

            readers[il] = { owner->second, (uint32_t) its.size() };
            its.push_back({ il });
        }
    }
}

bool parts::update_layouts() {
    n_generation++;

    return layouts.update(pruned);
}

// slots of cells that upstream has emptied
void parts::release_stale() {
    if (!stale_slots) {
        return;
    }
    for (auto & layer : layers) {
        if (layer.res.release([&](uint32_t cell) { return logical.is_empty(cell); })) {
            layouts.make_stale();
        }
    }
    if (cold.any()) {
        std::vector<uint32_t> empty;
        for (uint32_t cell = 0; cell < logical.size(); ++cell) {
            if (logical.is_empty(cell)) {
                empty.push_back(cell);
            }
        }
        for (auto & layer : layers) {
            cold.forget(layer, empty);
        }
    }
    warm.refresh(layers);
    stale_slots = false;
}

// a sequence that has no cells any more
void parts::forget_seq(llama_seq_id seq_id) {
    pruned[seq_id] = -1;
    exact [seq_id] = 0;
    loaded[seq_id] = 0;
    spans [seq_id].clear();
    ring.forget(seq_id);
    turn.forget(seq_id);
}

void parts::note_exact(const llama_ubatch & ubatch) {
    for (uint32_t i = 0; i < ubatch.n_tokens && ubatch.token; ++i) {
        for (int32_t j = 0; j < ubatch.n_seq_id[i]; ++j) {
            const llama_seq_id s = ubatch.seq_id[i][j];

            exact[s] += pruned[s] < 0 && ubatch.pos[i] == (llama_pos) exact[s];
        }
    }
}

// bytes: of rows
bool parts::within_limit(uint64_t bytes) const {
    for (const auto & layer : layers) {
        bytes += layer.warm ? layer.warm->bytes() : 0;
    }
    if (params.memory_limit == 0 || bytes <= params.memory_limit) {
        return true;
    }
    set_error("the KV cache would grow to %" PRIu64 " bytes; the limit is %" PRIu64, bytes, params.memory_limit);

    return false;
}

void parts::copy_cold(uint32_t first_src, uint32_t first_dst) {
    for (auto & layer : layers) {
        cold.copy(layer, first_src, first_dst, logical.stream_size());
        warm.copy(layer, first_src, first_dst, logical.stream_size());
    }
}

std::map<ggml_backend_buffer_type_t, size_t> parts::memory_breakdown() const {
    std::map<ggml_backend_buffer_type_t, size_t> res;

    for (const auto & layer : layers) {
        res[layer.rows.get_shape().buft] += layer.rows.bytes();
        if (layer.warm && layer.warm->get_tensors()) {
            res[layer.warm->get_tensors()->buffer_type()] += layer.warm->get_tensors()->bytes();
        }
    }
    for (const auto & [buft, size] : ring_breakdown()) {
        res[buft] += size;
    }

    return res;
}

std::map<ggml_backend_buffer_type_t, size_t> parts::ring_breakdown() const {
    std::map<ggml_backend_buffer_type_t, size_t> res;

    for (const auto & [ctx, buf] : ring_bufs) {
        auto * buft = ggml_backend_buffer_get_type(buf.get());
        res[buft] += kv.model.hparams.no_alloc ? ggml_backend_alloc_ctx_tensors_from_buft_size(ctx.get(), buft) : ggml_backend_buffer_get_size(buf.get());
    }

    return res;
}

size_t parts::bytes() const {
    size_t res = 0;
    for (const auto & layer : layers) {
        res += layer.rows.bytes();
    }
    return res;
}

bool parts::valid_seq(llama_seq_id seq_id) const {
    return seq_id >= 0 && (size_t) seq_id < pruned.size();
}

bool parts::has_room_for_codes() {
    const bool any = std::any_of(layers.begin(), layers.end(), [](const auto & layer) { return layer.warm && layer.warm->n_blocks() > 0; });

    uint64_t bytes = 0;
    for (auto & layer : layers) {
        bytes += std::min<uint64_t>(layer.rows.bytes(), layer.rows.bytes_for(layouts.padded(layer.res.n_used())));
    }
    return !any || within_limit(bytes);
}

bool parts::make_room(layer & layer, uint32_t n) {
    const uint32_t n_need = layouts.padded(layer.res.n_slots_after(n));

    if (n_need <= layer.rows.capacity()) {
        return true;
    }
    if (!within_limit(bytes() + layer.rows.bytes_for(n_need) - layer.rows.bytes())) {
        return false;
    }
    if (!mover.move(layer, layer.all_slots(), n_need)) {
        set_error("no memory for %u cells in layer %d", n_need, layer.il);
        return false;
    }
    return true;
}

} // namespace refreekv
