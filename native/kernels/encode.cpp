// From numbers to codes, and back.

#include "kernels/code-lines.h"

#ifdef REFREEKV_LANES

#include <algorithm>
#include <vector>

namespace refreekv {

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

void encode(const float * rows, int64_t stride, int64_t n_cells, int64_t n_channels, int bits, bool is_v, uint8_t * dst) {
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

void decode_cell(const uint8_t * src, int64_t cell, int64_t n_channels, int bits, bool is_v, float * out) {
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

} // namespace refreekv

#endif
