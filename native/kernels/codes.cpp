#include "kernels/codes.h"

#include "kernels/decode.h"
#include "kernels/tiles.h"

#ifdef REFREEKV_LANES

#include <algorithm>
#include <cmath>
#include <utility>

static const int64_t CELLS = REFREEKV_CODED_CELLS;
static const int64_t LINE  = 64; // bytes

// A register: a line, or a part of one.
#if defined(__AVX512BW__)
static const int N_BYTES = 64;
#elif defined(__AVX2__)
static const int N_BYTES = 32;
#else
static const int N_BYTES = 16;
#endif

typedef uint8_t  bytes  __attribute__((vector_size(N_BYTES)));
typedef uint16_t shorts __attribute__((vector_size(N_BYTES)));
typedef int32_t  ints   __attribute__((vector_size(N_BYTES)));

static const int PARTS  = LINE/N_BYTES; // registers of a line
static const int N_INTS = N_BYTES/4;

// Sums of products of four codes and four signed bytes. Where products come in 16 bits, FLUSH of their sums may be added up before they
// are widened.
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__) || defined(__ARM_FEATURE_DOTPROD) || !(defined(__AVX2__) || defined(__SSSE3__))
static constexpr int flush_of(int) { return 0; }
#else
static constexpr int flush_of(int bits) { return 32767/(2*127*((1 << bits) - 1)); }
#endif

static inline ints dot4(ints acc, bytes codes, int32_t four) {
#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
    return (ints) _mm512_dpbusd_epi32((__m512i) acc, (__m512i) codes, _mm512_set1_epi32(four));
#elif defined(__AVXVNNI__)
    return (ints) _mm256_dpbusd_avx_epi32((__m256i) acc, (__m256i) codes, _mm256_set1_epi32(four));
#elif defined(__AVX512BW__)
    return (ints) _mm512_add_epi16((__m512i) acc, _mm512_maddubs_epi16((__m512i) codes, _mm512_set1_epi32(four)));
#elif defined(__AVX2__)
    return (ints) _mm256_add_epi16((__m256i) acc, _mm256_maddubs_epi16((__m256i) codes, _mm256_set1_epi32(four)));
#elif defined(__SSSE3__)
    return (ints) _mm_add_epi16((__m128i) acc, _mm_maddubs_epi16((__m128i) codes, _mm_set1_epi32(four)));
#elif defined(__ARM_FEATURE_DOTPROD)
    return (ints) vdotq_s32((int32x4_t) acc, (int8x16_t) codes, (int8x16_t) vdupq_n_s32(four)); // codes have 6 bits at most
#else
    for (int i = 0; i < N_INTS; ++i) {
        for (int j = 0; j < 4; ++j) {
            acc[i] += codes[4*i + j]*(int32_t) (int8_t) (four >> 8*j);
        }
    }
    return acc;
#endif
}

// to 32 bits, what dot4 has added up
static inline ints widen(ints acc) {
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
    return acc;
#elif defined(__AVX512BW__)
    return (ints) _mm512_madd_epi16((__m512i) acc, _mm512_set1_epi16(1));
#elif defined(__AVX2__)
    return (ints) _mm256_madd_epi16((__m256i) acc, _mm256_set1_epi16(1));
#elif defined(__SSSE3__)
    return (ints) _mm_madd_epi16((__m128i) acc, _mm_set1_epi16(1));
#else
    return acc;
#endif
}

static inline bytes load_bytes(const uint8_t * p) {
    bytes res;
    memcpy(&res, p, sizeof(res));
    return res;
}

// the bits of a plane, W of them, of line I of a pack, moved to bit TO
template <int W, int I, int TO>
static inline bytes plane_of(const uint8_t * plane, int64_t offset) {
    const bytes x = load_bytes(plane + I/(8/W)*LINE + offset);

    constexpr int at = I%(8/W)*W; // where they are

    const shorts moved = at > TO ? (shorts) x >> (at > TO ? at - TO : 0) : (shorts) x << (TO > at ? TO - at : 0);

    return (bytes) moved & (bytes {} + (uint8_t) (((1 << W) - 1) << TO));
}

// codes of line I of a pack, from byte offset on
template <int B, int I>
static inline bytes line_of(const uint8_t * pack, int64_t offset) {
    bytes res = {};
    if constexpr (B & 4) {
        res = plane_of<4, I, 0>(pack, offset);
    }
    if constexpr (B & 2) {
        res |= plane_of<2, I, B & 4>(pack + (B & 4)*LINE, offset);
    }
    if constexpr (B & 1) {
        res |= plane_of<1, I, B & 6>(pack + (B & 6)*LINE, offset);
    }
    return res;
}

template <typename F, int... I>
static inline void for_each(F && f, std::integer_sequence<int, I...>) {
    (f(std::integral_constant<int, I>()), ...);
}

// Lines FIRST .. FIRST + LINES - 1 of n_packs packs, which lie stride packs apart: out[i] are the sums of the products with the quads of
// each of N factors, [n_packs*LINES] for each line in turn
template <int B, int FIRST, int LINES, int N>
static inline void dot_lines(const uint8_t * packs, int64_t n_packs, const int32_t * const * quads, int32_t (*out)[LINE/4]) {
    constexpr int flush = flush_of(B)/LINES; // packs

    for (int p = 0; p < PARTS; ++p) { // one after the other: the sums of all parts would be too many for the registers of AVX2
        ints acc[N];
        ints sum[N];
        for (int i = 0; i < N; ++i) {
            acc[i] = ints {};
            sum[i] = ints {};
        }

        const auto add_up = [&]() {
            for (int i = 0; i < N; ++i) {
                sum[i] += widen(acc[i]);
                acc[i] = ints {};
            }
        };

        for (int64_t pack = 0, n_added = 0; pack < n_packs; ++pack) {
            const uint8_t * src = packs + pack*B*LINE;

            for_each([&](auto line) {
                const bytes codes = line_of<B, FIRST + line>(src, p*N_BYTES);

                for (int i = 0; i < N; ++i) {
                    acc[i] = dot4(acc[i], codes, quads[i][pack*LINES + line]);
                }
                if constexpr (flush_of(B) > 0 && flush == 0) { // a pack is too much
                    if constexpr ((line + 1) % flush_of(B) == 0) {
                        add_up();
                    }
                }
            }, std::make_integer_sequence<int, LINES>());

            if constexpr (flush_of(B) > 0) {
                if (flush == 0 || ++n_added == flush) {
                    add_up();
                    n_added = 0;
                }
            }
        }
        if constexpr (flush_of(B) > 0) {
            add_up();
        }

        for (int i = 0; i < N; ++i) {
            const ints res = flush_of(B) > 0 ? sum[i] : acc[i];
            memcpy((uint8_t *) out[i] + p*N_BYTES, &res, sizeof(res));
        }
    }
}

static const int N_16 = 16/N_REG; // registers of 16 numbers

typedef int32_t iregs __attribute__((vector_size(sizeof(reg))));

// 16 numbers from -127 to 127
static inline void store_bytes(uint8_t * dst, const iregs x[N_16]) {
#if defined(__AVX512F__)
    _mm_storeu_si128((__m128i *) dst, _mm512_maskz_cvtepi32_epi8(0xffff, (__m512i) x[0]));
#elif defined(__AVX2__)
    const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32((__m256i) x[0], (__m256i) x[1]), 0xd8);
    _mm_storeu_si128((__m128i *) dst, _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
#else
    for (int i = 0; i < 16; ++i) {
        dst[i] = x[i/N_REG][i%N_REG];
    }
#endif
}

static const int MAX_N = 4; // queries or heads at a time

template <int B>
static constexpr float middle_code() {
    return ((1 << B) - 1)/2.0f;
}

// of each channel: its step, and the number that its middle code stands for
static inline void unpack_channels(const uint8_t * codes, int64_t n_channels, float middle_code, float * middle, float * step) {
    const uint16_t * least = (const uint16_t *) codes;

    for (int64_t d = 0; d < n_channels; d += N_REG) {
        const reg s = load_half(least + n_channels + d);

        store_reg(step   + d, s);
        store_reg(middle + d, load_half(least + d) + middle_code*s);
    }
}

// x rounded to a whole number, |x| < 2^22; as an integer with as_int
static const float ROUND = 12582912.0f; // 1.5*2^23

static inline iregs as_int(reg rounded) {
    return (iregs) rounded - (iregs) (reg {} + ROUND);
}

template <int B, int N>
static void dot_codes(const uint8_t * codes, const float * middle, const float * step, int64_t n_channels, const float * const * q, const float * unit, float * logits, float * memory) {
    int32_t * quads[N];
    float base[N];

    for (int i = 0; i < N; ++i) {
        quads[i] = (int32_t *) memory + i*n_channels/4;

        const float inverse = unit[i] > 0.0f ? 1.0f/unit[i] : 0.0f;
        const float back    = middle_code<B>()*unit[i];

        // q . middle, and what all codes as the middle one make of the whole multiples is taken off: the dot product has it, too
        reg b = {};
        for (int64_t d = 0; d < n_channels; d += 16) {
            iregs whole[N_16];
            for (int p = 0; p < N_16; ++p) {
                const reg x = load_reg(q[i] + d + p*N_REG);
                const reg r = x*load_reg(step + d + p*N_REG)*inverse + ROUND;

                b += x*load_reg(middle + d + p*N_REG) - (r - ROUND)*back;
                whole[p] = as_int(r);
            }
            store_bytes((uint8_t *) quads[i] + d, whole);
        }
        base[i] = sum_of(b);
    }

    const uint8_t * packs = codes + n_channels*2*sizeof(uint16_t);

    for_each([&](auto group) {
        alignas(64) int32_t sums[N][LINE/4];
        dot_lines<B, 2*group, 2, N>(packs, n_channels/8, quads, sums);

        for (int i = 0; i < N; ++i) {
            for (int p = 0; p < LINE/4; p += N_REG) {
                iregs x;
                memcpy(&x, sums[i] + p, sizeof(x));
                store_reg(logits + i*CELLS + group*16 + p, __builtin_convertvector(x, reg)*unit[i] + base[i]);
            }
        }
    }, std::make_integer_sequence<int, 4>());
}

// Weights in 8 bits each: unit*quads, and rest, what their sum lacks
struct small {
    float unit;
    float rest;
};

static inline small round_weights(const float * w, int32_t * quads) {
    reg most = {};
    for (int64_t j = 0; j < CELLS; j += N_REG) {
        most = max(load_reg(w + j), most);
    }
    const float top = max_of(most);

    small res = { top/127.0f, 0.0f };

    // of numbers too small for this there is nothing to be added
    const float inverse = top > 1e-30f ? 127.0f/top : 0.0f;

    reg rest = {};
    for (int64_t j = 0; j < CELLS; j += 16) {
        iregs whole[N_16];
        for (int p = 0; p < N_16; ++p) {
            const reg x = load_reg(w + j + p*N_REG);
            const reg r = x*inverse + ROUND;

            rest += x - (r - ROUND)*res.unit;
            whole[p] = as_int(r);
        }
        store_bytes((uint8_t *) quads + j, whole);
    }
    res.rest = sum_of(rest);

    return res;
}

template <int B, int N>
static void add_codes(const uint8_t * codes, const float * middle, const float * step, int64_t n_channels, const float * const * w, float * const * out) {
    alignas(64) int32_t room[N][CELLS/4];

    const int32_t * quads[N];
    float unit [N];
    float rest [N]; // of the sum of all codes' products, what is to be added for each channel's middle
    float total[N];

    for (int i = 0; i < N; ++i) {
        const small s = round_weights(w[i], room[i]);

        reg t = {};
        for (int64_t j = 0; j < CELLS; j += N_REG) {
            t += load_reg(w[i] + j);
        }
        quads[i] = room[i];
        unit [i] = s.unit;
        total[i] = sum_of(t);
        rest [i] = middle_code<B>()*(s.rest - total[i]);
    }

    const uint8_t * packs = codes + n_channels*2*sizeof(uint16_t);

    for (int64_t c = 0; c < n_channels; c += 16) {
        alignas(64) int32_t sums[N][LINE/4];
        dot_lines<B, 0, 8, N>(packs + c/8*B*LINE, 2, quads, sums);

        for (int i = 0; i < N; ++i) {
            for (int p = 0; p < 16; p += N_REG) {
                iregs x;
                memcpy(&x, sums[i] + p, sizeof(x));

                float *   dst = out[i] + c + p;
                const reg y   = (__builtin_convertvector(x, reg)*unit[i] + rest[i])*load_reg(step + c + p) + total[i]*load_reg(middle + c + p);

                store_reg(dst, load_reg(dst) + y);
            }
        }
    }
}

// f<bits, n>() for n in pieces of 1 to MAX_N: f(first)
template <int B, typename F>
static inline void in_pieces(int64_t n, F && f) {
    int64_t i = 0;
    for (; i + MAX_N <= n; i += MAX_N) {
        f(std::integral_constant<int, B>(), std::integral_constant<int, MAX_N>(), i);
    }
    switch (n - i) {
        case 3: f(std::integral_constant<int, B>(), std::integral_constant<int, 3>(), i); break;
        case 2: f(std::integral_constant<int, B>(), std::integral_constant<int, 2>(), i); break;
        case 1: f(std::integral_constant<int, B>(), std::integral_constant<int, 1>(), i); break;
    }
}

template <typename F>
static inline void with_bits(int bits, int64_t n, F && f) {
    switch (bits) {
        case 2: in_pieces<2>(n, f); break;
        case 3: in_pieces<3>(n, f); break;
        case 4: in_pieces<4>(n, f); break;
        case 5: in_pieces<5>(n, f); break;
        case 6: in_pieces<6>(n, f); break;
    }
}

bool refreekv_codes_fit(int64_t n_channels, int bits) {
    return n_channels % N_LANES == 0 && bits >= 2 && bits <= 6;
}

// kept from block to block
static float * memory_of(size_t n) {
    thread_local std::vector<float> memory;

    return aligned(memory, n);
}

void refreekv_dot_codes(const uint8_t * codes, int64_t n_channels, int bits, const float * const * q, const float * unit, int64_t n, float * logits) {
    float * middle = memory_of((2 + MAX_N)*n_channels);
    float * step   = middle + n_channels;

    unpack_channels(codes, n_channels, ((1 << bits) - 1)/2.0f, middle, step);

    with_bits(bits, n, [&](auto b, auto n_piece, int64_t i) {
        dot_codes<b, n_piece>(codes, middle, step, n_channels, q + i, unit + i, logits + i*CELLS, step + n_channels);
    });
}

void refreekv_add_codes(const uint8_t * codes, int64_t n_channels, int bits, const float * const * w, int64_t n, float * const * out) {
    float * middle = memory_of(2*n_channels);
    float * step   = middle + n_channels;

    unpack_channels(codes, n_channels, ((1 << bits) - 1)/2.0f, middle, step);

    with_bits(bits, n, [&](auto b, auto n_piece, int64_t i) {
        add_codes<b, n_piece>(codes, middle, step, n_channels, w + i, out + i);
    });
}

// where the code of a cell is: its pack, its line there, its byte
struct place {
    int64_t pack;
    int     line;
    int64_t byte;
};

static inline place place_of(int64_t cell, int64_t channel, bool is_v) {
    if (is_v) {
        return { channel/16*2 + cell/32, (int) (cell%32/4), channel%16*4 + cell%4 };
    }
    return { channel/8, (int) (cell/16*2 + channel%8/4), cell%16*4 + channel%4 };
}

// f(bits of a plane, its first bit in the code, its first line in the pack)
template <typename F>
static inline void for_planes(int bits, F && f) {
    int at = 0;
    for (int w : { 4, 2, 1 }) {
        if (bits & w) {
            f(w, at, at);
            at += w;
        }
    }
}

void refreekv_encode(const float * rows, int64_t stride, int64_t n_cells, int64_t n_channels, int bits, bool is_v, uint8_t * dst) {
    const int   n_codes = 1 << bits;
    uint16_t *  meta    = (uint16_t *) dst;
    uint8_t *   packs   = dst + n_channels*2*sizeof(uint16_t);

    thread_local std::vector<float>   scratch;
    thread_local std::vector<uint8_t> codes; // [n_channels/8 packs][8 lines][LINE]

    float * least   = aligned(scratch, 3*n_channels);
    float * step    = least + n_channels;
    float * inverse = step + n_channels;

    std::copy_n(rows, n_channels, least);
    std::copy_n(rows, n_channels, step);
    for (int64_t j = 1; j < n_cells; ++j) {
        for (int64_t d = 0; d < n_channels; d += N_LANES) {
            const lanes x = load(rows + j*stride + d);

            store(least + d, -max(-x, -load(least + d)));
            store(step  + d,  max( x,  load(step  + d)));
        }
    }
    for (int64_t d = 0; d < n_channels; ++d) {
        step[d] = (step[d] - least[d])/(n_codes - 1);
    }

    // codes are those of the numbers as f16 has them; larger ones are its largest
    for (int64_t d = 0; d < n_channels; ++d) {
        least[d] = std::min(std::max(least[d], -65504.0f), 65504.0f);
        step [d] = std::min(step[d], 65504.0f);
    }
    ggml_cpu_fp32_to_fp16(least, (ggml_fp16_t *) meta, n_channels);
    ggml_cpu_fp32_to_fp16(step,  (ggml_fp16_t *) meta + n_channels, n_channels);
    ggml_cpu_fp16_to_fp32((const ggml_fp16_t *) meta, least, n_channels);
    ggml_cpu_fp16_to_fp32((const ggml_fp16_t *) meta + n_channels, step, n_channels);

    for (int64_t d = 0; d < n_channels; ++d) {
        inverse[d] = step[d] > 0.0f ? 1.0f/step[d] : 0.0f;
    }

    codes.assign(n_channels*CELLS, 0);

    // places add up: that of a cell, and that of a channel
    const auto offset_of = [&](int64_t cell, int64_t channel) {
        const place at = place_of(cell, channel, is_v);
        return (int32_t) ((at.pack*8 + at.line)*LINE + at.byte);
    };
    thread_local std::vector<int32_t> offsets; // of channels

    offsets.resize(n_channels);
    for (int64_t d = 0; d < n_channels; ++d) {
        offsets[d] = offset_of(0, d);
    }

    const lanes last = (float) (n_codes - 1) - lanes {};

    for (int64_t j = 0; j < n_cells; ++j) {
        uint8_t * of_cell = codes.data() + offset_of(j, 0);

        for (int64_t d0 = 0; d0 < n_channels; d0 += N_LANES) {
            lanes x = (load(rows + j*stride + d0) - load(least + d0))*load(inverse + d0) + 0.5f;
            x = max(x, lanes {});
            x = x < last ? x : last;

            typedef uint8_t bytes16 __attribute__((vector_size(N_LANES)));

            const bytes16 code = __builtin_convertvector(__builtin_convertvector(x, ilanes), bytes16);

            for (int64_t d = 0; d < N_LANES; ++d) {
                of_cell[offsets[d0 + d]] = code[d];
            }
        }
    }

    std::fill_n(packs, n_channels*CELLS*bits/8, 0);

    for (int64_t pack = 0; pack < n_channels/8; ++pack) {
        for (int line = 0; line < 8; ++line) {
            const uint8_t * src = codes.data() + (pack*8 + line)*LINE;

            for_planes(bits, [&](int w, int first_bit, int first_line) {
                uint8_t * plane = packs + (pack*bits + first_line + line/(8/w))*LINE;

                const int shift = line%(8/w)*w;

                for (int64_t i = 0; i < LINE; ++i) {
                    plane[i] |= (src[i] >> first_bit & ((1 << w) - 1)) << shift;
                }
            });
        }
    }
}

void refreekv_decode_cell(const uint8_t * src, int64_t cell, int64_t n_channels, int bits, bool is_v, float * out) {
    const uint16_t * meta  = (const uint16_t *) src;
    const uint8_t *  packs = src + n_channels*2*sizeof(uint16_t);

    for (int64_t d = 0; d < n_channels; ++d) {
        const place at = place_of(cell, d, is_v);

        int code = 0;
        for_planes(bits, [&](int w, int first_bit, int first_line) {
            const uint8_t * plane = packs + (at.pack*bits + first_line + at.line/(8/w))*LINE;

            code |= (plane[at.byte] >> at.line%(8/w)*w & ((1 << w) - 1)) << first_bit;
        });

        float least;
        float step;
        ggml_cpu_fp16_to_fp32((const ggml_fp16_t *) meta + d, &least, 1);
        ggml_cpu_fp16_to_fp32((const ggml_fp16_t *) meta + n_channels + d, &step, 1);

        out[d] = least + step*code;
    }
}

#endif
