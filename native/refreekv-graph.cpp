#include "refreekv-graph.h"

#include "refreekv-store.h"

#include "llama-graph.h"
#include "llama-kv-cache.h"

// The inputs of one layout: an llm_graph_input_attn_kv like upstream's, so that build_attn goes on unchanged. It is no
// input of the graph by itself; refreekv_graph_input fills it.
//
// One of these per layout, and with it the two index tensors of the ring, is all that a policy adds to the inputs.
class refreekv_graph_input : public llm_graph_input_attn_kv {
public:
    refreekv_graph_input(const llama_hparams & hparams, const llama_cparams & cparams, const llama_kv_cache_context * mctx) :
        llm_graph_input_attn_kv(hparams, cparams, mctx),
        store(refreekv_store::of(mctx)),
        reservation(refreekv_store::is_reservation(mctx)),
        generation(store->generation()) {
    }

    void build(ggml_context * ctx, const llama_ubatch & ubatch);

    void set_input(const llama_ubatch * ubatch) override;
    bool can_reuse(const llm_graph_params & params) override;

    llm_graph_input_attn_kv * layer(const refreekv_attn_call & call);

private:
    refreekv_store * store;

    const bool     reservation; // worst case: one layout of n_ctx cells
    const uint64_t generation;

    std::vector<std::unique_ptr<llm_graph_input_attn_kv>> layouts;

    ggml_tensor * ring_src = nullptr; // I32 [n_copy], nullptr when every token has its row
    ggml_tensor * ring_dst = nullptr; // I64 [n_copy]
};

static ggml_tensor * refreekv_new_input(ggml_context * ctx, ggml_type type, const char * name, int64_t ne0, int64_t ne1 = 1) {
    ggml_tensor * t = ggml_new_tensor_2d(ctx, type, ne0, ne1);
    ggml_set_input(t);
    ggml_set_name(t, name);
    return t;
}

void refreekv_graph_input::build(ggml_context * ctx, const llama_ubatch & ubatch) {
    const int64_t n_tokens = ubatch.n_tokens;

    self_k_rot = mctx->build_input_k_rot(ctx);
    self_v_rot = mctx->build_input_v_rot(ctx);

    // flash attention requires an f16 mask
    const auto type_mask = cparams.flash_attn ? GGML_TYPE_F16 : GGML_TYPE_F32;

    for (uint32_t l = 0; l < (reservation ? 1 : store->n_layouts()); ++l) {
        auto inp = std::make_unique<llm_graph_input_attn_kv>(hparams, cparams, mctx);

        inp->self_k_rot = self_k_rot;
        inp->self_v_rot = self_v_rot;

        inp->self_k_idxs = refreekv_new_input(ctx, GGML_TYPE_I64, "attn_inp_k_idxs", n_tokens);
        inp->self_v_idxs = refreekv_new_input(ctx, GGML_TYPE_I64, "attn_inp_v_idxs", store->n_v_idxs(n_tokens));

        inp->self_kq_mask = refreekv_new_input(ctx, type_mask, "attn_inp_kq_mask", reservation ? store->worst_n_kv() : store->layout_n_kv(l), n_tokens);
        inp->self_kq_mask_cnv = inp->self_kq_mask;

        layouts.push_back(std::move(inp));
    }

    if (!store->has_rings()) {
        return;
    }

    const uint32_t n_copy = store->get_ring().n_copy(ubatch);

    if (n_copy < ubatch.n_tokens) {
        ring_src = refreekv_new_input(ctx, GGML_TYPE_I32, "refreekv_ring_src", n_copy);
    }
    ring_dst = refreekv_new_input(ctx, GGML_TYPE_I64, "refreekv_ring_dst", n_copy);
}

void refreekv_graph_input::set_input(const llama_ubatch * ubatch) {
    // tensors that no layer used have no buffer
    for (uint32_t l = 0; l < layouts.size(); ++l) {
        auto & inp = *layouts[l];

        if (inp.self_k_idxs->buffer) {
            store->set_input_k_idxs(inp.self_k_idxs, l, mctx);
        }
        if (inp.self_v_idxs->buffer) {
            store->set_input_v_idxs(inp.self_v_idxs, l, mctx);
        }
        if (inp.self_kq_mask->buffer) {
            store->set_input_mask(inp.self_kq_mask, l, *ubatch, cparams.causal_attn);
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
    mctx = static_cast<const llama_kv_cache_context *>(params.mctx);

    for (auto & inp : layouts) {
        inp->mctx = mctx;
    }

    if (reservation || refreekv_store::is_reservation(mctx) || generation != store->generation()) {
        return false;
    }

    bool res = true;

    for (uint32_t l = 0; l < layouts.size(); ++l) {
        const auto & inp = *layouts[l];

        res &= inp.self_k_idxs->ne[0]  == params.ubatch.n_tokens;
        res &= inp.self_kq_mask->ne[0] == store->layout_n_kv(l);
        res &= inp.self_kq_mask->ne[1] == params.ubatch.n_tokens;
    }

    return res;
}

llm_graph_input_attn_kv * refreekv_graph_input::layer(const refreekv_attn_call & call) {
    ggml_tensor * ring = store->ring_of(call.il);
    ggml_tensor * q    = call.q_cur;

    const bool known = ring && call.kq_b == nullptr && ggml_nelements(q) == ring->ne[0]*q->ne[2];

    store->note_attention(call.il, call.kq_scale, call.sinks, known);

    if (known) {
        q = ggml_is_contiguous(q) ? ggml_reshape_2d(call.ctx, q, ring->ne[0], q->ne[2])
                                  : ggml_cont_2d   (call.ctx, q, ring->ne[0], q->ne[2]);
        if (ring_src) {
            q = ggml_get_rows(call.ctx, q, ring_src);
        }
        ggml_build_forward_expand(call.gf, ggml_set_rows(call.ctx, ring, q, ring_dst));
    }

    return layouts[reservation ? 0 : store->layout_of(call.il)].get();
}

std::unique_ptr<llm_graph_input_attn_kv> refreekv_build_attn_inp_kv(
        ggml_context * ctx, const llama_ubatch & ubatch, const llama_hparams & hparams, const llama_cparams & cparams, const llama_kv_cache_context * mctx) {
    refreekv_store::hook_ran(refreekv_store::HOOK_GRAPH);

    if (!refreekv_store::of(mctx)) {
        return nullptr;
    }

    auto inp = std::make_unique<refreekv_graph_input>(hparams, cparams, mctx);
    inp->build(ctx, ubatch);

    return inp;
}

llm_graph_input_attn_kv * refreekv_attn_layer(llm_graph_input_attn_kv * inp, const refreekv_attn_call & call) {
    refreekv_store::hook_ran(refreekv_store::HOOK_ATTN_LAYER);

    auto * own = dynamic_cast<refreekv_graph_input *>(inp);

    return own ? own->layer(call) : inp;
}
