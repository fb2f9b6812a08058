#include "graph/input.h"

#include "api/error.h"
#include "api/process.h"
#include "cache/store.h"
#include "graph/codes.h"
#include "graph/device-node.h"
#include "kernels/decode.h"
#include "kernels/kernels.h"
#include "tiers/warm-cells.h"

#include "llama-cparams.h"
#include "llama-hparams.h"

#include <algorithm>
#include <stdexcept>

namespace refreekv {

static ggml_tensor * new_input(ggml_context * ctx, ggml_type type, const char * name, int64_t ne0, int64_t ne1 = 1) {
    ggml_tensor * t = ggml_new_tensor_2d(ctx, type, ne0, ne1);
    ggml_set_input(t);
    ggml_set_name(t, name);
    return t;
}

[[noreturn]] static void refuse(int il, const char * why) {
    set_error("layer %d: %s cannot have a KV policy", il, why);
    throw std::runtime_error(last_error());
}

static uint32_t n_codes(const warm_cells * codes) { return codes ? codes->n_places() : 0; }

// whether the mask of a kind is that of these codes, too
template <typename Kind>
static bool shares_codes(const Kind & k, const warm_cells * codes) {
    return k.codes == codes || (k.codes && codes && k.codes->alike(*codes));
}

graph_input & graph_input::of(const llm_graph_context & graph, const cache_context & mctx) {
    for (const auto & inp : graph.res->inputs) {
        if (auto * own = dynamic_cast<graph_input *>(inp.get()); own && &own->store == &mctx.get_store()) {
            return *own;
        }
    }
    return *static_cast<graph_input *>(graph.res->add_input(std::make_unique<graph_input>(graph, mctx)));
}

graph_input::graph_input(const llm_graph_context & graph, const cache_context & mctx) :
    store(mctx.get_store()),
    mctx(&mctx),
    reservation(mctx.is_reservation()),
    decodes(!reservation && store.evicts()),
    // as in llama_kv_cache::set_input_kq_mask, for a cache without a window
    causal(graph.cparams.causal_attn || graph.hparams.non_causal_type == LLAMA_NON_CAUSAL_TYPE_SWA_ONLY),
    generation(store.generation()),
    n_tokens(graph.ubatch.n_tokens) {
    ggml_context * ctx = graph.ctx0;

    // flash attention requires an f16 mask
    const auto type_mask = graph.cparams.flash_attn ? GGML_TYPE_F16 : GGML_TYPE_F32;

    bool any_codes = false;
    for (uint32_t i = 0; i < store.n_layers(); ++i) {
        any_codes = any_codes || codes_of(i);
    }

    if (!reservation && n_tokens == 1 && store.get_layouts().n_layouts() > 1 && !any_codes) {
        tail_mask = new_input(ctx, type_mask, "attn_inp_kq_mask", store.get_layouts().n_kv(layout_of(store.get_layouts().layer_of_longest())), n_tokens);
        tail_idxs = new_input(ctx, GGML_TYPE_I64, "attn_inp_k_idxs", n_tokens);
    }

    for (uint32_t i = 0; i < store.n_layers(); ++i) {
        const uint32_t layout   = layout_of(i);
        const int64_t  n_v_idxs = store.get_views().n_v_idxs(i);

        if (find(i)) {
            continue;
        }

        const auto * codes = codes_of(i);
        const auto   same  = std::find_if(kinds.begin(), kinds.end(), [&](const kind & k) { return k.layout == layout && shares_codes(k, codes); });

        kind k = { i, layout, n_v_idxs, codes, same == kinds.end() && !is_tail(layout), is_tail(layout) ? store.buft_of(i) : nullptr, nullptr, nullptr, nullptr };

        if (is_tail(layout)) {
            ggml_tensor * mask = tail_mask_for(ctx, i);

            k.k_idxs = tail_idxs;
            k.mask   = ggml_view_2d(ctx, mask, store.get_layouts().n_kv(layout), n_tokens, mask->nb[1], store.get_layouts().tail_of(layout)*mask->nb[0]);
        } else if (same == kinds.end()) {
            k.k_idxs = new_input(ctx, GGML_TYPE_I64, "attn_inp_k_idxs", n_tokens);
            k.mask   = new_input(ctx, type_mask, "attn_inp_kq_mask", reservation ? store.get_views().worst_n_kv() : n_codes(codes) + store.get_layouts().n_kv(layout), n_tokens);
        } else {
            k.k_idxs = same->k_idxs;
            k.mask   = same->mask;
        }
        k.v_idxs = is_tail(layout) && n_v_idxs == 1 ? tail_idxs : new_input(ctx, GGML_TYPE_I64, "attn_inp_v_idxs", n_v_idxs*n_tokens);

        kinds.push_back(k);
    }

    if (!store.has_rings()) {
        return;
    }

    const uint32_t n_copy = store.get_ring().n_copy(graph.ubatch);

    // also where every token has its row: ggml's allocator plans a graph anew that has another number of nodes than the last
    ring_src = new_input(ctx, GGML_TYPE_I32, "refreekv_ring_src", n_copy);
    ring_dst = new_input(ctx, GGML_TYPE_I64, "refreekv_ring_dst", n_copy);
}

uint32_t graph_input::layout_of(uint32_t i_layer) const {
    return reservation ? 0 : store.layout_of(i_layer);
}

const warm_cells * graph_input::codes_of(uint32_t i_layer) const {
    return reservation ? nullptr : store.codes_of(i_layer);
}

bool graph_input::is_tail(uint32_t layout) const {
    return tail_mask && store.get_layouts().tail_of(layout) >= 0;
}

const graph_input::kind * graph_input::find(uint32_t i_layer) const {
    for (auto & k : kinds) {
        if (k.layout == layout_of(i_layer) && shares_codes(k, codes_of(i_layer)) && k.n_v_idxs == store.get_views().n_v_idxs(i_layer) && (!k.buft || k.buft == store.buft_of(i_layer))) {
            return &k;
        }
    }
    return nullptr;
}

// the mask of the longest layout where the cache of a layer is: copied once to each device, and not once per layout
ggml_tensor * graph_input::tail_mask_for(ggml_context * ctx, uint32_t i_layer) {
    auto * buft = store.buft_of(i_layer);

    if (ggml_backend_buft_is_host(buft)) {
        return tail_mask;
    }

    auto & mask = tail_masks[buft];
    if (!mask) {
        mask = ggml_cont(ctx, tail_mask);
        store.run_with_cache(mask, i_layer);
    }
    return mask;
}

void graph_input::set_input(const llama_ubatch * ubatch) {
    store.begin_batch(*ubatch);

    const auto & slots = mctx->get_slots();

    // tensors that no layer used have no buffer
    if (tail_mask && tail_mask->buffer) {
        store.get_views().set_input_mask(tail_mask, store.get_layouts().layer_of_longest(), *ubatch, causal);
    }
    if (tail_idxs && tail_idxs->buffer) {
        store.get_views().set_input_k_idxs(tail_idxs, store.get_layouts().layer_of_shortest(), slots);
    }

    for (const auto & k : kinds) {
        if (k.v_idxs->buffer && k.v_idxs != tail_idxs) {
            store.get_views().set_input_v_idxs(k.v_idxs, k.i_layer, slots);
        }
        if (!k.first) {
            continue;
        }
        if (k.k_idxs->buffer) {
            store.get_views().set_input_k_idxs(k.k_idxs, k.i_layer, slots);
        }
        if (k.mask->buffer) {
            store.get_views().set_input_mask(k.mask, k.i_layer, *ubatch, causal);
        }
    }

    if (ring_dst && ring_dst->buffer) {
        store.get_ring().set_input(ring_src, ring_dst, *ubatch);
    }
}

bool graph_input::can_reuse(const llm_graph_params & params) {
    mctx = cache_context::of(params.mctx);

    if (reservation || mctx->is_reservation() || generation != store.generation() || n_tokens != params.ubatch.n_tokens) {
        return false;
    }
    return std::all_of(kinds.begin(), kinds.end(), [&](const kind & k) { return k.mask->ne[0] == n_codes(k.codes) + store.get_layouts().n_kv(k.layout); });
}

// From the latent numbers of each head to its own, as at the end of build_attn_mha: [n_v*n_head, n_tokens] -> [n_out*n_head, n_tokens]
static ggml_tensor * decompress(ggml_context * ctx, ggml_tensor * cur, ggml_tensor * v_mla) {
    const int64_t n_tokens = cur->ne[1];
    const int64_t n_head   = cur->ne[0]/v_mla->ne[0];

    cur = ggml_reshape_3d(ctx, cur, v_mla->ne[0], n_head, n_tokens);
    cur = ggml_mul_mat(ctx, v_mla, ggml_permute(ctx, cur, 0, 2, 1, 3));

    return ggml_cont_2d(ctx, ggml_permute(ctx, cur, 0, 2, 1, 3), cur->ne[0]*n_head, n_tokens);
}

ggml_tensor * graph_input::attention(const llm_graph_context & graph, const attention_call & call) {
    if (!store.has_layer(call.il)) {
        refuse(call.il, "attention to the cache of another context");
    }
    if (call.kq_b) {
        refuse(call.il, "attention with a bias");
    }

    const uint32_t i_layer = store.layer_of(call.il);
    const auto &   kind    = kind_of(i_layer);

    if (!store.has_v(i_layer) && (graph.hparams.n_head_kv(call.il) != 1 || call.v_cur->ne[0] != graph.hparams.n_embd_head_v(call.il))) {
        refuse(call.il, "keys without values that are not those of multi-head latent attention");
    }

    ggml_context * ctx  = graph.ctx0;
    ggml_tensor  * ring = store.ring_of(call.il);
    ggml_tensor  * q    = call.q_cur;

    const bool known = ggml_nelements(q) == (int64_t) graph.hparams.n_embd_head_k(call.il)*graph.hparams.n_head(call.il)*q->ne[2];

    if (!store.note_attention(call.il, call.kq_scale, call.sinks, known)) {
        refuse(call.il, "attention to the K and V of another layer, with another scale than that layer's,");
    }

    // K directly behind its RoPE: backends make one operation of both
    if (call.k_cur) {
        ggml_build_forward_expand(graph.gf, store.get_views().cpy_k(ctx, call.k_cur, kind.k_idxs, i_layer, reservation, tail_idxs && kind.k_idxs == tail_idxs));
    }
    if (call.v_cur && store.has_v(i_layer)) {
        // PLM's heads are joined already
        ggml_tensor * v_cur = call.v_cur->ne[2] == q->ne[2] ? call.v_cur : ggml_reshape_3d(ctx, call.v_cur, call.v_cur->ne[0], 1, q->ne[2]);

        ggml_build_forward_expand(graph.gf, store.get_views().cpy_v(ctx, v_cur, kind.v_idxs, i_layer, reservation, tail_idxs && kind.v_idxs == tail_idxs));
    }

    if (ring && known) {
        ggml_tensor * last = ggml_is_contiguous(q) ? ggml_reshape_2d(ctx, q, ring->ne[0], q->ne[2])
                                                   : ggml_cont_2d   (ctx, q, ring->ne[0], q->ne[2]);

        ggml_build_forward_expand(graph.gf, ggml_set_rows(ctx, ring, ggml_get_rows(ctx, last, ring_src), ring_dst));
    }

    const auto finish = [&](ggml_tensor * cur) {
        cur = call.v_mla ? decompress(ctx, cur, call.v_mla) : cur;

        ggml_build_forward_expand(graph.gf, cur);
        return cur;
    };

    if (ggml_tensor * own = kind.codes ? nullptr : decode(ctx, i_layer, call)) {
        return finish(own);
    }
    ggml_tensor * k = store.get_views().get_k(ctx, i_layer, reservation);
    ggml_tensor * v = store.get_views().get_v(ctx, i_layer, reservation);

    if (!kind.codes) {
        return graph.build_attn_mha(q, k, v, nullptr, kind.mask, call.sinks, call.v_mla, 0, call.kq_scale, call.il);
    }
    const auto * softmax = store.softmax_of(call.il);

    if (!softmax) { // to what the layer holds
        ggml_tensor * mask = ggml_view_2d(ctx, kind.mask, kind.mask->ne[0] - n_codes(kind.codes), n_tokens, kind.mask->nb[1], n_codes(kind.codes)*kind.mask->nb[0]);

        return graph.build_attn_mha(q, k, v, nullptr, ggml_cont(ctx, mask), call.sinks, call.v_mla, 0, call.kq_scale, call.il);
    }
    const auto & warm  = *store.codes_of(i_layer);
    const auto & codes = *warm.get_tensors();

    const codes_call by_codes = { q, k, v, kind.mask, call.sinks, *softmax, codes.k(), codes.v() };

    ggml_tensor * node = nullptr;
    ggml_tensor * cur  = codes.for_kernels() ? attend_on_device(ctx, { by_codes, codes.exact(), codes.n_read(), warm.view.theta, warm.view.type_k, warm.view.type_v }, node)
                                             : attend_to_codes(ctx, by_codes);
    store.run_with_cache(node ? node : cur, i_layer);

    return finish(cur);
}

// the attention by our own kernel; nullptr: upstream's ops are to do it
ggml_tensor * graph_input::decode(ggml_context * ctx, uint32_t i_layer, const attention_call & attn) {
    const auto * softmax = decodes ? store.softmax_of(attn.il) : nullptr;
    if (!softmax) {
        return nullptr;
    }

    const decode_call call = {
        attn.q_cur, store.get_views().get_k(ctx, i_layer, false), store.get_views().get_v(ctx, i_layer, false), kind_of(i_layer).mask, attn.sinks, softmax, store.warm_of(i_layer),
    };

    const auto * kernels = find_kernels();

    if (!kernels || !kernels->decode_fits(call)) {
        return nullptr;
    }
    std::vector<ggml_tensor *> nodes;
    ggml_tensor * cur = kernels->decode(ctx, call, nodes);

    // pointers to functions are no work for another process: RPC says that it supports every operation
    for (auto * node : nodes) {
        store.run_on_host(node);
    }

    return cur;
}

// hooks

ggml_tensor * build_attn(const llm_graph_context & graph, const llama_kv_cache_context * mctx, const attention_call & call) {
    hook_ran(HOOK_ATTENTION);

    const auto * own = cache_context::of(mctx);

    return own ? graph_input::of(graph, *own).attention(graph, call) : nullptr;
}

// Views of rows and masks, their indices, the ring, and what our kernel has for upstream's operations: well below 32 a layer.
uint32_t graph_extra_nodes(llama_memory_i * mem) {
    const auto * store = store::of(mem);

    return store ? (32 + (store->has_code_tensors() ? CODES_NODES : 0))*store->n_readers() : 0;
}

void after_reserve(llama_memory_i * mem, ggml_backend_sched_t sched, const std::vector<ggml_backend_t> & backends, std::vector<size_t> & sizes) {
    if (!store::of(mem)) {
        return;
    }
    for (size_t i = 0; i < backends.size(); ++i) {
        sizes[i] = ggml_backend_sched_get_buffer_size(sched, backends[i]);
    }
}

} // namespace refreekv
