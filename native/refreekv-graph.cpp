#include "refreekv-graph.h"

#include "refreekv-decode.h"
#include "refreekv-kernels.h"
#include "refreekv-heads.h"
#include "refreekv-store.h"

#include "llama-graph.h"
#include "llama-kv-cache-iswa.h"
#include "llama-memory-hybrid.h"
#include "llama-memory-recurrent.h"

#include <algorithm>
#include <map>

// The inputs of a cache with a policy: an llm_graph_input_attn_kv like upstream's, so that build_attn goes on unchanged,
// for each kind of group. Those are no inputs of the graph by themselves; refreekv_graph_input fills them.
//
// A mask and indices per layout (and V indices per row size, when V is transposed), and with them the two index tensors of
// the ring, are all that a policy adds to the inputs. For single tokens layouts that end in the same way share one mask and its
// indices: each input of a graph on a device is a transfer of its own.
class refreekv_graph_input : public llm_graph_input_attn_kv {
public:
    refreekv_graph_input(const llama_hparams & hparams, const llama_cparams & cparams, const llama_kv_cache_context * mctx) :
        llm_graph_input_attn_kv(hparams, cparams, mctx),
        store(refreekv_store::of(mctx)),
        reservation(refreekv_store::is_reservation(mctx)),
        decodes(!reservation && store->evicts()),
        generation(store->generation()) {
    }

    void build(ggml_context * ctx, const llama_ubatch & ubatch);

    void set_input(const llama_ubatch * ubatch) override;
    bool can_reuse(const llm_graph_params & params) override;

    // where this is a part of another input: its part of the memory context
    bool can_reuse(const llama_kv_cache_context * mctx, const llm_graph_params & params);

    llm_graph_input_attn_kv * layer(const refreekv_attn_call & call);

    // whether this is the mask of a layer's first group
    bool is_mask_of(int32_t il, const ggml_tensor * mask) const;

    ggml_tensor * groups(ggml_context * ctx, ggml_tensor * q, ggml_tensor * sinks, int32_t il, const refreekv_attn_mha & mha);

private:
    refreekv_store * store;

    const bool     reservation; // worst case: one layout of n_ctx cells
    const bool     decodes;     // single tokens by our own kernel; the elastic full cache is upstream's bit for bit
    const uint64_t generation;

    struct kind {
        uint32_t i_group; // one of them
        uint32_t layout;
        int64_t  n_v_idxs;
        bool     first;   // of its layout: the others share its mask and K indices
        ggml_backend_buffer_type_t buft; // nullptr: any

        std::unique_ptr<llm_graph_input_attn_kv> inp;
    };
    std::vector<kind> kinds;

    // of the layouts that end in the same way; nullptr: no layouts share anything
    ggml_tensor * tail_mask = nullptr; // of the longest
    ggml_tensor * tail_idxs = nullptr; // of the shortest

    std::map<ggml_backend_buffer_type_t, ggml_tensor *> tail_masks; // where the caches are

    bool is_tail(uint32_t layout) const { return tail_mask && store->tail_of(layout) >= 0; }

    ggml_tensor * tail_mask_for(ggml_context * ctx, uint32_t i_group);

    kind * find(uint32_t i_group);

    uint32_t                  layout_of(uint32_t i_group) const { return reservation ? 0 : store->layout_of(i_group); }
    llm_graph_input_attn_kv & inp_of   (uint32_t i_group) { return *find(i_group)->inp; }

    ggml_tensor * decode(ggml_context * ctx, ggml_tensor * q, ggml_tensor * sinks, uint32_t i_group, int32_t il);

    bool in_groups = false; // inside of groups(): mha gets one of them

    ggml_tensor * ring_src = nullptr; // I32 [n_copy]
    ggml_tensor * ring_dst = nullptr; // I64 [n_copy]
};

static ggml_tensor * refreekv_new_input(ggml_context * ctx, ggml_type type, const char * name, int64_t ne0, int64_t ne1 = 1) {
    ggml_tensor * t = ggml_new_tensor_2d(ctx, type, ne0, ne1);
    ggml_set_input(t);
    ggml_set_name(t, name);
    return t;
}

refreekv_graph_input::kind * refreekv_graph_input::find(uint32_t i_group) {
    for (auto & k : kinds) {
        if (k.layout == layout_of(i_group) && k.n_v_idxs == store->n_v_idxs(i_group) && (!k.buft || k.buft == store->buft_of(i_group))) {
            return &k;
        }
    }
    return nullptr;
}

// the mask of the longest layout where the cache of a group is: copied once to each device, and not once per layout
ggml_tensor * refreekv_graph_input::tail_mask_for(ggml_context * ctx, uint32_t i_group) {
    auto * buft = store->buft_of(i_group);

    if (ggml_backend_buft_is_host(buft)) {
        return tail_mask;
    }

    auto & mask = tail_masks[buft];
    if (!mask) {
        mask = ggml_cont(ctx, tail_mask);
        store->run_with_cache(mask, i_group);
    }
    return mask;
}

void refreekv_graph_input::build(ggml_context * ctx, const llama_ubatch & ubatch) {
    const int64_t n_tokens = ubatch.n_tokens;

    self_k_rot = mctx->build_input_k_rot(ctx);
    self_v_rot = mctx->build_input_v_rot(ctx);

    // flash attention requires an f16 mask
    const auto type_mask = cparams.flash_attn ? GGML_TYPE_F16 : GGML_TYPE_F32;

    if (!reservation && n_tokens == 1 && store->n_layouts() > 1) {
        tail_mask = refreekv_new_input(ctx, type_mask, "attn_inp_kq_mask", store->layout_n_kv(layout_of(store->group_of_longest())), n_tokens);
        tail_idxs = refreekv_new_input(ctx, GGML_TYPE_I64, "attn_inp_k_idxs", n_tokens);
    }
    store->share_idxs(tail_idxs);

    for (uint32_t i = 0; i < store->n_groups(); ++i) {
        const uint32_t layout   = layout_of(i);
        const int64_t  n_v_idxs = store->n_v_idxs(i);

        if (find(i)) {
            continue;
        }

        const auto same = std::find_if(kinds.begin(), kinds.end(), [&](const kind & k) { return k.layout == layout; });

        auto inp = std::make_unique<llm_graph_input_attn_kv>(hparams, cparams, mctx);

        inp->self_k_rot = self_k_rot;
        inp->self_v_rot = self_v_rot;

        if (is_tail(layout)) {
            ggml_tensor * mask = tail_mask_for(ctx, i);

            inp->self_k_idxs  = tail_idxs;
            inp->self_kq_mask = ggml_view_2d(ctx, mask, store->layout_n_kv(layout), n_tokens, mask->nb[1], store->tail_of(layout)*mask->nb[0]);
        } else if (same == kinds.end()) {
            inp->self_k_idxs  = refreekv_new_input(ctx, GGML_TYPE_I64, "attn_inp_k_idxs", n_tokens);
            inp->self_kq_mask = refreekv_new_input(ctx, type_mask, "attn_inp_kq_mask", reservation ? store->worst_n_kv() : store->layout_n_kv(layout), n_tokens);
        } else {
            inp->self_k_idxs  = same->inp->self_k_idxs;
            inp->self_kq_mask = same->inp->self_kq_mask;
        }
        inp->self_kq_mask_cnv = inp->self_kq_mask;

        inp->self_v_idxs = is_tail(layout) && n_v_idxs == 1 ? tail_idxs : refreekv_new_input(ctx, GGML_TYPE_I64, "attn_inp_v_idxs", n_v_idxs*n_tokens);

        kinds.push_back({ i, layout, n_v_idxs, same == kinds.end() && !is_tail(layout), is_tail(layout) ? store->buft_of(i) : nullptr, std::move(inp) });
    }

    if (!store->has_rings()) {
        return;
    }

    const uint32_t n_copy = store->get_ring().n_copy(ubatch);

    // also where every token has its row: ggml's allocator plans a graph anew that has another number of nodes than the last
    ring_src = refreekv_new_input(ctx, GGML_TYPE_I32, "refreekv_ring_src", n_copy);
    ring_dst = refreekv_new_input(ctx, GGML_TYPE_I64, "refreekv_ring_dst", n_copy);
}

void refreekv_graph_input::set_input(const llama_ubatch * ubatch) {
    store->note_batch(*ubatch);

    // as in llama_kv_cache::set_input_kq_mask, for a cache without a window
    const bool causal = cparams.causal_attn || hparams.non_causal_type == LLAMA_NON_CAUSAL_TYPE_SWA_ONLY;

    // tensors that no layer used have no buffer
    if (tail_mask && tail_mask->buffer) {
        store->set_input_mask(tail_mask, store->group_of_longest(), *ubatch, causal);
    }
    if (tail_idxs && tail_idxs->buffer) {
        store->set_input_k_idxs(tail_idxs, store->group_of_shortest(), mctx);
    }

    for (const auto & k : kinds) {
        auto & inp = *k.inp;

        if (inp.self_v_idxs->buffer && inp.self_v_idxs != tail_idxs) {
            store->set_input_v_idxs(inp.self_v_idxs, k.i_group, mctx);
        }
        if (!k.first) {
            continue;
        }
        if (inp.self_k_idxs->buffer) {
            store->set_input_k_idxs(inp.self_k_idxs, k.i_group, mctx);
        }
        if (inp.self_kq_mask->buffer) {
            store->set_input_mask(inp.self_kq_mask, k.i_group, *ubatch, causal);
        }
    }

    if (ring_dst && ring_dst->buffer) {
        store->get_ring().set_input(ring_src, ring_dst, *ubatch);
    }

    if (self_k_rot && self_k_rot->buffer) {
        mctx->set_input_k_rot(self_k_rot);
    }
    if (self_v_rot && self_v_rot->buffer) {
        mctx->set_input_v_rot(self_v_rot);
    }
}

bool refreekv_graph_input::can_reuse(const llm_graph_params & params) {
    return can_reuse(static_cast<const llama_kv_cache_context *>(params.mctx), params);
}

bool refreekv_graph_input::can_reuse(const llama_kv_cache_context * mctx, const llm_graph_params & params) {
    this->mctx = mctx;

    for (auto & k : kinds) {
        k.inp->mctx = mctx;
    }

    if (reservation || refreekv_store::is_reservation(mctx) || generation != store->generation()) {
        return false;
    }

    bool res = true;

    for (const auto & k : kinds) {
        res &= k.inp->self_k_idxs->ne[0]  == params.ubatch.n_tokens;
        res &= k.inp->self_kq_mask->ne[0] == store->layout_n_kv(k.layout);
        res &= k.inp->self_kq_mask->ne[1] == params.ubatch.n_tokens;
    }

    return res;
}

llm_graph_input_attn_kv * refreekv_graph_input::layer(const refreekv_attn_call & call) {
    ggml_tensor * ring = store->ring_of(call.il);
    ggml_tensor * q    = call.q_cur;

    const bool known = call.kq_b == nullptr && ggml_nelements(q) == (int64_t) hparams.n_embd_head_k(call.il)*hparams.n_head(call.il)*q->ne[2];

    store->note_attention(call.il, call.kq_scale, call.sinks, known);

    if (ring && known) {
        q = ggml_is_contiguous(q) ? ggml_reshape_2d(call.ctx, q, ring->ne[0], q->ne[2])
                                  : ggml_cont_2d   (call.ctx, q, ring->ne[0], q->ne[2]);
        q = ggml_get_rows(call.ctx, q, ring_src);

        ggml_build_forward_expand(call.gf, ggml_set_rows(call.ctx, ring, q, ring_dst));
    }

    // upstream stores the first group
    for (uint32_t i : store->groups_of(call.il)) {
        if (i != store->group_of(call.il)) {
            auto & inp = inp_of(i);

            ggml_build_forward_expand(call.gf, store->cpy_k(call.ctx, call.k_cur, inp.self_k_idxs, i, reservation));
            ggml_build_forward_expand(call.gf, store->cpy_v(call.ctx, call.v_cur, inp.self_v_idxs, i, reservation));
        }
    }

    return &inp_of(store->group_of(call.il));
}

bool refreekv_graph_input::is_mask_of(int32_t il, const ggml_tensor * mask) const {
    if (!store->has_layer(il)) {
        return false;
    }
    const uint32_t layout = layout_of(store->group_of(il));

    return std::any_of(kinds.begin(), kinds.end(), [&](const kind & k) { return k.layout == layout && k.inp->self_kq_mask == mask; });
}

// the attention of one group by our own kernel; nullptr: upstream's ops are to do it
ggml_tensor * refreekv_graph_input::decode(ggml_context * ctx, ggml_tensor * q, ggml_tensor * sinks, uint32_t i_group, int32_t il) {
    const auto * softmax = decodes ? store->softmax_of(il) : nullptr;
    if (!softmax) {
        return nullptr;
    }

    const refreekv_decode_call call = {
        q, store->get_k(ctx, i_group, false), store->get_v(ctx, i_group, false), inp_of(i_group).self_kq_mask, sinks, softmax, store->evicted_of(i_group),
    };

    const auto * kernels = refreekv_find_kernels();

    if (!kernels || !kernels->decode_fits(call)) {
        return nullptr;
    }
    std::vector<ggml_tensor *> nodes;
    ggml_tensor * cur = kernels->decode(ctx, call, nodes);

    // pointers to functions are no work for another process: RPC says that it supports every operation
    for (auto * node : nodes) {
        store->run_on_host(node);
    }

    return cur;
}

ggml_tensor * refreekv_graph_input::groups(ggml_context * ctx, ggml_tensor * q, ggml_tensor * sinks, int32_t il, const refreekv_attn_mha & mha) {
    const auto & ids = store->groups_of(il);

    if (in_groups) {
        return nullptr;
    }
    if (ids.size() == 1) {
        return decode(ctx, q, sinks, ids[0], il);
    }
    in_groups = true;

    const int64_t n_gqa = hparams.n_gqa(il);

    std::vector<ggml_tensor *>         parts;
    std::vector<std::vector<uint32_t>> heads;

    for (uint32_t i : ids) {
        heads.push_back(store->heads_of(i));

        ggml_tensor * q_of_group = refreekv_select_heads(ctx, q, heads.back(), n_gqa);
        ggml_tensor * s          = nullptr;
        if (sinks) {
            s = refreekv_select_heads(ctx, ggml_reshape_3d(ctx, sinks, 1, ggml_nelements(sinks), 1), heads.back(), n_gqa);
            s = ggml_reshape_1d(ctx, s, ggml_nelements(s));
        }

        ggml_tensor * own = decode(ctx, q_of_group, s, i, il);

        parts.push_back(own ? own : mha(q_of_group, store->get_k(ctx, i, reservation), store->get_v(ctx, i, reservation), inp_of(i).self_kq_mask, s));
    }

    in_groups = false;

    return refreekv_join_heads(ctx, parts, heads, n_gqa);
}

// iSWA: the windowed layers are upstream's
class refreekv_graph_input_iswa : public llm_graph_input_attn_kv_iswa {
public:
    refreekv_graph_input_iswa(const llm_graph_input_attn_kv_iswa & upstream, std::unique_ptr<refreekv_graph_input> base) :
        llm_graph_input_attn_kv_iswa(upstream), base(std::move(base)) {
        self_k_idxs  = self_v_idxs      = nullptr;
        self_kq_mask = self_kq_mask_cnv = nullptr;
        self_k_rot   = self_v_rot       = nullptr;
    }

    void set_input(const llama_ubatch * ubatch) override {
        base->set_input(ubatch);
        llm_graph_input_attn_kv_iswa::set_input(ubatch);
    }

    bool can_reuse(const llm_graph_params & params) override {
        const bool res = llm_graph_input_attn_kv_iswa::can_reuse(params);

        return base->can_reuse(mctx->get_base(), params) && res;
    }

    const std::unique_ptr<refreekv_graph_input> base;
};

// hybrid: the recurrent layers are upstream's
class refreekv_graph_input_hybrid : public llm_graph_input_mem_hybrid {
public:
    refreekv_graph_input_hybrid(const llama_cparams & cparams, std::unique_ptr<refreekv_graph_input> attn,
            std::unique_ptr<llm_graph_input_rs> inp_rs, const llama_memory_hybrid_context * mctx) :
        llm_graph_input_mem_hybrid(cparams, std::move(attn), std::move(inp_rs), mctx) {
    }

    void set_input(const llama_ubatch * ubatch) override {
        inp_attn->set_input(ubatch);
        inp_rs  ->set_input(ubatch);
    }

    bool can_reuse(const llm_graph_params & params) override {
        mctx = static_cast<const llama_memory_hybrid_context *>(params.mctx);

        const auto * recr = inp_rs->mctx = mctx->get_recr();

        bool res = static_cast<refreekv_graph_input *>(inp_attn.get())->can_reuse(mctx->get_attn(), params);

        // as in llm_graph_input_mem_hybrid::can_reuse
        res &= inp_rs->s_copy->ne[0]       == recr->get_n_rs();
        res &= inp_rs->s_copy_main->ne[0]  == params.ubatch.n_seqs;
        res &= inp_rs->s_copy_extra->ne[0] == recr->get_n_rs() - params.ubatch.n_seqs;
        res &= inp_rs->head                == recr->get_head();
        res &= inp_rs->rs_z                == recr->get_rs_z();

        return res;
    }
};

// nullptr: the cache has no policy
static std::unique_ptr<refreekv_graph_input> refreekv_build_input(
        ggml_context * ctx, const llama_ubatch & ubatch, const llama_hparams & hparams, const llama_cparams & cparams, const llama_kv_cache_context * mctx) {
    refreekv_store::hook_ran(refreekv_store::HOOK_GRAPH);

    if (!refreekv_store::of(mctx)) {
        return nullptr;
    }

    auto inp = std::make_unique<refreekv_graph_input>(hparams, cparams, mctx);
    inp->build(ctx, ubatch);

    return inp;
}

std::unique_ptr<llm_graph_input_attn_kv> refreekv_build_attn_inp_kv(
        ggml_context * ctx, const llama_ubatch & ubatch, const llama_hparams & hparams, const llama_cparams & cparams, const llama_kv_cache_context * mctx) {
    return refreekv_build_input(ctx, ubatch, hparams, cparams, mctx);
}

std::unique_ptr<llm_graph_input_attn_kv_iswa> refreekv_build_attn_inp_kv_iswa(
        ggml_context * ctx, const llama_ubatch & ubatch, const llm_graph_input_attn_kv_iswa & upstream) {
    auto base = refreekv_build_input(ctx, ubatch, upstream.hparams, upstream.cparams, upstream.mctx->get_base());

    return base ? std::make_unique<refreekv_graph_input_iswa>(upstream, std::move(base)) : nullptr;
}

llm_graph_input_attn_kv * refreekv_attn_inp_base(llm_graph_input_attn_kv_iswa * inp) {
    auto * own = dynamic_cast<refreekv_graph_input_iswa *>(inp);

    return own ? own->base.get() : nullptr;
}

std::unique_ptr<llm_graph_input_mem_hybrid> refreekv_build_inp_mem_hybrid(
        ggml_context * ctx, const llama_ubatch & ubatch, const llama_hparams & hparams, const llama_cparams & cparams,
        const llama_memory_hybrid_context * mctx, std::unique_ptr<llm_graph_input_rs> & inp_rs) {
    auto attn = refreekv_build_input(ctx, ubatch, hparams, cparams, mctx->get_attn());

    return attn ? std::make_unique<refreekv_graph_input_hybrid>(cparams, std::move(attn), std::move(inp_rs), mctx) : nullptr;
}

// Per KV head at most one run of it in each of q, k and v (view, concat), and in the join (view, concat, reshape); beside them
// a second attention call, its rows and indices, and the ring.
uint32_t refreekv_graph_extra_nodes(llama_memory_i * mem) {
    const auto * store = refreekv_store::of(mem);

    return store ? 9*store->n_heads_kv() + 64*store->n_layers() : 0;
}

void refreekv_after_reserve(llama_memory_i * mem, ggml_backend_sched_t sched, const std::vector<ggml_backend_t> & backends, std::vector<size_t> & sizes) {
    if (!refreekv_store::of(mem)) {
        return;
    }
    for (size_t i = 0; i < backends.size(); ++i) {
        sizes[i] = ggml_backend_sched_get_buffer_size(sched, backends[i]);
    }
}

static refreekv_graph_input * refreekv_own_input(llm_graph_input_i * inp) {
    if (auto * iswa = dynamic_cast<refreekv_graph_input_iswa *>(inp)) {
        return iswa->base.get();
    }
    if (auto * hybrid = dynamic_cast<refreekv_graph_input_hybrid *>(inp)) {
        return static_cast<refreekv_graph_input *>(hybrid->get_attn());
    }
    return dynamic_cast<refreekv_graph_input *>(inp);
}

ggml_tensor * refreekv_attn_groups(const llm_graph_result & res, ggml_context * ctx, ggml_tensor * q, ggml_tensor * kq_b,
        ggml_tensor * kq_mask, ggml_tensor * sinks, int il, const refreekv_attn_mha & mha) {
    for (const auto & inp : res.inputs) {
        auto * own = refreekv_own_input(inp.get());

        if (own && own->is_mask_of(il, kq_mask)) {
            GGML_ASSERT(kq_b == nullptr);

            return own->groups(ctx, q, sinks, il, mha);
        }
    }

    return nullptr;
}

llm_graph_input_attn_kv * refreekv_attn_layer(llm_graph_input_attn_kv * inp, const refreekv_attn_call & call) {
    refreekv_store::hook_ran(refreekv_store::HOOK_ATTN_LAYER);

    auto * own = dynamic_cast<refreekv_graph_input *>(inp);

    return own ? own->layer(call) : inp;
}
