#include "kernels/warm.h"

#include "kernels/codes.h"

#include "kernels/decode.h"
#include "kernels/tiles.h"

#ifdef REFREEKV_LANES

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

namespace refreekv {

static const int64_t CELLS = REFREEKV_CODED_CELLS;

// A block that gets less than this of a line's attention adds nothing to it
static const float NOTHING = 1e-5f;

// what rounding takes of max_error
static const float MARGIN = 0.99f;

static const uint8_t * codes_k(const warm_view & warm, int64_t block, int64_t h_kv) {
    return warm.blocks_k[block] + h_kv*warm.next_head_k;
}

static const uint8_t * codes_v(const warm_view & warm, int64_t block, int64_t h_kv) {
    return warm.blocks_v[block] + h_kv*warm.next_head_v;
}

// Codes come from memory once for each token: a block is asked for while the blocks before it are worked on
static const int64_t AHEAD = 2;

static inline void prefetch_far(const uint8_t * p, size_t n) {
    for (size_t i = 0; i < n; i += 64) {
        __builtin_prefetch(p + i, 0, 2); // not into the first level, which is small
    }
}

static inline reg finished(reg x, const decode_softmax & by) {
    x *= by.pre_scale;
    if (by.soft_cap > 0.0f) {
        x = tanh(x)*by.soft_cap;
    }
    return x*by.post_scale;
}

// how far each logit of a block can be from the exact one, at most: half a step of each channel of K, and what dot_codes() rounds. The
// softmax's scales are part of it; a soft-cap makes differences smaller
static float logit_bound(const warm_view & warm, const uint8_t * block, const float * q, float unit) {
    const auto * steps = (const ggml_fp16_t *) block + warm.n_k;

    thread_local std::vector<float> scratch;

    float * step = aligned(scratch, warm.n_k);
    ggml_cpu_fp16_to_fp32(steps, step, warm.n_k);

    lanes sums = {};
    for (int64_t d = 0; d < warm.n_k; d += N_LANES) {
        const lanes x = load(q + d)*load(step + d);
        sums += max(x, -x);
    }
    const float of_rounding = unit*warm.n_k*((1 << warm.bits_k) - 1)/2;

    return (sum(sums) + of_rounding)/2*fabsf(warm.softmax->pre_scale*warm.softmax->post_scale)*(warm.softmax->soft_cap > 0.0f ? warm.softmax->soft_cap : 1.0f);
}

void warm_judge(const warm_view & warm, int64_t token, int64_t h_kv, int64_t n_gqa, int64_t span, const float * const * q, const warm_judged * out) {
    thread_local std::vector<float> scratch;

    float * logits = aligned(scratch, (n_gqa + 1)*CELLS); // [n_gqa][CELLS]
    float * mask   = logits + n_gqa*CELLS;

    float unit[REFREEKV_WARM_GQA];
    for (int64_t i = 0; i < n_gqa; ++i) {
        reg most = {};
        for (int64_t d = 0; d < warm.n_k; d += N_REG) {
            const reg x = load_reg(q[i] + d)*load_reg(warm.largest_steps + h_kv*warm.n_k + d);
            most = max(max(x, -x), most);
        }
        unit[i] = max_of(most)/127.0f;
    }

    const int64_t end = std::min((span + 1)*REFREEKV_WARM_SPAN, warm.n_blocks);

    for (int64_t b = span*REFREEKV_WARM_SPAN; b < end; ++b) {
        if (!warm.visible[token*warm.n_blocks + b]) {
            for (int64_t i = 0; i < n_gqa; ++i) {
                out[i].tops  [b] = -INFINITY;
                out[i].totals[b] = 0.0f;
                out[i].excess[b] = 0.0f;
            }
            continue;
        }

        if (b + AHEAD < warm.n_blocks) {
            prefetch_far(codes_k(warm, b + AHEAD, h_kv), codes_bytes(warm.n_k, warm.bits_k));
        }
        dot_codes(codes_k(warm, b, h_kv), warm.n_k, warm.bits_k, q, unit, n_gqa, logits);

        const bool whole = warm.there[b] == ~0ull;
        for (int64_t j = 0; j < CELLS && !whole; ++j) {
            mask[j] = warm.there[b] >> j & 1 ? 0.0f : -INFINITY;
        }

        for (int64_t i = 0; i < n_gqa; ++i) {
            const float * src = logits + i*CELLS;
            float *       dst = out[i].weights + b*CELLS;

            reg m = reg {} - INFINITY;
            for (int64_t j = 0; j < CELLS; j += N_REG) {
                reg x = finished(load_reg(src + j), *warm.softmax);
                if (!whole) {
                    x += load_reg(mask + j);
                }
                store_reg(dst + j, x);
                m = max(x, m);
            }
            const float top = max_of(m);

            reg total = {};
            for (int64_t j = 0; j < CELLS; j += N_REG) {
                const reg w = exp_neg(load_reg(dst + j) - top);

                store_reg(dst + j, w);
                total += w;
            }
            out[i].tops  [b] = top;
            out[i].totals[b] = sum_of(total);
            out[i].excess[b] = warm.max_error > 0.0f ? expm1f(std::min(logit_bound(warm, codes_k(warm, b, h_kv), q[i], unit[i]), 80.0f)) : 0.0f;
        }
    }
}

// a row takes part as it is: out[i] of the n_gqa heads
static void attend_row(const warm_view & warm, const uint8_t * row, int64_t n_gqa, const float * const * q, const float * lse, float * memory, float * const * out) {
    float * k = memory;
    float * v = warm.v_in_k ? k : k + warm.n_k;

    to_float(warm.type_k, (const char *) row, k, warm.n_k);
    if (!warm.v_in_k) {
        to_float(warm.type_v, (const char *) row + ggml_row_size(warm.type_k, warm.n_k), v, warm.n_v);
    }

    for (int64_t i = 0; i < n_gqa; ++i) {
        lanes dot = {};
        for (int64_t d = 0; d < warm.n_k; d += N_LANES) {
            dot += load(q[i] + d)*load(k + d);
        }
        const float weight = expf(finished(reg {} + sum(dot), *warm.softmax)[0] - lse[i]);

        for (int64_t d = 0; d < warm.n_v; d += N_LANES) {
            store(out[i] + d, load(out[i] + d) + weight*load(v + d));
        }
        out[i][warm.n_v] += weight;
    }
}

float warm_least(const warm_view & warm, int64_t token, const warm_judged & judged, float lse) {
    // sums of products, by their exponents and first two bits
    static const int N_BINS = 1024;
    float bins[N_BINS] = {};

    const auto bin_of = [](float x) {
        uint32_t bits;
        memcpy(&bits, &x, sizeof(bits));
        return std::min<uint32_t>(bits >> 21, N_BINS - 1); // NaN may have a sign
    };
    float least_sum = 1.0f; // of all weights, if those by codes are as small as they can be
    for (int64_t b = 0; b < warm.n_blocks; ++b) {
        if (!warm.visible[token*warm.n_blocks + b]) {
            continue;
        }
        const float factor = expf(judged.tops[b] - lse);
        for (int64_t j = 0; j < CELLS; ++j) {
            const float x = judged.weights[b*CELLS + j]*factor*judged.excess[b];
            bins[bin_of(x)] += x;
        }
        least_sum -= judged.totals[b]*factor*(1.0f - 1.0f/(1.0f + judged.excess[b]));
    }

    // once rows have been read, what is left is measured against the sum that there is then
    uint32_t bin  = 0;
    float    left = warm.max_error*MARGIN*std::max(least_sum, 0.0f);
    while (bin < N_BINS && bins[bin] <= left) {
        left -= bins[bin++];
    }
    const uint32_t bits = bin << 21;

    float res;
    memcpy(&res, &bits, sizeof(res));
    return bin < N_BINS ? res : INFINITY;
}

// the cells of a block that one of the heads gives its limit or more
static uint64_t peaks_of(const warm_judged * judged, int64_t block, int64_t n_gqa, const float * factors, const float * limits) {
    uint64_t res = 0;
    for (int64_t i = 0; i < n_gqa; ++i) {
        if (factors[i] >= limits[i]) {
            const float * src = judged[i].weights + block*CELLS;
            for (int64_t j = 0; j < CELLS; ++j) {
                res |= (uint64_t) (src[j]*factors[i] >= limits[i]) << j;
            }
        }
    }
    return res;
}

void warm_attend(const warm_view & warm, int64_t token, int64_t h_kv, int64_t n_gqa, int64_t span, const float * const * q, const warm_judged * judged, const float * lse, const float * least, float * const * out) {
    const size_t row_bytes = ggml_row_size(warm.type_k, warm.n_k) + (warm.v_in_k ? 0 : ggml_row_size(warm.type_v, warm.n_v));

    thread_local std::vector<float>   scratch;
    thread_local std::vector<uint8_t> rows;
    thread_local std::vector<uint8_t> turned; // codes of V, where they are a part of K's

    float * memory  = aligned(scratch, warm.n_k + warm.n_v + n_gqa*(CELLS + 2));
    float * weights = memory + warm.n_k + warm.n_v; // [n_gqa][CELLS]
    float * factors = weights + n_gqa*CELLS;        // [n_gqa] of the weights of a block
    float * limits  = factors + n_gqa;              // [n_gqa] from which on its rows are read

    rows.resize(CELLS*row_bytes);

    for (int64_t i = 0; i < n_gqa; ++i) {
        std::fill_n(out[i], warm.n_v + N_LANES, 0.0f);
    }

    const int64_t first = span*REFREEKV_WARM_SPAN;
    const int64_t end   = std::min(first + REFREEKV_WARM_SPAN, warm.n_blocks);

    const auto look_at = [&](int64_t b, float theta) {
        for (int64_t i = 0; i < n_gqa; ++i) {
            factors[i] = expf(judged[i].tops[b] - lse[i]);
            limits [i] = warm.max_error > 0.0f ? std::min(theta, least[i]/judged[i].excess[b]) : theta;
        }
        return peaks_of(judged, b, n_gqa, factors, limits);
    };

    // what is to be read, within the budget
    const auto count = [&](float theta) {
        int64_t n = 0;
        for (int64_t b = first; b < end; ++b) {
            n += warm.visible[token*warm.n_blocks + b] ? __builtin_popcountll(look_at(b, theta)) : 0;
        }
        return n;
    };
    const int64_t n_wanted = count(warm.theta);

    // The blocks that the token sees are counted only where that matters: each span would look at all of them
    int64_t budget = warm_budget(warm.theta, warm_spans(warm.n_blocks));
    if (n_wanted > budget) {
        const uint8_t * visible = warm.visible + token*warm.n_blocks;

        budget = warm_budget(warm.theta, warm_spans(std::count(visible, visible + warm.n_blocks, 1)));
    }

    float   theta  = warm.theta;
    int64_t n_read = 0;
    for (int64_t n = n_wanted; n > budget && warm.max_error == 0.0f; n = count(theta)) {
        theta *= 2.0f;
    }

    for (int64_t b = first; b < end; ++b) {
        if (!warm.visible[token*warm.n_blocks + b]) {
            continue;
        }

        if (b + AHEAD < warm.n_blocks) {
            for (int64_t i = 0; i < n_gqa; ++i) {
                if (judged[i].totals[b + AHEAD]*expf(judged[i].tops[b + AHEAD] - lse[i]) >= NOTHING) {
                    if (!warm.v_in_k) {
                        prefetch_far(codes_v(warm, b + AHEAD, h_kv), codes_bytes(warm.n_v, warm.bits_v));
                    }
                    break;
                }
            }
        }

        uint64_t peaks = look_at(b, theta);
        if (peaks) {
            const uint64_t had = warm.read(warm.source, b, peaks, h_kv, rows.data());

            const int64_t n_rows = __builtin_popcountll(had);
            for (int64_t i = 0; i < n_rows; ++i) {
                attend_row(warm, rows.data() + i*row_bytes, n_gqa, q, lse, memory, out);
            }
            n_read += n_rows;
            peaks   = had;
        }

        const float * w [16];
        float *       to[16];
        int64_t       n = 0;

        bool is_turned = false;

        const auto add = [&]() {
            if (!warm.v_in_k) {
                add_codes(codes_v(warm, b, h_kv), warm.n_v, warm.bits_v, w, n, to);
                return;
            }
            if (!is_turned) {
                turned.resize(codes_bytes(warm.n_v, warm.bits_k));
                turn_codes(codes_k(warm, b, h_kv), warm.n_k, warm.n_v, turned.data());
                is_turned = true;
            }
            add_codes(turned.data(), warm.n_v, warm.bits_k, w, n, to);
        };

        for (int64_t i = 0; i < n_gqa; ++i) {
            if (judged[i].totals[b]*factors[i]*(1.0f + judged[i].excess[b]) < NOTHING) {
                out[i][warm.n_v + WARM_EXCESS] += judged[i].totals[b]*factors[i]*judged[i].excess[b];
                continue;
            }
            const float * src = judged[i].weights + b*CELLS;
            float *       dst = weights + i*CELLS;

            for (int64_t j = 0; j < CELLS; j += N_REG) {
                store_reg(dst + j, load_reg(src + j)*factors[i]);
            }
            for (uint64_t left = peaks; left; left &= left - 1) {
                dst[__builtin_ctzll(left)] = 0.0f;
            }
            reg total = {};
            for (int64_t j = 0; j < CELLS; j += N_REG) {
                total += load_reg(dst + j);
            }
            const float by_codes = sum_of(total);

            out[i][warm.n_v + WARM_WEIGHTS]  += by_codes;
            out[i][warm.n_v + WARM_BY_CODES] += by_codes;
            out[i][warm.n_v + WARM_EXCESS]   += by_codes*judged[i].excess[b];

            w [n] = dst;
            to[n] = out[i];
            if (++n == 16) {
                add();
                n = 0;
            }
        }
        if (n > 0) {
            add();
        }
    }

    if (n_wanted > 0) {
        warm.counts->n_read += n_read;
        warm.counts->n_left += n_wanted - n_read;
    }
}

} // namespace refreekv

#endif
