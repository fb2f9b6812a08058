#pragma once

#include "refreekv-decode.h"
#include "refreekv-lanes.h"

// What the kernels of decoding are made of: rows of K and V, a few at a time, as f32.

#ifdef REFREEKV_LANES

#include <algorithm>
#include <cmath>

static const int64_t TILE = N_LANES; // rows

static inline void prefetch(const char * p, size_t n) {
    for (size_t i = 0; i < n; i += 64) {
        __builtin_prefetch(p + i);
    }
}

// TILE rows of all heads, one cell each, [TILE][n]
static inline void read_rows(const ggml_tensor * t, int64_t cell, float * dst, int64_t n) {
    const size_t row_bytes = ggml_row_size(t->type, n);

    for (int64_t i = 0; i < TILE; ++i) {
        const char * row = (const char *) t->data + (cell + i)*t->nb[2];

        prefetch(row + TILE*t->nb[2], row_bytes);
        to_float(t, row, dst + i*n, n);
    }
}

// out[i] = q . rows[i]; n: vectors in q, a constant where the compiler is to keep them in registers
template <int N>
static inline void dot_tile(const float * q, const float * rows, int64_t stride, int64_t n, float * out) {
    n = N ? N : n;

    lanes acc[TILE];
    for (int64_t i = 0; i < TILE; ++i) {
        const float * row = rows + i*stride;

        acc[i] = load(q)*load(row);
        for (int64_t d = 1; d < n; ++d) {
            acc[i] += load(q + d*N_LANES)*load(row + d*N_LANES);
        }
    }
    store(out, sums(acc));
}

// out += sum over i of w[i]*rows[i]
template <int N>
static inline void add_tile(const float * w, const float * rows, int64_t stride, int64_t n, float * out) {
    n = N ? N : n;

    for (int64_t d0 = 0; d0 < n; d0 += N ? N : 1) {
        lanes acc[N ? N : 1];
        for (int64_t d = 0; d < (N ? N : 1); ++d) {
            acc[d] = load(out + (d0 + d)*N_LANES);
        }
        for (int64_t i = 0; i < TILE; ++i) {
            for (int64_t d = 0; d < (N ? N : 1); ++d) {
                acc[d] += w[i]*load(rows + i*stride + (d0 + d)*N_LANES);
            }
        }
        for (int64_t d = 0; d < (N ? N : 1); ++d) {
            store(out + (d0 + d)*N_LANES, acc[d]);
        }
    }
}

using tile_fn = void (*)(const float *, const float *, int64_t, int64_t, float *);

static inline tile_fn dot_tile_of(int64_t n) {
    return n == 4 ? dot_tile<4> : n == 8 ? dot_tile<8> : dot_tile<0>;
}

static inline tile_fn add_tile_of(int64_t n) {
    return n == 4 ? add_tile<4> : n == 8 ? add_tile<8> : add_tile<0>;
}

// the scores of n cells become weights relative to their maximum
static inline void weigh(float * s, int64_t n, const float * mask, const refreekv_decode_softmax & by, float slope, float & top, float & total) {
    lanes m = all(-INFINITY);
    for (int64_t i = 0; i < n; i += N_LANES) {
        lanes x = load(s + i)*by.pre_scale;
        if (by.soft_cap > 0.0f) {
            x = tanh(x)*by.soft_cap;
        }
        x = x*by.post_scale + load(mask + i)*slope;
        store(s + i, x);
        m = max(x, m);
    }

    top = -INFINITY;
    for (int i = 0; i < N_LANES; ++i) {
        top = std::max(top, m[i]);
    }

    lanes t = {};
    for (int64_t i = 0; i < n; i += N_LANES) {
        const lanes w = top > -INFINITY ? exp_neg(load(s + i) - top) : lanes {};
        store(s + i, w);
        t += w;
    }
    total = sum(t);
}

#endif
