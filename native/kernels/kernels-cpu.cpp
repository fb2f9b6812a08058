// Part of ggml's CPU backend (CMakeLists.txt).

#include "kernels/kernels-cpu.h"

#include "kernels/attention-cpu.h"
#include "kernels/codes.h"
#include "kernels/kernels.h"
#include "kernels/lanes.h"

const refreekv_kernels * refreekv_cpu_kernels() {
#ifdef REFREEKV_LANES
    static const refreekv_kernels kernels = {
        refreekv_attention_cpu_make,
        refreekv_decode_fits,
        refreekv_decode,
        [](ggml_type type, const uint8_t * src, float * dst, int64_t n) { to_float(type, (const char *) src, dst, n); },
        refreekv_codes_fit,
        refreekv_encode,
    };

    return &kernels;
#else
    return nullptr;
#endif
}
