#include "graph/codes.h"

#include "tiers/code-tensors.h"

namespace refreekv {

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

ggml_tensor * attend_to_codes(ggml_context * ctx, const codes_call & call) {
    const int64_t n_embd    = call.q->ne[0];
    const int64_t n_head    = call.q->ne[1];
    const int64_t n_tokens  = call.q->ne[2];
    const int64_t n_head_kv = call.codes.k()->ne[2];
    const int64_t n_codes   = call.codes.k()->ne[1];
    const int64_t n_kv      = call.mask->ne[0] - n_codes;
    const int64_t n_lines   = n_tokens*(n_head/n_head_kv); // of the heads that share a KV head: they read its cells once

    ggml_tensor * q = n_tokens == 1 && ggml_is_contiguous(call.q) ? call.q : ggml_cont(ctx, ggml_permute(ctx, call.q, 0, 2, 1, 3));
    q = ggml_reshape_3d(ctx, q, n_embd, n_lines, n_head_kv);

    ggml_tensor * q_padded = n_embd == call.codes.k()->ne[0] ? q : ggml_pad(ctx, q, call.codes.k()->ne[0] - n_embd, 0, 0, 0);

    ggml_tensor * of_codes = ggml_mul_mat(ctx, call.codes.k(), q_padded);
    ggml_tensor * of_kv    = ggml_mul_mat(ctx, ggml_permute(ctx, as_numbers(ctx, call.k), 0, 2, 1, 3), q);

    ggml_prec_set_acc(of_codes, GGML_PREC_F32);
    ggml_prec_set_acc(of_kv,    GGML_PREC_F32);

    ggml_tensor * scores = capped(ctx, ggml_concat(ctx, of_codes, of_kv, 0), call.softmax);

    scores = ggml_reshape_3d(ctx, scores, n_codes + n_kv, n_tokens, n_head);

    ggml_tensor * weights = ggml_soft_max_ext(ctx, scores, call.mask, call.softmax.post_scale, call.softmax.max_bias);
    ggml_soft_max_add_sinks(weights, call.sinks);

    const auto part = [&](int64_t first, int64_t n) {
        const size_t line = weights->nb[1];
        return ggml_view_3d(ctx, weights, n, n_lines, n_head_kv, line, line*n_lines, first*weights->nb[0]);
    };

    ggml_tensor * res = ggml_add(ctx, ggml_mul_mat(ctx, call.codes.v(), part(0, n_codes)), ggml_mul_mat(ctx, by_channel(ctx, call.v), part(n_codes, n_kv)));

    res = ggml_reshape_3d(ctx, res, res->ne[0], n_tokens, n_head);

    return ggml_cont_2d(ctx, ggml_permute(ctx, res, 0, 2, 1, 3), res->ne[0]*n_head, n_tokens);
}

} // namespace refreekv
