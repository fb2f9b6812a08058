// Built with the instruction sets of ggml's CPU backend (CMakeLists.txt).

#include "refreekv-decode.h"

#include "refreekv-lanes.h"

#ifdef REFREEKV_LANES

#include "ggml-backend.h"

#include <algorithm>
#include <cmath>
#include <vector>

static const int64_t CHUNK      = 128; // cells; what one thread takes at a time
static const int64_t TILE       = N_LANES; // rows that are converted at a time
static const int64_t MAX_TOKENS = 4;

static inline void prefetch(const char * p, size_t n) {
    for (size_t i = 0; i < n; i += 64) {
        __builtin_prefetch(p + i);
    }
}

// TILE rows of all heads, one cell each, [TILE][n]
static void read_rows(const ggml_tensor * t, int64_t cell, float * dst, int64_t n) {
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

static tile_fn dot_tile_of(int64_t n) {
    return n == 4 ? dot_tile<4> : n == 8 ? dot_tile<8> : dot_tile<0>;
}

static tile_fn add_tile_of(int64_t n) {
    return n == 4 ? add_tile<4> : n == 8 ? add_tile<8> : add_tile<0>;
}

static bool is_trans(const ggml_tensor * v) {
    return v->nb[1] > v->nb[2];
}

static int64_t head_size_v(const ggml_tensor * v) {
    return v->ne[is_trans(v) ? 2 : 0];
}

// the scores of a chunk become weights relative to their maximum
static void weigh(float * s, const float * mask, const refreekv_decode_softmax & by, float slope, float & top, float & total) {
    lanes m = all(-INFINITY);
    for (int64_t i = 0; i < CHUNK; i += N_LANES) {
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
    for (int64_t i = 0; i < CHUNK; i += N_LANES) {
        const lanes w = top > -INFINITY ? exp_neg(load(s + i) - top) : lanes {};
        store(s + i, w);
        t += w;
    }
    total = sum(t);
}

// dst: [n_embd_head_v + N_LANES, n_head*n_tokens, n_chunks]; after each weighted sum of V the maximum of the scores and the
// sum of the weights
static void decode_chunks(ggml_tensor * dst, int ith, int nth, void * userdata) {
    const ggml_tensor * q    = dst->src[0];
    const ggml_tensor * k    = dst->src[1];
    const ggml_tensor * v    = dst->src[2];
    const ggml_tensor * mask = dst->src[3];

    const auto & by = *(const refreekv_decode_softmax *) userdata;

    const bool v_trans = is_trans(v);

    const int64_t n_head    = q->ne[1];
    const int64_t n_tokens  = q->ne[2];
    const int64_t n_head_kv = k->ne[1];
    const int64_t n_gqa     = n_head/n_head_kv;
    const int64_t n_k       = k->ne[0];
    const int64_t n_v       = dst->ne[0] - N_LANES;
    const int64_t n_rows_k  = n_k*n_head_kv;
    const int64_t n_rows_v  = n_v*n_head_kv;

    const auto dot = dot_tile_of(n_k/N_LANES);
    const auto add = add_tile_of(n_v/N_LANES);

    thread_local std::vector<float> scratch;

    const int64_t n_tile = TILE*std::max({ n_rows_k, n_rows_v, CHUNK });

    float * tile    = aligned(scratch, n_tile + (n_head*n_tokens + n_tokens)*CHUNK);
    float * weights = tile + n_tile;                   // [n_tokens][n_head][CHUNK]
    float * masks   = weights + n_head*n_tokens*CHUNK; // [n_tokens][CHUNK]

    for (int64_t chunk = ith; chunk < dst->ne[2]; chunk += nth) {
        const int64_t cell = chunk*CHUNK;

        float * out = (float *) ((char *) dst->data + chunk*dst->nb[2]); // [n_tokens][n_head][n_v + N_LANES]

        for (int64_t c = 0; c < CHUNK; c += TILE) {
            read_rows(k, cell + c, tile, n_rows_k);

            for (int64_t t = 0; t < n_tokens; ++t) {
                for (int64_t h = 0; h < n_head; ++h) {
                    const float * query = (const float *) ((const char *) q->data + h*q->nb[1] + t*q->nb[2]);

                    dot(query, tile + h/n_gqa*n_k, n_rows_k, n_k/N_LANES, weights + (t*n_head + h)*CHUNK + c);
                }
            }
        }

        for (int64_t t = 0; t < n_tokens; ++t) {
            to_float(mask, (const char *) mask->data + t*mask->nb[1] + ggml_row_size(mask->type, cell), masks + t*CHUNK, CHUNK);
        }

        for (int64_t r = 0; r < n_head*n_tokens; ++r) {
            float * line = out + r*dst->ne[0];

            weigh(weights + r*CHUNK, masks + r/n_head*CHUNK, by, alibi_slope(by.max_bias, r % n_head, n_head), line[n_v], line[n_v + 1]);

            std::fill_n(line, n_v, 0.0f);
        }

        if (!v_trans) {
            for (int64_t c = 0; c < CHUNK; c += TILE) {
                read_rows(v, cell + c, tile, n_rows_v);

                for (int64_t r = 0; r < n_head*n_tokens; ++r) {
                    add(weights + r*CHUNK + c, tile + r % n_head/n_gqa*n_v, n_rows_v, n_v/N_LANES, out + r*dst->ne[0]);
                }
            }
            continue;
        }

        // lines of V are channels: [CHUNK] cells of TILE of them at a time
        for (int64_t line = 0; line < n_rows_v; line += TILE) {
            for (int64_t i = 0; i < TILE; ++i) {
                const char * src = (const char *) v->data + (line + i)*v->nb[2] + ggml_row_size(v->type, cell);

                prefetch(src + TILE*v->nb[2], ggml_row_size(v->type, CHUNK));
                to_float(v, src, tile + i*CHUNK, CHUNK);
            }
            for (int64_t t = 0; t < n_tokens; ++t) {
                for (int64_t g = 0; g < n_gqa; ++g) {
                    const int64_t r = t*n_head + line/n_v*n_gqa + g;

                    dot_tile<CHUNK/N_LANES>(weights + r*CHUNK, tile, CHUNK, 0, out + r*dst->ne[0] + line % n_v);
                }
            }
        }
    }
}

// dst: [n_embd_head_v*n_head, n_tokens]
static void join_chunks(ggml_tensor * dst, int ith, int nth, void *) {
    const ggml_tensor * parts = dst->src[0];
    const ggml_tensor * sinks = dst->src[1];

    const int64_t n_v    = parts->ne[0] - N_LANES;
    const int64_t n_head = dst->ne[0]/n_v;

    for (int64_t r = ith; r < parts->ne[1]; r += nth) {
        const auto line_of = [&](int64_t chunk) {
            return (const float *) ((const char *) parts->data + r*parts->nb[1] + chunk*parts->nb[2]);
        };

        const float sink = sinks ? ((const float *) sinks->data)[r % n_head] : -INFINITY;

        float top = sink;
        for (int64_t c = 0; c < parts->ne[2]; ++c) {
            top = std::max(top, line_of(c)[n_v]);
        }

        float * out   = (float *) dst->data + r*n_v;
        float   total = sinks ? expf(sink - top) : 0.0f;

        std::fill_n(out, n_v, 0.0f);

        for (int64_t c = 0; c < parts->ne[2]; ++c) {
            const float * line = line_of(c);

            if (line[n_v] == -INFINITY) {
                continue; // nothing that this token may see
            }
            const float w = expf(line[n_v] - top);

            total += w*line[n_v + 1];
            for (int64_t d = 0; d < n_v; d += N_LANES) {
                store(out + d, load(out + d) + w*load(line + d));
            }
        }
        for (int64_t d = 0; total > 0.0f && d < n_v; d += N_LANES) {
            store(out + d, load(out + d)/total);
        }
    }
}

bool refreekv_decode_fits(const refreekv_decode_call & call) {
    const ggml_tensor * q = call.q;
    const ggml_tensor * k = call.k;
    const ggml_tensor * v = call.v;

    return q->type == GGML_TYPE_F32 && q->nb[0] == sizeof(float) && q->ne[2] <= MAX_TOKENS && q->ne[3] == 1 &&
           in_host_memory(k) && in_host_memory(v) && has_to_float(k->type) && has_to_float(v->type) &&
           (!call.sinks || (call.sinks->type == GGML_TYPE_F32 && ggml_is_contiguous(call.sinks))) &&
           k->ne[2] % CHUNK == 0 && k->ne[0] % N_LANES == 0 && head_size_v(v) % N_LANES == 0;
}

ggml_tensor * refreekv_decode(ggml_context * ctx, const refreekv_decode_call & call) {
    ggml_tensor * args[] = { call.q, call.k, call.v, call.mask };

    const int64_t n_v      = head_size_v(call.v);
    const int64_t n_head   = call.q->ne[1];
    const int64_t n_tokens = call.q->ne[2];

    ggml_tensor * parts = ggml_custom_4d(ctx, GGML_TYPE_F32, n_v + N_LANES, n_head*n_tokens, call.k->ne[2]/CHUNK, 1,
            args, 4, decode_chunks, GGML_N_TASKS_MAX, const_cast<refreekv_decode_softmax *>(call.softmax));

    ggml_tensor * join_args[] = { parts, call.sinks };

    return ggml_custom_4d(ctx, GGML_TYPE_F32, n_v*n_head, n_tokens, 1, 1, join_args, call.sinks ? 2 : 1, join_chunks, GGML_N_TASKS_MAX, nullptr);
}

#else

bool refreekv_decode_fits(const refreekv_decode_call &) {
    return false;
}

ggml_tensor * refreekv_decode(ggml_context *, const refreekv_decode_call &) {
    GGML_ABORT("refreekv: no decode kernel in this build");
}

#endif
