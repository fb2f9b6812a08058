// Part of ggml's CPU backend (CMakeLists.txt).

#include "refreekv-kernels-cpu.h"

#include "refreekv-attention-cpu.h"
#include "refreekv-kernels.h"
#include "refreekv-lanes.h"

const refreekv_kernels * refreekv_cpu_kernels() {
#ifdef REFREEKV_LANES
    static const refreekv_kernels kernels = {
        refreekv_attention_cpu_make,
        refreekv_decode_fits,
        refreekv_decode_can_fault,
        refreekv_decode,
    };

    return &kernels;
#else
    return nullptr;
#endif
}
