#pragma once

#include "kernels/decode.h"
#include "kernels/lanes.h"

// What the kernels of decoding are made of: rows of K and V, a few at a time, as f32.

#ifdef REFREEKV_LANES

#include <algorithm>
#include <cmath>

namespace refreekv {

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
        to_float(t->type, row, dst + i*n, n);
    }
}

static const int N_SUMS = 8; // that are in registers together, beside what is added to them

// out[i]: the sum of a[i]
static inline void store_sums(float * out, const reg a[N_SUMS]) {
#if defined(__AVX__) && !defined(__AVX512F__)
    reg b[4];
    for (int i = 0; i < 4; ++i) {
        b[i] = __builtin_shufflevector(a[2*i], a[2*i + 1], 0, 2, 8, 10, 4, 6, 12, 14) + __builtin_shufflevector(a[2*i], a[2*i + 1], 1, 3, 9, 11, 5, 7, 13, 15);
    }
    reg c[2];
    for (int i = 0; i < 2; ++i) {
        c[i] = __builtin_shufflevector(b[2*i], b[2*i + 1], 0, 2, 8, 10, 4, 6, 12, 14) + __builtin_shufflevector(b[2*i], b[2*i + 1], 1, 3, 9, 11, 5, 7, 13, 15);
    }
    const reg res = __builtin_shufflevector(c[0], c[1], 0, 1, 2, 3, 8, 9, 10, 11) + __builtin_shufflevector(c[0], c[1], 4, 5, 6, 7, 12, 13, 14, 15);
    store_reg(out, res);
#else
    for (int i = 0; i < N_SUMS; ++i) {
        out[i] = 0.0f;
        for (int j = 0; j < N_REG; ++j) {
            out[i] += a[i][j];
        }
    }
#endif
}

// out[i] = q . rows[i]; n: vectors of N_LANES in q, a constant where the compiler is to unroll
template <int N>
static inline void dot_tile(const float * q, const float * rows, int64_t stride, int64_t n, float * out) {
    n = N ? N : n;

#if defined(__AVX512F__)
    lanes acc[TILE];
    for (int64_t i = 0; i < TILE; ++i) {
        const float * row = rows + i*stride;

        acc[i] = load(q)*load(row);
        for (int64_t d = 1; d < n; ++d) {
            acc[i] += load(q + d*N_LANES)*load(row + d*N_LANES);
        }
    }
    store(out, sums(acc));
#else
    for (int64_t i = 0; i < TILE; i += N_SUMS) {
        reg acc[N_SUMS] = {};
        for (int64_t d = 0; d < n*N_LANES; d += N_REG) {
            const reg x = load_reg(q + d);
            for (int64_t j = 0; j < N_SUMS; ++j) {
                acc[j] += x*load_reg(rows + (i + j)*stride + d);
            }
        }
        store_sums(out + i, acc);
    }
#endif
}

// out += sum over i of w[i]*rows[i]
template <int N>
static inline void add_tile(const float * w, const float * rows, int64_t stride, int64_t n, float * out) {
    const int64_t n_floats = (N ? N : n)*N_LANES;

    // registers at a time
    constexpr int64_t D = N ? (N*N_LANES/N_REG < N_SUMS ? N*N_LANES/N_REG : N_SUMS) : N_LANES/N_REG;

    for (int64_t d0 = 0; d0 < n_floats; d0 += D*N_REG) {
        reg acc[D];
        for (int64_t d = 0; d < D; ++d) {
            acc[d] = load_reg(out + d0 + d*N_REG);
        }
        for (int64_t i = 0; i < TILE; ++i) {
            for (int64_t d = 0; d < D; ++d) {
                acc[d] += w[i]*load_reg(rows + i*stride + d0 + d*N_REG);
            }
        }
        for (int64_t d = 0; d < D; ++d) {
            store_reg(out + d0 + d*N_REG, acc[d]);
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
static inline void weigh(float * s, int64_t n, const float * mask, const decode_softmax & by, float slope, float & top, float & total) {
    reg m = reg {} - INFINITY;
    for (int64_t i = 0; i < n; i += N_REG) {
        reg x = load_reg(s + i)*by.pre_scale;
        if (by.soft_cap > 0.0f) {
            x = tanh(x)*by.soft_cap;
        }
        x = x*by.post_scale + load_reg(mask + i)*slope;
        store_reg(s + i, x);
        m = max(x, m);
    }

    top = -INFINITY;
    for (int i = 0; i < N_REG; ++i) {
        top = std::max(top, m[i]);
    }

    reg t = {};
    for (int64_t i = 0; i < n; i += N_REG) {
        const reg w = top > -INFINITY ? exp_neg(load_reg(s + i) - top) : reg {};
        store_reg(s + i, w);
        t += w;
    }
    total = sum(t);
}

} // namespace refreekv

#endif
