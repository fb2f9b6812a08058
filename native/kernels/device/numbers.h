#pragma once

#include "kernels/device/team.h"

#include <cstring>

namespace refreekv { namespace device {

// the types that the rows of a cache and of the cold store may have
enum number : int32_t { F32, F16, BF16, Q8_0 };

constexpr float NONE = -INFINITY; // the logit of a cell that is not seen

template <typename T>
REFREEKV_DEVICE T load(const void * p) {
    return *(const T *) p;
}

REFREEKV_DEVICE float from_bits(uint32_t bits) {
    float res;
    memcpy(&res, &bits, sizeof(res));
    return res;
}

REFREEKV_DEVICE float from_half(uint16_t x) {
#ifdef __CUDA_ARCH__
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

// one number of a type without blocks
REFREEKV_DEVICE float number_at(number type, const uint8_t * p) {
    switch (type) {
        case F32:  return load<float>(p);
        case F16:  return from_half(load<uint16_t>(p));
        default:   return from_bits((uint32_t) load<uint16_t>(p) << 16); // BF16
    }
}

// number i of a row
REFREEKV_DEVICE float number_of(number type, const uint8_t * row, int i) {
    if (type == Q8_0) { // blocks of 32 numbers: their scale in f16, and 32 bytes
        const uint8_t * block = row + i/32*34;
        return from_half(load<uint16_t>(block))*(int8_t) block[2 + i%32];
    }
    return number_at(type, row + i*(type == F32 ? 4 : 2));
}

// K or V of the cells that a layer holds. Distances are in bytes
struct rows {
    const uint8_t * data;
    number          type;
    int64_t         next_cell;
    int64_t         next_head;
    int64_t         next_channel; // 0: the numbers of a cell lie beside each other. Otherwise V is transposed, and the type has no blocks

    REFREEKV_DEVICE float at(int head, int64_t cell, int channel) const {
        const uint8_t * p = data + head*next_head + cell*next_cell;

        return next_channel == 0 ? number_of(type, p, channel) : number_at(type, p + channel*next_channel);
    }
};

}} // namespace refreekv::device
