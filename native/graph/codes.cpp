#include "graph/codes.h"

#include "tiers/code-tensors.h"

#include "ggml-cpp.h"

#include <algorithm>

namespace refreekv {

static const int64_t SCORES_BYTES = 64 << 20; // of one part of a batch

// Few cells are held. Of quantised ones not every backend multiplies with one head, or turns them round
static ggml_tensor * as_numbers(ggml_context * ctx, ggml_tensor * rows) {
    return ggml_is_quantized(rows->type) ? ggml_cast(ctx, rows, GGML_TYPE_F32) : rows;
}

// [n_kv, n_embd_head, n_head_kv], each line the numbers of a channel
static ggml_tensor * by_channel(ggml_context * ctx, ggml_tensor * v) {
    if (v->nb[1] > v->nb[2]) {
        return ggml_permute(ctx, v, 0, 2, 1, 3); // it is transposed
    }
    v = as_numbers(ctx, v);

    return ggml_cont(ctx, ggml_permute(ctx, v, 1, 2, 0, 3));
}

// the logits of the soft-max, but for their last factor
static ggml_tensor * capped(ggml_context * ctx, ggml_tensor * scores, const decode_softmax & softmax) {
    if (softmax.soft_cap <= 0.0f) {
        return scores;
    }
    return ggml_scale(ctx, ggml_tanh(ctx, ggml_scale(ctx, scores, softmax.pre_scale)), softmax.soft_cap);
}

// of some tokens of the call. v: by_channel()
static ggml_tensor * attend(ggml_context * ctx, const codes_call & call, ggml_tensor * k, ggml_tensor * v, int64_t first, int64_t n_tokens) {
    const int64_t n_embd    = call.q->ne[0];
    const int64_t n_head    = call.q->ne[1];
    const int64_t n_head_kv = call.codes_k->ne[2];
    const int64_t n_codes   = call.codes_k->ne[1];
    const int64_t n_kv      = call.mask->ne[0] - n_codes;
    const int64_t n_lines   = n_tokens*(n_head/n_head_kv); // of the heads that share a KV head: they read its cells once

    ggml_tensor * q = ggml_view_3d(ctx, call.q, n_embd, n_head, n_tokens, call.q->nb[1], call.q->nb[2], first*call.q->nb[2]);

    if (n_tokens > 1 || !ggml_is_contiguous(q)) {
        q = ggml_cont(ctx, ggml_permute(ctx, q, 0, 2, 1, 3));
    }
    q = ggml_reshape_3d(ctx, q, n_embd, n_lines, n_head_kv);

    ggml_tensor * q_padded = n_embd == call.codes_k->ne[0] ? q : ggml_pad(ctx, q, call.codes_k->ne[0] - n_embd, 0, 0, 0);

    ggml_tensor * of_codes = ggml_mul_mat(ctx, call.codes_k, q_padded);
    ggml_tensor * of_kv    = ggml_mul_mat(ctx, ggml_permute(ctx, k, 0, 2, 1, 3), q);

    ggml_prec_set_acc(of_codes, GGML_PREC_F32);
    ggml_prec_set_acc(of_kv,    GGML_PREC_F32);

    ggml_tensor * scores = capped(ctx, ggml_concat(ctx, of_codes, of_kv, 0), call.softmax);

    scores = ggml_reshape_3d(ctx, scores, n_codes + n_kv, n_tokens, n_head);

    ggml_tensor * mask    = ggml_view_2d(ctx, call.mask, call.mask->ne[0], n_tokens, call.mask->nb[1], first*call.mask->nb[1]);
    ggml_tensor * weights = ggml_soft_max_ext(ctx, scores, mask, call.softmax.post_scale, call.softmax.max_bias);
    ggml_soft_max_add_sinks(weights, call.sinks);

    const auto part = [&](int64_t first, int64_t n) {
        const size_t line = weights->nb[1];
        return ggml_view_3d(ctx, weights, n, n_lines, n_head_kv, line, line*n_lines, first*weights->nb[0]);
    };

    ggml_tensor * res = ggml_add(ctx, ggml_mul_mat(ctx, call.codes_v, part(0, n_codes)), ggml_mul_mat(ctx, v, part(n_codes, n_kv)));

    res = ggml_reshape_3d(ctx, res, res->ne[0], n_tokens, n_head);

    return ggml_cont_2d(ctx, ggml_permute(ctx, res, 0, 2, 1, 3), res->ne[0]*n_head, n_tokens);
}

ggml_tensor * attend_to_codes(ggml_context * ctx, const codes_call & call) {
    ggml_tensor * k = as_numbers(ctx, call.k);
    ggml_tensor * v = by_channel(ctx, call.v);

    const int64_t n_tokens = call.q->ne[2];
    const int64_t n_fit    = SCORES_BYTES/(call.mask->ne[0]*call.q->ne[1]*sizeof(float));
    const int64_t n_part   = std::max({ n_fit, (n_tokens + CODES_PARTS - 1)/CODES_PARTS, (int64_t) 1 });

    ggml_tensor * res = nullptr;
    for (int64_t first = 0; first < n_tokens; first += n_part) {
        ggml_tensor * its = attend(ctx, call, k, v, first, std::min(n_part, n_tokens - first));

        res = res ? ggml_concat(ctx, res, its, 1) : its;
    }
    return res;
}

bool device_attends_to_codes(ggml_backend_dev_t device, ggml_type type_v, int64_t n_head, int64_t n_head_kv, int64_t n_k, int64_t n_v, bool soft_cap) {
    static const int64_t N_CELLS = 256;

    ggml_init_params params = { ggml_tensor_overhead()*128 + 2*ggml_graph_overhead(), nullptr, true };
    ggml_context_ptr ctx { ggml_init(params) };

    const code_tensors::pair codes = code_tensors::make_tensors(ctx.get(), type_v, n_head_kv, n_k, n_v, N_CELLS);

    for (int64_t n_tokens : { 1, 32 }) {
        ggml_cgraph * gf = ggml_new_graph(ctx.get());

        ggml_build_forward_expand(gf, attend_to_codes(ctx.get(), {
            ggml_new_tensor_3d(ctx.get(), GGML_TYPE_F32, n_k, n_head, n_tokens),
            ggml_new_tensor_3d(ctx.get(), GGML_TYPE_F16, n_k, n_head_kv, N_CELLS),
            ggml_new_tensor_3d(ctx.get(), GGML_TYPE_F16, n_v, n_head_kv, N_CELLS),
            ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F32, 2*N_CELLS, n_tokens),
            nullptr, { 1.0f, soft_cap ? 1.0f : 0.0f, 1.0f, 0.0f }, codes.k, codes.v,
        }));
        for (int i = 0; i < ggml_graph_n_nodes(gf); ++i) {
            if (!ggml_backend_dev_supports_op(device, ggml_graph_node(gf, i))) {
                return false;
            }
        }
    }
    return true;
}

} // namespace refreekv
