#pragma once

#include "kernels/codes.h"
#include "kernels/tiles.h"

// Lines of codes in registers, and their products with signed bytes (kernels/codes.h says how codes lie).

#ifdef REFREEKV_LANES

#include <cstring>
#include <utility>

namespace refreekv {

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

// Sums of products of four codes and four signed bytes. Where products come in 16 bits, flush_of(bits) of their sums may be added up before
// they are widened.
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

} // namespace refreekv

#endif
