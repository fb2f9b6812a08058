// The products of queries and weights with codes.

#include "kernels/code-lines.h"

#ifdef REFREEKV_LANES

#include <cstring>
#include <vector>

namespace refreekv {

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

bool codes_fit(int64_t n_channels, int bits) {
    return n_channels % N_LANES == 0 && bits >= 2 && bits <= 6;
}

// kept from block to block
static float * memory_of(size_t n) {
    thread_local std::vector<float> memory;

    return aligned(memory, n);
}

void dot_codes(const uint8_t * codes, int64_t n_channels, int bits, const float * const * q, const float * unit, int64_t n, float * logits) {
    float * middle = memory_of((2 + MAX_N)*n_channels);
    float * step   = middle + n_channels;

    unpack_channels(codes, n_channels, ((1 << bits) - 1)/2.0f, middle, step);

    with_bits(bits, n, [&](auto b, auto n_piece, int64_t i) {
        dot_codes<b, n_piece>(codes, middle, step, n_channels, q + i, unit + i, logits + i*CELLS, step + n_channels);
    });
}

void turn_codes(const uint8_t * codes, int64_t n_channels, int64_t n_v, uint8_t * dst) {
    typedef uint8_t bytes16 __attribute__((vector_size(16)));

    // [4 cells][4 channels] to [4 channels][4 cells]
    const auto load_turned = [](const uint8_t * p) {
        bytes16 x;
        memcpy(&x, p, sizeof(x));
        return __builtin_shufflevector(x, x, 0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    };
    const auto store_bytes16 = [](uint8_t * p, bytes16 x) { memcpy(p, &x, sizeof(x)); };

    memcpy(dst,                        codes,                               n_v*sizeof(uint16_t));
    memcpy(dst + n_v*sizeof(uint16_t), codes + n_channels*sizeof(uint16_t), n_v*sizeof(uint16_t));

    const uint8_t * from = codes + n_channels*2*sizeof(uint16_t);
    uint8_t *       to   = dst   + n_v       *2*sizeof(uint16_t);

    static const int64_t PACK = 4*LINE; // bytes, with 4 bits

    // 8 cells of the 8 channels of a pack of K at a time: the low halves of its bytes are the first 4 channels. Of V they are cells
    for (int64_t pack = 0; pack < n_v/8; ++pack) {
        for (int64_t c = 0; c < CELLS/8; ++c) {
            const uint8_t * src = from + pack*PACK + c/2*LINE + c%2*32;

            const bytes16 a = load_turned(src);
            const bytes16 b = load_turned(src + 16);

            uint8_t * line = to + (pack/2*2 + c/4)*PACK + c%4*LINE + pack%2*32;

            store_bytes16(line,      (a & 15) | (b << 4));
            store_bytes16(line + 16, (a >> 4) | (b & 240));
        }
    }
}

void add_codes(const uint8_t * codes, int64_t n_channels, int bits, const float * const * w, int64_t n, float * const * out) {
    float * middle = memory_of(2*n_channels);
    float * step   = middle + n_channels;

    unpack_channels(codes, n_channels, ((1 << bits) - 1)/2.0f, middle, step);

    with_bits(bits, n, [&](auto b, auto n_piece, int64_t i) {
        add_codes<b, n_piece>(codes, middle, step, n_channels, w + i, out + i);
    });
}

} // namespace refreekv

#endif
