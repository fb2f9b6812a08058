// Built with the instruction sets of ggml's CPU backend (CMakeLists.txt).

#include "refreekv-decode.h"

#include "refreekv-lanes.h"

#ifdef REFREEKV_LANES

#include "ggml-backend.h"

#include <algorithm>
#include <cmath>
#include <new>
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

// the scores of n cells become weights relative to their maximum
static void weigh(float * s, int64_t n, const float * mask, const refreekv_decode_softmax & by, float slope, float & top, float & total) {
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

            weigh(weights + r*CHUNK, CHUNK, masks + r/n_head*CHUNK, by, alibi_slope(by.max_bias, r % n_head, n_head), line[n_v], line[n_v + 1]);

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

typedef uint8_t  codes16 __attribute__((vector_size(N_LANES)));
typedef uint16_t words16 __attribute__((vector_size(2*N_LANES)));

// by these steps, for each of which there is an instruction: GCC takes the numbers one by one else
static inline lanes numbers_of(codes16 codes) {
    return __builtin_convertvector(__builtin_convertvector(__builtin_convertvector(codes, words16), ilanes), lanes);
}

static const int64_t BLOCK = refreekv_sketch::n_cells;

static_assert(BLOCK == 4*N_LANES, "codes are unpacked to four vectors");

// out[i][cell] = base[i] + q[i] . codes of the cell, for N queries; q: [N][n_embd_head], out: [N][BLOCK]
template <int N>
static void dot_codes(const float * q, const float * base, const uint8_t * codes, int64_t n_embd_head, float * out) {
    lanes acc[N][4];
    for (int i = 0; i < N; ++i) {
        for (int v = 0; v < 4; ++v) {
            acc[i][v] = all(base[i]);
        }
    }

    for (int64_t d = 0; d < n_embd_head; ++d) {
        codes16 pair[2];
        memcpy(pair, codes + d*BLOCK/2, sizeof(pair));

        const lanes numbers[4] = { numbers_of(pair[0] & 15), numbers_of(pair[1] & 15), numbers_of(pair[0] >> 4), numbers_of(pair[1] >> 4) };
        for (int i = 0; i < N; ++i) {
            const lanes x = all(q[i*n_embd_head + d]);
            for (int v = 0; v < 4; ++v) {
                acc[i][v] += x*numbers[v];
            }
        }
    }

    for (int i = 0; i < N; ++i) {
        for (int v = 0; v < 4; ++v) {
            store(out + i*BLOCK + v*N_LANES, acc[i][v]);
        }
    }
}

static void dot_codes(const float * q, const float * base, int64_t n, const uint8_t * codes, int64_t n_embd_head, float * out) {
    int64_t i = 0;
    for (; i + 4 <= n; i += 4) {
        dot_codes<4>(q + i*n_embd_head, base + i, codes, n_embd_head, out + i*BLOCK);
    }
    switch (n - i) {
        case 3: dot_codes<3>(q + i*n_embd_head, base + i, codes, n_embd_head, out + i*BLOCK); break;
        case 2: dot_codes<2>(q + i*n_embd_head, base + i, codes, n_embd_head, out + i*BLOCK); break;
        case 1: dot_codes<1>(q + i*n_embd_head, base + i, codes, n_embd_head, out + i*BLOCK); break;
    }
}

static void unpack_channels(const refreekv_sketch::channel * channels, int64_t n, float * least, float * step) {
    for (int64_t d = 0; d < n; d += N_LANES) {
        ggml_fp16_t pairs[2*N_LANES];
        float       f32[2*N_LANES];
        memcpy(pairs, channels + d, sizeof(pairs));
        ggml_cpu_fp16_to_fp32(pairs, f32, 2*N_LANES);

        store(least + d, __builtin_shufflevector(load(f32), load(f32 + N_LANES), 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30));
        store(step  + d, __builtin_shufflevector(load(f32), load(f32 + N_LANES), 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31));
    }
}

// a query times the steps of the channels; its product with the least of them
static float scale_query(const float * q, const float * least, const float * step, int64_t n, float * scaled) {
    lanes base = {};
    for (int64_t d = 0; d < n; d += N_LANES) {
        store(scaled + d, load(q + d)*load(step + d));
        base += load(q + d)*load(least + d);
    }
    return sum(base);
}

// 0 for the cells of the mask's bits, else -infinity
static void mask_of(uint64_t there, float * mask) {
    for (int64_t i = 0; i < BLOCK; ++i) {
        mask[i] = there >> i & 1 ? 0.0f : -INFINITY;
    }
}

// What the sketches say. dst: [n_blocks, rounded up to whole vectors; n_head*n_tokens], the logarithm of the sum of the weights
// that a block's cells have
static void judge_blocks(ggml_tensor * dst, int ith, int nth, void * userdata) {
    const ggml_tensor * q = dst->src[0];

    const auto & evicted = *(const refreekv_decode_evicted *) userdata;
    const auto & sketch  = evicted.sketch;

    const int64_t n_k       = q->ne[0];
    const int64_t n_head    = q->ne[1];
    const int64_t n_tokens  = q->ne[2];
    const int64_t n_head_kv = dst->src[1]->ne[1];
    const int64_t n_gqa     = n_head/n_head_kv;

    thread_local std::vector<float> scratch;

    float * mask   = aligned(scratch, BLOCK + 2*n_k + n_gqa*(n_k + BLOCK + 1));
    float * least  = mask + BLOCK;
    float * step   = least + n_k;
    float * scaled = step + n_k;           // [n_gqa][n_k]
    float * logits = scaled + n_gqa*n_k;   // [n_gqa][BLOCK]
    float * bases  = logits + n_gqa*BLOCK; // [n_gqa]

    const auto line_of = [&](int64_t t, int64_t h) { return (float *) ((char *) dst->data + (t*n_head + h)*dst->nb[1]); };

    for (int64_t b = ith; b < dst->ne[0]; b += nth) {
        const bool there = b < sketch.n_blocks();

        if (there) {
            mask_of(sketch[b].there, mask);
        }

        for (int64_t h_kv = 0; h_kv < n_head_kv; ++h_kv) {
            if (there) {
                unpack_channels(sketch.channels(b) + h_kv*n_k, n_k, least, step);
            }

            for (int64_t t = 0; t < n_tokens; ++t) {
                for (int64_t g = 0; g < n_gqa; ++g) {
                    line_of(t, h_kv*n_gqa + g)[b] = -INFINITY;
                }
            }

            for (int64_t t = 0; there && t < n_tokens; ++t) {
                if (!evicted.sees(t, b)) {
                    continue;
                }

                for (int64_t g = 0; g < n_gqa; ++g) {
                    const float * query = (const float *) ((const char *) q->data + (h_kv*n_gqa + g)*q->nb[1] + t*q->nb[2]);

                    bases[g] = scale_query(query, least, step, n_k, scaled + g*n_k);
                }
                dot_codes(scaled, bases, n_gqa, sketch.codes(b, h_kv*n_k), n_k, logits);

                for (int64_t g = 0; g < n_gqa; ++g) {
                    float top;
                    float total;
                    weigh(logits + g*BLOCK, BLOCK, mask, *evicted.softmax, 1.0f, top, total);

                    line_of(t, h_kv*n_gqa + g)[b] = top + logf(total);
                }
            }
        }
    }
}

// what the sum over all cells that are held, and all blocks as they were judged, is for a line: its logarithm
static float join_sums(const ggml_tensor * parts, const ggml_tensor * judged, const ggml_tensor * sinks, int64_t n_head, int64_t r) {
    const int64_t n_v = parts->ne[0] - N_LANES;

    const auto part = [&](int64_t c) { return (const float *) ((const char *) parts->data + r*parts->nb[1] + c*parts->nb[2]) + n_v; };

    const float * blocks = (const float *) ((const char *) judged->data + r*judged->nb[1]);
    const float   sink   = sinks ? ((const float *) sinks->data)[r % n_head] : -INFINITY;

    float top = sink;
    for (int64_t c = 0; c < parts->ne[2]; ++c) {
        top = std::max(top, part(c)[0]);
    }
    lanes tops = all(top);
    for (int64_t b = 0; b < judged->ne[0]; b += N_LANES) {
        tops = max(tops, load(blocks + b));
    }
    for (int i = 0; i < N_LANES; ++i) {
        top = std::max(top, tops[i]);
    }

    float total = sink > -INFINITY ? expf(sink - top) : 0.0f;
    for (int64_t c = 0; c < parts->ne[2]; ++c) {
        total += part(c)[0] > -INFINITY ? part(c)[1]*expf(part(c)[0] - top) : 0.0f;
    }
    lanes totals = {};
    for (int64_t b = 0; b < judged->ne[0]; b += N_LANES) {
        totals += exp_neg(load(blocks + b) - top);
    }

    return top + logf(total + sum(totals));
}

// Those that count, by their own rows. dst: as of decode_chunks, a block in the place of a chunk
static void read_blocks(ggml_tensor * dst, int ith, int nth, void * userdata) {
    const ggml_tensor * q      = dst->src[0];
    const ggml_tensor * k      = dst->src[1];
    const ggml_tensor * v      = dst->src[2];
    const ggml_tensor * parts  = dst->src[3];
    const ggml_tensor * judged = dst->src[4];
    const ggml_tensor * sinks  = dst->src[5];

    auto & evicted = *(refreekv_decode_evicted *) userdata;

    const int64_t n_head    = q->ne[1];
    const int64_t n_head_kv = k->ne[1];
    const int64_t n_gqa     = n_head/n_head_kv;
    const int64_t n_k       = k->ne[0];
    const int64_t n_v       = dst->ne[0] - N_LANES;
    const int64_t n_lines   = dst->ne[1];
    const int64_t n_rows_k  = n_k*n_head_kv;
    const int64_t n_rows_v  = n_v*n_head_kv;

    const auto dot = dot_tile_of(n_k/N_LANES);
    const auto add = add_tile_of(n_v/N_LANES);

    // kept from token to token
    thread_local std::vector<float>   least; // what counts has more than this
    thread_local std::vector<float>   memory;
    thread_local std::vector<uint8_t> bytes;

    least.resize(n_lines);
    for (int64_t r = 0; r < n_lines; ++r) {
        least[r] = join_sums(parts, judged, sinks, n_head, r) + logf(evicted.tolerance);
    }

    for (int64_t b = ith; b < dst->ne[2]; b += nth) {
        const auto line_of = [&](int64_t r) { return (float *) ((char *) dst->data + r*dst->nb[1] + b*dst->nb[2]); };

        bool counts = false;
        for (int64_t r = 0; r < n_lines; ++r) {
            counts |= ((const float *) ((const char *) judged->data + r*judged->nb[1]))[b] > least[r];
            line_of(r)[n_v] = -INFINITY;
        }
        if (!counts) {
            continue;
        }

        const size_t row_k = ggml_row_size(k->type, n_rows_k);
        const size_t row_v = ggml_row_size(v->type, n_rows_v);

        float * keys = nullptr;
        try {
            bytes.resize(BLOCK*(row_k + row_v));
            if (evicted.read(b, bytes.data(), bytes.data() + BLOCK*row_k)) {
                keys = aligned(memory, BLOCK*(n_rows_k + n_rows_v + 2));
            }
        } catch (const std::bad_alloc &) {
            // nothing may be thrown through ggml's threads
        }
        if (!keys) {
            evicted.n_lost++;
            continue;
        }
        evicted.n_faults++;

        float * values  = keys + BLOCK*n_rows_k;
        float * weights = values + BLOCK*n_rows_v;
        float * mask    = weights + BLOCK;

        const int64_t n = __builtin_popcountll(evicted.sketch[b].there);

        mask_of(~0ull >> (64 - n), mask);
        std::fill(keys, mask, 0.0f);

        for (int64_t i = 0; i < n; ++i) {
            to_float(k, (const char *) bytes.data() + i*row_k, keys + i*n_rows_k, n_rows_k);
            to_float(v, (const char *) bytes.data() + BLOCK*row_k + i*row_v, values + i*n_rows_v, n_rows_v);
        }

        for (int64_t r = 0; r < n_lines; ++r) {
            const int64_t h = r % n_head;
            float *    line = line_of(r);

            if (!evicted.sees(r/n_head, b)) {
                continue;
            }
            std::fill_n(line, n_v, 0.0f);

            const float * query = (const float *) ((const char *) q->data + h*q->nb[1] + r/n_head*q->nb[2]);
            for (int64_t i = 0; i < BLOCK; i += TILE) {
                dot(query, keys + i*n_rows_k + h/n_gqa*n_k, n_rows_k, n_k/N_LANES, weights + i);
            }
            weigh(weights, BLOCK, mask, *evicted.softmax, 1.0f, line[n_v], line[n_v + 1]);

            for (int64_t i = 0; i < BLOCK; i += TILE) {
                add(weights + i, values + i*n_rows_v + h/n_gqa*n_v, n_rows_v, n_v/N_LANES, line);
            }
        }
    }
}

// dst: [n_embd_head_v*n_head, n_tokens]; sources: the parts of the chunks, those of the blocks, the sinks; userdata: not nullptr
// where the second are there
static void join_chunks(ggml_tensor * dst, int ith, int nth, void * userdata) {
    const ggml_tensor * parts  = dst->src[0];
    const ggml_tensor * blocks = userdata ? dst->src[1] : nullptr;
    const ggml_tensor * sinks  = dst->src[userdata ? 2 : 1];

    const int64_t n_v    = parts->ne[0] - N_LANES;
    const int64_t n_head = dst->ne[0]/n_v;

    const int64_t n_chunks = parts->ne[2];
    const int64_t n_all    = n_chunks + (blocks ? blocks->ne[2] : 0);

    for (int64_t r = ith; r < parts->ne[1]; r += nth) {
        const auto line_of = [&](int64_t c) {
            const ggml_tensor * t = c < n_chunks ? parts : blocks;

            return (const float *) ((const char *) t->data + r*t->nb[1] + (c < n_chunks ? c : c - n_chunks)*t->nb[2]);
        };

        const float sink = sinks ? ((const float *) sinks->data)[r % n_head] : -INFINITY;

        float top = sink;
        for (int64_t c = 0; c < n_all; ++c) {
            top = std::max(top, line_of(c)[n_v]);
        }

        float * out   = (float *) dst->data + r*n_v;
        float   total = sinks ? expf(sink - top) : 0.0f;

        std::fill_n(out, n_v, 0.0f);

        for (int64_t c = 0; c < n_all; ++c) {
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

bool refreekv_decode_can_fault(int64_t n_embd_head_k, int64_t n_embd_head_v, ggml_type type_k, ggml_type type_v) {
    return n_embd_head_k % N_LANES == 0 && n_embd_head_v % N_LANES == 0 && has_to_float(type_k) && has_to_float(type_v);
}

ggml_tensor * refreekv_decode(ggml_context * ctx, const refreekv_decode_call & call, std::vector<ggml_tensor *> & nodes) {
    const int64_t n_v      = head_size_v(call.v);
    const int64_t n_head   = call.q->ne[1];
    const int64_t n_tokens = call.q->ne[2];
    const int64_t n_blocks = call.evicted ? call.evicted->sketch.n_blocks() : 0;

    const auto node = [&](int64_t ne0, int64_t ne1, int64_t ne2, std::vector<ggml_tensor *> args, ggml_custom_op_t f, const void * userdata) {
        nodes.push_back(ggml_custom_4d(ctx, GGML_TYPE_F32, ne0, ne1, ne2, 1, args.data(), args.size(), f, GGML_N_TASKS_MAX, const_cast<void *>(userdata)));
        return nodes.back();
    };
    const auto with_sinks = [&](std::vector<ggml_tensor *> args) {
        if (call.sinks) {
            args.push_back(call.sinks);
        }
        return args;
    };

    ggml_tensor * parts = node(n_v + N_LANES, n_head*n_tokens, call.k->ne[2]/CHUNK, { call.q, call.k, call.v, call.mask }, decode_chunks, call.softmax);

    if (n_blocks == 0) {
        return node(n_v*n_head, n_tokens, 1, with_sinks({ parts }), join_chunks, nullptr);
    }

    ggml_tensor * judged = node(GGML_PAD(n_blocks, N_LANES), n_head*n_tokens, 1, { call.q, call.k }, judge_blocks, call.evicted);
    ggml_tensor * blocks = node(n_v + N_LANES, n_head*n_tokens, n_blocks, with_sinks({ call.q, call.k, call.v, parts, judged }), read_blocks, call.evicted);

    return node(n_v*n_head, n_tokens, 1, with_sinks({ parts, blocks }), join_chunks, call.evicted);
}

#else

bool refreekv_decode_fits(const refreekv_decode_call &) {
    return false;
}

bool refreekv_decode_can_fault(int64_t, int64_t, ggml_type, ggml_type) {
    return false;
}

ggml_tensor * refreekv_decode(ggml_context *, const refreekv_decode_call &, std::vector<ggml_tensor *> &) {
    GGML_ABORT("refreekv: no decode kernel in this build");
}

#endif
