#pragma once

// Vectors of floats, and what our kernels for the CPU do with them. The compiler lowers them to what the instruction sets have
// that it may use. A compiler without such vectors does not define REFREEKV_LANES, and then there are no kernels of ours.
//
// For sources that are part of ggml's CPU backend (CMakeLists.txt).

#include "ggml-backend.h"
#include "ggml.h"

// GCC for Windows does not align such vectors on the stack
#if defined(__clang__) || (defined(__GNUC__) && __GNUC__ >= 12 && !defined(__MINGW32__))
#define REFREEKV_LANES
#endif

#ifdef REFREEKV_LANES

#include "ggml-cpu.h"

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace refreekv {

#pragma GCC diagnostic ignored "-Wpsabi" // vectors wider than the machine's are passed in memory, and only inlined here

typedef float   lanes  __attribute__((vector_size(64)));
typedef int32_t ilanes __attribute__((vector_size(64)));

static const int N_LANES = 16;

static inline lanes load(const float * p) {
    lanes res;
    memcpy(&res, p, sizeof(res));
    return res;
}

static inline void store(float * p, lanes v) {
    memcpy(p, &v, sizeof(v));
}

// Loops keep their sums in vectors of the size of a register: GCC keeps arrays of larger ones in memory.
#if defined(__AVX512F__)
typedef lanes reg;
#elif defined(__AVX__)
typedef float reg __attribute__((vector_size(32)));
#else
typedef float reg __attribute__((vector_size(16)));
#endif

typedef decltype(reg {} > reg {}) ireg;

static const int N_REG = sizeof(reg)/sizeof(float);

static inline reg load_reg(const float * p) {
    reg res;
    memcpy(&res, p, sizeof(res));
    return res;
}

// N_REG numbers of f16
static inline reg load_half(const uint16_t * p) {
#if defined(__AVX512F__)
    return (reg) _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256((const __m256i *) p)); // GCC warns of the one without a mask
#elif defined(__AVX__) && defined(__F16C__)
    return (reg) _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *) p));
#elif defined(__ARM_NEON) && defined(__aarch64__)
    return (reg) vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p)));
#else
    reg res;
    ggml_cpu_fp16_to_fp32((const ggml_fp16_t *) p, (float *) &res, N_REG);
    return res;
#endif
}

static inline void store_reg(float * p, reg v) {
    memcpy(p, &v, sizeof(v));
}

// x - 0 is x, also for -0
static inline reg all(float x) {
    return x - reg {};
}

// in a register from here on: GCC would load it anew for each operation that it is an operand of
static inline void hold(reg & x) {
#if defined(__AVX__)
    __asm__("" : "+v"(x));
#else
    (void) x;
#endif
}

// n floats that begin with a line of the processor's cache; what is in them before is lost
static inline float * aligned(std::vector<float> & memory, size_t n) {
    memory.resize(n + N_LANES);

    return (float *) GGML_PAD((uintptr_t) memory.data(), sizeof(lanes));
}

template <typename V>
static inline V max(V a, V b) {
    return a > b ? a : b;
}

// the sums of neighbours: first those of a, then those of b
static inline reg pair_sums(reg a, reg b) {
#if defined(__AVX512F__)
    return __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30) +
           __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
#elif defined(__AVX__)
    return __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14) + __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15);
#else
    return __builtin_shufflevector(a, b, 0, 2, 4, 6) + __builtin_shufflevector(a, b, 1, 3, 5, 7);
#endif
}

// number i: the sum of a[i]
static inline reg sums(reg a[N_REG]) {
    for (int n = N_REG/2; n > 0; n /= 2) {
        for (int i = 0; i < n; ++i) {
            a[i] = pair_sums(a[2*i], a[2*i + 1]);
        }
    }
    return a[0];
}

template <typename V>
static inline float sum(V a) {
    float res = 0.0f;
    for (size_t i = 0; i < sizeof(V)/sizeof(float); ++i) {
        res += a[i];
    }
    return res;
}

typedef float quad __attribute__((vector_size(16)));

// the numbers of a register joined by f(quad, quad)
template <typename F>
static inline float across(reg x, F && f) {
    quad parts[N_REG/4];
    memcpy(parts, &x, sizeof(x));

    quad res = parts[0];
    for (int i = 1; i < N_REG/4; ++i) {
        res = f(res, parts[i]);
    }
    res = f(res, __builtin_shufflevector(res, res, 2, 3, 0, 1));
    res = f(res, __builtin_shufflevector(res, res, 1, 0, 3, 2));

    return res[0];
}

static inline float sum_of(reg x) { return across(x, [](quad a, quad b) { return a + b; }); }
static inline float max_of(reg x) { return across(x, [](quad a, quad b) { return a > b ? a : b; }); }

// e^x for x <= 0: 2^k * 2^f, |f| <= 1/2, the second factor by its Taylor series. Relative error below 3e-7; below 2^-126: 0
template <typename V>
static inline V exp_neg(V x) {
    using ints = decltype(x > x);

    const V y = x*1.44269504f;
    const V m = max(y, V {} - 127.0f);
    const V r = m + 12582912.0f; // 1.5*2^23: rounds, and leaves k in the low bits
    const V f = m - (r - 12582912.0f);

    const V p = 1.0f + f*(0.69314718f + f*(0.24022651f + f*(0.05550411f + f*(0.00961813f + f*(0.00133336f + f*0.00015403f)))));

    const V res = (V) ((ints) p + ((ints) r << 23));

    return y > -126.0f ? res : V {};
}

static inline void to_float(ggml_type type, const char * src, float * dst, int64_t n) {
    switch (type) {
        case GGML_TYPE_F32:
            {
                memcpy(dst, src, n*sizeof(float));
            } break;
        case GGML_TYPE_F16:
            {
                ggml_cpu_fp16_to_fp32((const ggml_fp16_t *) src, dst, n);
            } break;
        case GGML_TYPE_Q8_0:
            {
                // ggml's block_q8_0
                struct block {
                    ggml_fp16_t d;
                    int8_t      qs[32];
                };
                const block * b = (const block *) src;

                for (int64_t i = 0; i < n/32; ++i) {
                    float d;
                    ggml_cpu_fp16_to_fp32(&b[i].d, &d, 1);

                    for (int j = 0; j < 32; ++j) {
                        dst[32*i + j] = d*b[i].qs[j];
                    }
                }
            } break;
        default:
            {
                ggml_get_type_traits(type)->to_float(src, dst, n);
            } break;
    }
}

template <typename V>
static inline V tanh(V x) {
    const V e = exp_neg(-2.0f*max(x, -x));
    const V t = (1.0f - e)/(1.0f + e);

    return x < 0.0f ? -t : t;
}

// as in ggml: by the head's place among all of the layer
static inline float alibi_slope(float max_bias, int64_t head, int64_t n_head) {
    if (max_bias <= 0.0f) {
        return 1.0f;
    }
    const int64_t n_log2 = 1LL << (int) std::floor(std::log2(n_head));

    return head < n_log2 ? std::pow(2.0f, -max_bias*(head + 1)/n_log2) : std::pow(2.0f, -max_bias/2*(2*(head - n_log2) + 1)/n_log2);
}

static inline bool has_to_float(ggml_type type) {
    return type == GGML_TYPE_F32 || ggml_get_type_traits(type)->to_float;
}

static inline bool in_host_memory(const ggml_tensor * t) {
    const ggml_tensor * owner = t->view_src ? t->view_src : t;

    return owner->buffer && ggml_backend_buffer_is_host(owner->buffer);
}

} // namespace refreekv

#endif
