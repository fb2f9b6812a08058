// Part of ggml's CUDA backend (CMakeLists.txt).

#include "kernels/device/hooks-cuda.h"

#include "kernels/device/decode-cuda.h"
#include "kernels/device/node.h"

#include <cstring>

namespace refreekv { namespace device {

using namespace tiles;

bool supports(const ggml_tensor * node) {
    call c;
    return call_of(node, c);
}

bool compute(ggml_tensor * node, void * stream) {
    call c;
    if (!call_of(node, c)) {
        return false;
    }
    for_pieces(c, [&](const call & piece) { launch(piece, (cudaStream_t) stream); });
    return true;
}

bool offers(const char * name) {
    return strcmp(name, "refreekv_device_kernels") == 0;
}

}} // namespace refreekv::device
