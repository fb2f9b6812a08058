#pragma once

#include "kernels/device/team.h"

namespace refreekv { namespace tiles {

// the types that the rows of a cache and of the cold store may have
enum number : int32_t { F32, F16, BF16, Q8_0 };

// The logit of a cell that is not seen. No logit is so small, and it is finite, because Metal's compiler may assume that all numbers are
REFREEKV_CONSTANT float NONE = -1e30f;

template <typename T>
REFREEKV_DEVICE T load(device_ptr<const void> p) {
    return *(device_ptr<const T>) p;
}

#ifdef __METAL_VERSION__
template <typename T>
REFREEKV_DEVICE T load(team_ptr<const void> p) {
    return *(team_ptr<const T>) p;
}
#endif

// read at once
#ifdef __METAL_VERSION__
using four_numbers = float4;
#else
struct alignas(16) four_numbers {
    float x[4];

    REFREEKV_DEVICE float operator[](int i) const { return x[i]; }
};
#endif

REFREEKV_DEVICE float from_bits(uint32_t bits) {
#ifdef __METAL_VERSION__
    return as_type<float>(bits);
#else
    float res;
    memcpy(&res, &bits, sizeof(res));
    return res;
#endif
}

REFREEKV_DEVICE float from_half(uint16_t x) {
#if defined(__METAL_VERSION__)
    return as_type<half>(x);
#elif defined(__CUDA_ARCH__)
    return __half2float(__ushort_as_half(x));
#else
    const uint32_t sign     = (uint32_t) (x & 0x8000) << 16;
    const uint32_t exponent = x >> 10 & 31;
    const uint32_t mantissa = x & 1023;

    if (exponent == 0) { // zero, or a number without a leading one
        const float tiny = mantissa/16777216.0f; // 2^24
        return sign ? -tiny : tiny;
    }
    return from_bits(sign | (exponent == 31 ? 255u : exponent + 112) << 23 | mantissa << 13);
#endif
}

// Numbers in a row, which may be in the memory of the device or in that of the team: one number of a type without blocks
template <typename Bytes>
REFREEKV_DEVICE float number_at(number type, Bytes p) {
    switch (type) {
        case F32:  return load<float>(p);
        case F16:  return from_half(load<uint16_t>(p));
        default:   return from_bits((uint32_t) load<uint16_t>(p) << 16); // BF16
    }
}

// and number i of a row
template <typename Bytes>
REFREEKV_DEVICE float number_of(number type, Bytes row, int i) {
    if (type == Q8_0) { // blocks of 32 numbers: their scale in f16, and 32 bytes
        const Bytes block = row + i/32*34;
        return from_half(load<uint16_t>(block))*(int8_t) block[2 + i%32];
    }
    return number_at(type, row + i*(type == F32 ? 4 : 2));
}

// How K or V of the cells that a layer holds lie. Distances are in bytes
struct rows {
    number  type;
    int64_t next_cell;
    int64_t next_head;
    int64_t next_channel; // 0: the numbers of a cell lie beside each other. Otherwise V is transposed, and the type has no blocks

    REFREEKV_DEVICE float at(device_ptr<const uint8_t> data, int head, int64_t cell, int channel) const {
        const device_ptr<const uint8_t> p = data + head*next_head + cell*next_cell;

        return next_channel == 0 ? number_of(type, p, channel) : number_at(type, p + channel*next_channel);
    }
};

}} // namespace refreekv::tiles
