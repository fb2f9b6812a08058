// Part of ggml's CPU backend (CMakeLists.txt).

#include "kernels/kernels-cpu.h"

#include "kernels/attention-cpu.h"
#include "kernels/codes.h"
#include "kernels/kernels.h"
#include "kernels/lanes.h"

namespace refreekv {

const refreekv::kernels * cpu_kernels() {
#ifdef REFREEKV_LANES
    static const refreekv::kernels kernels = {
        make_attention_cpu,
        decode_fits,
        decode,
        [](ggml_type type, const uint8_t * src, float * dst, int64_t n) { to_float(type, (const char *) src, dst, n); },
        codes_fit,
        encode,
    };

    return &kernels;
#else
    return nullptr;
#endif
}

} // namespace refreekv
