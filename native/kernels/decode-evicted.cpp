// Part of ggml's CPU backend (CMakeLists.txt).

#include "kernels/decode-evicted.h"

#include "kernels/tiles.h"

#ifdef REFREEKV_LANES

#include <algorithm>
#include <cmath>
#include <cstring>
#include <new>
#include <vector>

typedef uint8_t  codes16 __attribute__((vector_size(N_LANES)));
typedef uint16_t words16 __attribute__((vector_size(2*N_LANES)));

static const int N_PARTS = N_LANES/N_REG; // registers in N_LANES numbers

// by these steps, for each of which there is an instruction: GCC takes the numbers one by one else
static inline void numbers_of(codes16 codes, reg numbers[N_PARTS]) {
    const words16 words = __builtin_convertvector(codes, words16);
#if defined(__AVX__) && !defined(__AVX512F__)
    typedef uint16_t words8 __attribute__((vector_size(16)));
    typedef int32_t  ints8  __attribute__((vector_size(32)));

    const words8 halves[2] = { __builtin_shufflevector(words, words, 0, 1, 2, 3, 4, 5, 6, 7), __builtin_shufflevector(words, words, 8, 9, 10, 11, 12, 13, 14, 15) };
    for (int i = 0; i < 2; ++i) {
        numbers[i] = __builtin_convertvector(__builtin_convertvector(halves[i], ints8), reg);
    }
#else
    const lanes all = __builtin_convertvector(__builtin_convertvector(words, ilanes), lanes);
    memcpy(numbers, &all, sizeof(all));
#endif
}

static const int64_t BLOCK = refreekv_sketch::n_cells;

static_assert(BLOCK == 4*N_LANES, "codes are unpacked to four times N_LANES numbers");

// quarters of a block whose sums are in registers together
#if defined(__AVX512F__)
static const int QUARTERS = 4;
#else
static const int QUARTERS = 1;
#endif

// out[i][cell] = base[i] + q[i] . codes of the cell, for N queries; q: [N][n_embd_head], out: [N][BLOCK]
template <int N>
static void dot_codes(const float * q, const float * base, const uint8_t * codes, int64_t n_embd_head, float * out) {
    for (int v0 = 0; v0 < 4; v0 += QUARTERS) {
        reg acc[N][QUARTERS][N_PARTS];
        for (int i = 0; i < N; ++i) {
            for (int v = 0; v < QUARTERS; ++v) {
                for (int p = 0; p < N_PARTS; ++p) {
                    acc[i][v][p] = reg {} + base[i];
                }
            }
        }

        for (int64_t d = 0; d < n_embd_head; ++d) {
            reg numbers[QUARTERS][N_PARTS];
            for (int v = 0; v < QUARTERS; ++v) {
                codes16 pair;
                memcpy(&pair, codes + d*BLOCK/2 + (v0 + v)%2*N_LANES, sizeof(pair));

                numbers_of(v0 + v < 2 ? pair & 15 : pair >> 4, numbers[v]);
            }
            for (int i = 0; i < N; ++i) {
                const float x = q[i*n_embd_head + d];
                for (int v = 0; v < QUARTERS; ++v) {
                    for (int p = 0; p < N_PARTS; ++p) {
                        acc[i][v][p] += x*numbers[v][p];
                    }
                }
            }
        }

        for (int i = 0; i < N; ++i) {
            for (int v = 0; v < QUARTERS; ++v) {
                for (int p = 0; p < N_PARTS; ++p) {
                    store_reg(out + i*BLOCK + (v0 + v)*N_LANES + p*N_REG, acc[i][v][p]);
                }
            }
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

void refreekv_judge_blocks(ggml_tensor * dst, int ith, int nth, void * userdata) {
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

void refreekv_choose_blocks(ggml_tensor * dst, int ith, int nth, void * userdata) {
    const ggml_tensor * parts  = dst->src[0];
    const ggml_tensor * judged = dst->src[1];
    const ggml_tensor * sinks  = dst->src[2];

    const auto & evicted = *(const refreekv_decode_evicted *) userdata;

    const int64_t n_v      = parts->ne[0] - N_LANES;
    const int64_t n_lines  = dst->ne[1];
    const int64_t n_blocks = judged->ne[0];

    thread_local std::vector<float> heap; // kept from token to token

    for (int64_t r = ith; r < n_lines; r += nth) {
        const auto part = [&](int64_t c) { return (const float *) ((const char *) parts->data + r*parts->nb[1] + c*parts->nb[2]) + n_v; };

        const float * blocks = (const float *) ((const char *) judged->data + r*judged->nb[1]);
        const float   sink   = sinks ? ((const float *) sinks->data)[r % sinks->ne[0]] : -INFINITY;

        float top = std::max(sink, *std::max_element(blocks, blocks + n_blocks));
        for (int64_t c = 0; c < parts->ne[2]; ++c) {
            top = std::max(top, part(c)[0]);
        }

        float held = sink > -INFINITY ? expf(sink - top) : 0.0f;
        for (int64_t c = 0; c < parts->ne[2]; ++c) {
            held += part(c)[0] > -INFINITY ? part(c)[1]*expf(part(c)[0] - top) : 0.0f;
        }
        lanes weights = {};
        for (int64_t b = 0; b < n_blocks; b += N_LANES) {
            weights += exp_neg(load(blocks + b) - top);
        }

        float gone  = sum(weights);
        float least = INFINITY;

        const float limit = evicted.tolerance*(held + gone);

        if (gone > limit) {
            heap.assign(blocks, blocks + n_blocks);
            std::make_heap(heap.begin(), heap.end());

            while (gone > limit && !heap.empty() && heap.front() > -INFINITY) {
                std::pop_heap(heap.begin(), heap.end());
                least = heap.back();
                heap.pop_back();
                gone -= expf(least - top);
            }
        }

        *(float *) ((char *) dst->data + r*dst->nb[1]) = least;
    }
}

void refreekv_read_blocks(ggml_tensor * dst, int ith, int nth, void * userdata) {
    const ggml_tensor * q      = dst->src[0];
    const ggml_tensor * k      = dst->src[1];
    const ggml_tensor * v      = dst->src[2];
    const ggml_tensor * judged = dst->src[3];
    const ggml_tensor * least  = dst->src[4];

    auto & evicted = *(refreekv_decode_evicted *) userdata;

    const int64_t n_head    = q->ne[1];
    const int64_t n_head_kv = k->ne[1];
    const int64_t n_gqa     = n_head/n_head_kv;
    const int64_t n_k       = k->ne[0];
    const int64_t n_v       = dst->ne[0] - N_LANES;
    const int64_t n_lines   = dst->ne[1];

    const size_t row_k = evicted.row_k;
    const size_t row_v = evicted.row_v;

    const auto dot = dot_tile_of(n_k/N_LANES);
    const auto add = add_tile_of(n_v/N_LANES);

    const auto takes = [&](int64_t r, int64_t b) {
        return ((const float *) ((const char *) judged->data + r*judged->nb[1]))[b] >= *(const float *) ((const char *) least->data + r*least->nb[1]);
    };

    // kept from token to token
    thread_local std::vector<float>   memory;
    thread_local std::vector<uint8_t> bytes;

    int64_t n_taken = 0;

    for (int64_t b = 0; b < dst->ne[2]; ++b) {
        const auto line_of = [&](int64_t r) { return (float *) ((char *) dst->data + r*dst->nb[1] + b*dst->nb[2]); };

        bool taken = false;
        for (int64_t r = 0; r < n_lines && !taken; ++r) {
            taken = takes(r, b);
        }

        // those that are taken are the work
        if ((taken ? n_taken++ : b) % nth != ith) {
            continue;
        }
        for (int64_t r = 0; r < n_lines; ++r) {
            line_of(r)[n_v] = -INFINITY;
        }
        if (!taken) {
            continue;
        }

        float * keys = nullptr;
        try {
            bytes.resize(BLOCK*(row_k + row_v));
            if (evicted.read(b, bytes.data(), bytes.data() + BLOCK*row_k)) {
                keys = aligned(memory, BLOCK*(n_k + n_v + 2));
            }
        } catch (const std::bad_alloc &) {
            // nothing may be thrown through ggml's threads
        }
        if (!keys) {
            evicted.n_lost++;
            continue;
        }
        evicted.n_faults++;

        float * values  = keys + BLOCK*n_k;   // [BLOCK][n_v] of one KV head
        float * weights = values + BLOCK*n_v;
        float * mask    = weights + BLOCK;

        const int64_t n = __builtin_popcountll(evicted.sketch[b].there);

        mask_of(~0ull >> (64 - n), mask);
        std::fill(keys + n*n_k, values, 0.0f);
        std::fill(values + n*n_v, weights, 0.0f);

        for (int64_t h_kv = 0; h_kv < n_head_kv; ++h_kv) {
            bool converted = false;

            for (int64_t r = 0; r < n_lines; ++r) {
                const int64_t h = r % n_head;

                if (h/n_gqa != h_kv || !takes(r, b)) {
                    continue;
                }
                if (!converted) {
                    for (int64_t i = 0; i < n; ++i) {
                        to_float(k, (const char *) bytes.data() + i*row_k + ggml_row_size(k->type, h_kv*n_k), keys + i*n_k, n_k);
                        to_float(v, (const char *) bytes.data() + BLOCK*row_k + i*row_v + ggml_row_size(v->type, h_kv*n_v), values + i*n_v, n_v);
                    }
                    converted = true;
                }

                const float * query = (const float *) ((const char *) q->data + h*q->nb[1] + r/n_head*q->nb[2]);
                float *       line  = line_of(r);

                for (int64_t i = 0; i < BLOCK; i += TILE) {
                    dot(query, keys + i*n_k, n_k, n_k/N_LANES, weights + i);
                }
                weigh(weights, BLOCK, mask, *evicted.softmax, 1.0f, line[n_v], line[n_v + 1]);

                std::fill_n(line, n_v, 0.0f);
                for (int64_t i = 0; i < BLOCK; i += TILE) {
                    add(weights + i, values + i*n_v, n_v, n_v/N_LANES, line);
                }
            }
        }
    }
}

#endif
