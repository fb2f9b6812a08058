// The tiles of this folder as Metal kernels. cmake/embed_metal.py makes one text of it and what it includes, which hooks-metal.cpp has Metal
// compile when a context first asks for it. Never compiled by Metal, and never run yet.

#include <metal_stdlib>

using namespace metal;

#include "kernels/device/attend.h"

using namespace refreekv;

// what hooks-metal.cpp binds for each of them
#define REFREEKV_ARGUMENTS                           \
    constant tiles::sizes & s       [[buffer(0)]],   \
    device const float *    q       [[buffer(1)]],   \
    device const uint8_t *  mask    [[buffer(2)]],   \
    device const float *    sinks   [[buffer(3)]],   \
    device const uint8_t *  k       [[buffer(4)]],   \
    device const uint8_t *  v       [[buffer(5)]],   \
    device const uint8_t *  codes_k [[buffer(6)]],   \
    device const uint8_t *  codes_v [[buffer(7)]],   \
    device float *          out     [[buffer(8)]],   \
    device float *          scratch [[buffer(9)]],   \
    uint3 team    [[threadgroup_position_in_grid]],  \
    uint3 threads [[threads_per_threadgroup]],       \
    uint  rank    [[thread_index_in_threadgroup]]

// numbers are copied to the thread, which clang cannot do in the check of this file (tests/tools/gpu/check_metal.py)
#ifndef REFREEKV_COPY
#define REFREEKV_COPY(numbers) numbers
#endif

// exact rows, and a place where they would be counted: there are none
#define REFREEKV_CALL     tiles::call { REFREEKV_COPY(s), q, mask, sinks, k, v, codes_k, codes_v, nullptr, out, nullptr, scratch }
#define REFREEKV_THE_TEAM tiles::metal_threadgroup { (int) rank, (int) threads.x }

kernel void refreekv_judge(REFREEKV_ARGUMENTS, threadgroup float * room [[threadgroup(0)]]) {
    tiles::judge(REFREEKV_THE_TEAM, REFREEKV_CALL, team.x, team.y, team.z, room);
}

kernel void refreekv_merge(REFREEKV_ARGUMENTS, threadgroup float * room [[threadgroup(0)]]) {
    tiles::merge(REFREEKV_THE_TEAM, REFREEKV_CALL, team.x, team.y, room);
}

kernel void refreekv_attend(REFREEKV_ARGUMENTS, threadgroup float * room [[threadgroup(0)]]) {
    tiles::attend(REFREEKV_THE_TEAM, REFREEKV_CALL, team.x, team.y, team.z, room);
}

kernel void refreekv_join(REFREEKV_ARGUMENTS) {
    tiles::join(REFREEKV_THE_TEAM, REFREEKV_CALL, team.x, team.y);
}
