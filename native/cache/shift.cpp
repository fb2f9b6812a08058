// The keys of cells whose positions have changed (seq_add, seq_div) are turned by the difference, before the next batch. The counterpart of
// llama_kv_cache::build_graph_shift(), for the rows that each layer holds.

#include "cache/cache.h"

#include "api/error.h"
#include "cache/store.h"

#include "llama-context.h"
#include "llama-model.h"

namespace refreekv {

namespace {

class turn_input : public llm_graph_input_i {
public:
    explicit turn_input(const llama_kv_cache & kv) : kv(kv) {}

    void set_input(const llama_ubatch * /*ubatch*/) override {
        for (const auto & [tensor, shifts] : layers) {
            ggml_backend_tensor_set(tensor, shifts.data(), 0, ggml_nbytes(tensor));
        }
        if (rot && rot->buffer) {
            kv.set_input_k_rot(rot);
        }
    }

    // of each layer: I32 [slots], by how much the position of a slot's cell has changed
    std::vector<std::pair<ggml_tensor *, std::vector<int32_t>>> layers;

    ggml_tensor * rot = nullptr; // of quantised keys; its own inverse

private:
    const llama_kv_cache & kv;
};

} // namespace

ggml_cgraph * cache::build_turn(llm_graph_result * res, llama_context * lctx) const {
    auto *       ctx     = res->get_ctx();
    auto *       gf      = res->get_gf();
    const auto & cparams = lctx->get_cparams();

    auto input = std::make_unique<turn_input>(*this);
    input->rot = build_input_k_rot(ctx);

    for (uint32_t i = 0; i < store->n_layers(); ++i) {
        const auto & layer = store->get_layer(i);
        const auto   il    = layer.il;

        if (!hparams.has_rope(il) || layer.res.n_slots() == 0) {
            continue;
        }

        std::vector<int32_t> shifts(layer.res.n_slots());
        for (uint32_t s = 0; s < shifts.size(); ++s) {
            const int32_t cell = layer.res.cell(s);
            if (cell >= 0) {
                const auto & table = v_cells[cell/get_size()];
                shifts[s] = table.is_empty(cell % get_size()) ? 0 : table.get_shift(cell % get_size());
            }
        }

        ggml_tensor * by = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, shifts.size());
        ggml_set_input(by);

        ggml_tensor * k      = layer.rows.k();
        const auto    n_rot  = hparams.n_rot(il);
        const auto    n_head = hparams.n_embd_head_k(il);
        const auto    n_nope = hparams.n_lora_kv > 0 ? n_head - n_rot : 0;

        ggml_tensor * rotated = ggml_view_3d(ctx, k, n_rot, hparams.n_head_kv(il), shifts.size(),
                ggml_row_size(k->type, n_head), k->nb[1], ggml_row_size(k->type, n_nope));

        ggml_build_forward_expand(gf, build_rope_shift(cparams, ctx, rotated, by, input->rot, model.get_rope_factors(cparams, il),
                model.get_rope_freq_base(cparams, il), model.get_rope_freq_scale(cparams, il), il));

        input->layers.emplace_back(by, std::move(shifts));
    }
    const bool empty = input->layers.empty();

    res->add_input(std::move(input));

    return empty ? nullptr : gf;
}

bool cache::turn_keys(llama_context * lctx) {
    if (!get_has_shift()) {
        return true;
    }
    if (hparams.rope_type != LLAMA_ROPE_TYPE_NONE) {
        auto * sched = lctx->get_sched();
        auto * res   = lctx->get_gf_res_reserve();

        ggml_backend_sched_reset(sched);
        res->reset();

        if (auto * gf = build_turn(res, lctx)) {
            if (!ggml_backend_sched_alloc_graph(sched, gf)) {
                set_error("seq_add: there is no memory for the graph that turns keys; the next batch tries again");
                return false;
            }
            res->set_inputs(nullptr);
            if (lctx->graph_compute(gf, false) != GGML_STATUS_SUCCESS) {
                set_error("seq_add: the graph that turns keys failed; the sequences have to be removed");
                return false;
            }
        }
    }
    for (auto & table : v_cells) {
        table.reset_shift();
    }
    return true;
}

} // namespace refreekv
