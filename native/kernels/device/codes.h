#pragma once

#include "kernels/device/call.h"

namespace refreekv { namespace tiles {

// Blocks of codes, whose form kernels/codes.h describes: K of a cell by its thread, and V of a channel by its thread. Neighbouring threads
// read neighbouring words.

REFREEKV_DEVICE int64_t block_bytes(int n_channels, int bits) { return n_channels*(2*sizeof(uint16_t) + CELLS*bits/8); }

REFREEKV_DEVICE float least_of(device_ptr<const uint8_t> codes, int channel)                { return from_half(load<uint16_t>(codes + 2*channel)); }
REFREEKV_DEVICE float step_of (device_ptr<const uint8_t> codes, int n_channels, int channel) { return from_half(load<uint16_t>(codes + 2*(n_channels + channel))); }

// the four codes that are word `at` of a line of a pack: one in each byte
template <int BITS>
REFREEKV_DEVICE uint32_t four_codes(device_ptr<const uint8_t> codes, int n_channels, int pack, int line, int at) {
    const device_ptr<const uint8_t> its = codes + 2*n_channels*sizeof(uint16_t) + (int64_t) pack*BITS*CELLS;

    uint32_t res   = 0;
    int      first = 0; // bit of the code, and line of the pack, where a plane begins
#ifdef __CUDA_ARCH__
#pragma unroll
#endif
    for (int w = 4; w > 0; w /= 2) {
        if (BITS & w) {
            const uint32_t word = load<uint32_t>(its + (first + line/(8/w))*CELLS + 4*at);

            res |= (word >> line%(8/w)*w & 0x01010101u*((1u << w) - 1)) << first;
            first += w;
        }
    }
    return res;
}

// sums[i] = sum over the channels of scaled[i][channel]*code of the cell, for LINES lines: [LINES][n_channels]
template <int BITS>
REFREEKV_DEVICE void dot_codes(device_ptr<const uint8_t> codes, int n_channels, int cell, team_ptr<const float> scaled, own_ptr<float> sums) {
    for (int i = 0; i < LINES; ++i) {
        sums[i] = 0.0f;
    }
    for (int d = 0; d < n_channels; d += 4) {
        const uint32_t four = four_codes<BITS>(codes, n_channels, d/8, cell/16*2 + d%8/4, cell%16);

        for (int i = 0; i < LINES; ++i) {
            const four_numbers q = load<four_numbers>(scaled + i*n_channels + d);

            for (int j = 0; j < 4; ++j) {
                sums[i] += q[j]*(float) (four >> 8*j & 255);
            }
        }
    }
}

// sums[i] = sum over the cells of weights[i][cell]*code of the channel, for LINES lines
template <int BITS>
REFREEKV_DEVICE void add_codes(device_ptr<const uint8_t> codes, int n_channels, int channel, own_ptr<const device_ptr<const float>> weights, own_ptr<float> sums) {
    for (int i = 0; i < LINES; ++i) {
        sums[i] = 0.0f;
    }
    for (int cell = 0; cell < CELLS; cell += 4) {
        const uint32_t four = four_codes<BITS>(codes, n_channels, channel/16*2 + cell/32, cell%32/4, channel%16);

        for (int i = 0; i < LINES; ++i) {
            const four_numbers w = load<four_numbers>(weights[i] + cell);

            for (int j = 0; j < 4; ++j) {
                sums[i] += w[j]*(float) (four >> 8*j & 255);
            }
        }
    }
}

}} // namespace refreekv::tiles
