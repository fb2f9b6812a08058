#pragma once

#include "kernels/decode.h"
#include "kernels/lanes.h"

// The attention of decoding to the cells that are held.

#ifdef REFREEKV_LANES

namespace refreekv {

static const int64_t CHUNK = 128; // cells; what one thread takes at a time

static inline bool is_trans(const ggml_tensor * v) {
    return v->nb[1] > v->nb[2];
}

static inline int64_t head_size_v(const ggml_tensor * v) {
    return v->ne[is_trans(v) ? 2 : 0];
}

// Sizes, read from the source tensors q, k and v
struct shape {
    int64_t n_head;
    int64_t n_head_kv;
    int64_t n_gqa;
    int64_t n_k; // of a head
    int64_t n_v;
    int64_t n_part; // floats of a part: a weighted sum of V, then what its weights are relative to, and their sum
    int64_t n_chunks;

    shape() = default;
    shape(const ggml_tensor * q, const ggml_tensor * k, const ggml_tensor * v) :
        n_head(q->ne[1]), n_head_kv(k->ne[1]), n_gqa(n_head/n_head_kv), n_k(k->ne[0]), n_v(head_size_v(v)), n_part(n_v + N_LANES), n_chunks(k->ne[2]/CHUNK) {
    }
};

static inline const float * query_of(const ggml_tensor * q, int64_t t, int64_t h) {
    return (const float *) ((const char *) q->data + h*q->nb[1] + t*q->nb[2]);
}

// Parts of tokens t0 .. t0 + n_tokens - 1 of a chunk of cells that are held: [n_tokens][n_head][n_part]; after each weighted sum of V the
// maximum of the scores and the sum of the weights
void attend_chunk(const ggml_tensor * dst, const decode_softmax & by, int64_t chunk, int64_t t0, int64_t n_tokens, float * out);

} // namespace refreekv

#endif
