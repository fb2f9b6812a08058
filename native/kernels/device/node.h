#pragma once

#include "kernels/device/launches.h"

#include "ggml.h"

namespace refreekv { namespace tiles {

// A call as a node of a graph: a custom operation (GGML_OP_CUSTOM), which ggml computes on the CPU by the function that it has, and a
// device that has our kernels by these. Its tensor is the attention, [n_v*n_head, n_tokens] f32, and behind it the scratch. Its sources:
enum source { SRC_Q, SRC_K, SRC_V, SRC_MASK, SRC_CODES_K, SRC_CODES_V, SRC_EXACT, SRC_N_READ, SRC_SINKS };

// what it says of itself, at the end of its op_params
struct node_params {
    uint32_t tag;

    float pre_scale;
    float soft_cap;
    float post_scale;
    float theta;

    int32_t exact_type_k; // enum ggml_type
    int32_t exact_type_v;
};

constexpr uint32_t NODE_TAG = 0x444b4652; // "RFKD"

inline node_params * params_of(ggml_tensor * node) {
    return (node_params *) ((char *) node->op_params + GGML_MAX_OP_PARAMS - sizeof(node_params));
}

// The scratch is for so many tokens at a time
constexpr int64_t SCRATCH_BYTES = 64 << 20;

inline int tokens_at_once(const call & c) {
    const int64_t n = SCRATCH_BYTES/(c.s.scratch_size()*(int64_t) sizeof(float));

    return n < 1 ? 1 : n < c.s.n_tokens ? (int) n : c.s.n_tokens;
}

// of the node's tensor
inline int64_t node_size(const call & c) { return (int64_t) c.s.n_v*c.s.n_head()*c.s.n_tokens + tokens_at_once(c)*c.s.scratch_size(); }

inline bool number_type(int32_t type, number & res) {
    switch (type) {
        case GGML_TYPE_F32:  res = F32;  return true;
        case GGML_TYPE_F16:  res = F16;  return true;
        case GGML_TYPE_BF16: res = BF16; return true;
        case GGML_TYPE_Q8_0: res = Q8_0; return true;
        default:             return false;
    }
}

// bytes that the threads of a team can share on every CUDA device
constexpr int64_t TEAM_BYTES = 48 << 10;

// The call that a node stands for. false: it is another operation, or these kernels cannot compute it
inline bool call_of(const ggml_tensor * node, call & c) {
    const node_params & params = *params_of(const_cast<ggml_tensor *>(node));

    if (node->op != GGML_OP_CUSTOM || params.tag != NODE_TAG) {
        return false;
    }
    const ggml_tensor * q     = node->src[SRC_Q];
    const ggml_tensor * k     = node->src[SRC_K];
    const ggml_tensor * v     = node->src[SRC_V];
    const ggml_tensor * mask  = node->src[SRC_MASK];
    const ggml_tensor * sinks = node->src[SRC_SINKS];

    const bool v_trans = v->nb[1] > v->nb[2];

    c = {};
    c.s.n_tokens  = q->ne[2];
    c.s.n_head_kv = k->ne[1];
    c.s.n_gqa     = q->ne[1]/k->ne[1];
    c.s.n_k       = k->ne[0];
    c.s.n_v       = v->ne[v_trans ? 2 : 0];
    c.s.n_coded   = node->src[SRC_EXACT]->ne[0];
    c.s.n_held    = k->ne[2];

    c.s.pre_scale  = params.pre_scale;
    c.s.soft_cap   = params.soft_cap;
    c.s.post_scale = params.post_scale;
    c.s.theta      = params.theta;

    c.q              = (const float *) q->data;
    c.s.next_head_q  = q->nb[1]/sizeof(float);
    c.s.next_token_q = q->nb[2]/sizeof(float);

    c.mask              = (const uint8_t *) mask->data;
    c.s.next_token_mask = mask->nb[1];
    c.sinks             = sinks ? (const float *) sinks->data : nullptr;
    c.s.has_sinks       = sinks != nullptr;

    c.k             = (const uint8_t *) k->data;
    c.s.k.next_cell = k->nb[2];
    c.s.k.next_head = k->nb[1];

    c.v                = (const uint8_t *) v->data;
    c.s.v.next_cell    = v->nb[v_trans ? 0 : 2];
    c.s.v.next_head    = v->nb[1];
    c.s.v.next_channel = v_trans ? v->nb[2] : 0;

    c.codes_k = (const uint8_t *)  node->src[SRC_CODES_K]->data;
    c.codes_v = (const uint8_t *)  node->src[SRC_CODES_V]->data;
    c.exact   = (const uint64_t *) node->src[SRC_EXACT]->data;
    c.n_read  = (uint64_t *)       node->src[SRC_N_READ]->data;

    c.s.exact_k    = ggml_row_size((ggml_type) params.exact_type_k, c.s.n_k);
    c.s.exact_head = ggml_row_size((ggml_type) params.exact_type_v, c.s.n_v) + c.s.exact_k;

    c.out     = (float *) node->data;
    c.scratch = c.out + (int64_t) c.s.n_v*c.s.n_head()*c.s.n_tokens;

    const auto whole = [](int64_t n, number type) { return n%16 == 0 && (type != Q8_0 || n%32 == 0); };

    return number_type(k->type, c.s.k.type) && number_type(v->type, c.s.v.type) && number_type(mask->type, c.s.mask_type) &&
           number_type(params.exact_type_k, c.s.exact_type_k) && number_type(params.exact_type_v, c.s.exact_type_v) &&
           whole(c.s.n_k, c.s.k.type) && whole(c.s.n_v, c.s.v.type) && whole(c.s.n_k, c.s.exact_type_k) && whole(c.s.n_v, c.s.exact_type_v) &&
           !(v_trans && c.s.v.type == Q8_0) && (c.s.exact_type_v != F32 || c.s.exact_k%4 == 0) &&
           q->type == GGML_TYPE_F32 && q->nb[0] == sizeof(float) && c.s.n_coded%CELLS == 0 && c.s.n_held%CELLS == 0 &&
           team_bytes(c.s) <= TEAM_BYTES;
}

// compute(call) for pieces of a call that its scratch has room for
template <typename F>
void for_pieces(const call & c, F && compute) {
    const int n = tokens_at_once(c);

    for (int t = 0; t < c.s.n_tokens; t += n) {
        compute(c.of_tokens(t, lesser(n, c.s.n_tokens - t)));
    }
}

}} // namespace refreekv::tiles
