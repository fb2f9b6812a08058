// Part of ggml's Metal backend (CMakeLists.txt). Never run yet.

#include "kernels/device/hooks-metal.h"

#include "kernels/device/node.h"

#include "ggml-backend-impl.h"

#include <map>
#include <mutex>

// decode.metal and what it includes (cmake/embed_metal.py)
extern const char * const refreekv_metal_source;

namespace refreekv { namespace tiles {

// Our kernels are a library of their own, compiled for a device when they are first asked for: ggml's are not touched where nobody asks, or
// where Metal refuses to compile ours (nullptr; ggml logs why). It lives as long as the process.
static ggml_metal_library_t library_of(ggml_metal_device_t device) {
    static std::mutex mutex;
    static std::map<ggml_metal_device_t, ggml_metal_library_t> libraries;

    std::lock_guard<std::mutex> lock(mutex);

    const auto it = libraries.find(device);
    if (it != libraries.end()) {
        return it->second;
    }
    return libraries[device] = ggml_metal_library_init_from_source(device, refreekv_metal_source, true);
}

// ggml keeps what it has compiled. Several threads may encode at once
static ggml_metal_pipeline_with_params kernel_of(ggml_metal_library_t library, int p) {
    static const char * const NAMES[N_PASSES] = { "refreekv_judge", "refreekv_merge", "refreekv_attend", "refreekv_join" };

    return ggml_metal_library_compile_pipeline(library, NAMES[p], NAMES[p], nullptr);
}

// The call that a node stands for, but for exact rows, which are in memory that a Metal device has no addresses of (docs/lab/metal-check.md)
static bool metal_call_of(const ggml_tensor * node, call & c) {
    const bool res = call_of(node, c);

    c.s.exact_head = 0;

    return res;
}

// where a Metal device has what the host knows by a pointer into a tensor
static ggml_metal_buffer_id place_of(const ggml_tensor * t, const void * pointer) {
    ggml_backend_buffer_t buffer = t->view_src ? t->view_src->buffer : t->buffer;

    auto res = ggml_metal_buffer_get_id((ggml_metal_buffer_t) buffer->context, t);
    res.offs += (const char *) pointer - (const char *) t->data;

    return res;
}

static void encode_piece(ggml_metal_library_t library, ggml_metal_encoder_t encoder, const ggml_tensor * node, const call & c) {
    const auto * const * src = node->src;

    // as in decode.metal, from 1 on
    const ggml_metal_buffer_id buffers[] = {
        place_of(src[SRC_Q], c.q), place_of(src[SRC_MASK], c.mask), c.s.has_sinks ? place_of(src[SRC_SINKS], c.sinks) : place_of(src[SRC_Q], c.q),
        place_of(src[SRC_K], c.k), place_of(src[SRC_V], c.v), place_of(src[SRC_CODES_K], c.codes_k), place_of(src[SRC_CODES_V], c.codes_v),
        place_of(node, c.out), place_of(node, c.scratch),
    };
    sizes s = c.s;

    for (int p = 0; p < N_PASSES; ++p) {
        const auto kernel = kernel_of(library, p);
        const auto size   = size_of((pass) p, s);

        ggml_metal_encoder_set_pipeline(encoder, kernel);
        ggml_metal_encoder_set_bytes   (encoder, &s, sizeof(s), 0);

        int index = 1;
        for (const auto & buffer : buffers) {
            ggml_metal_encoder_set_buffer(encoder, buffer, index++);
        }
        if (size.bytes > 0) {
            ggml_metal_encoder_set_threadgroup_memory_size(encoder, GGML_PAD(size.bytes, 16), 0);
        }
        // no result depends on the number of threads
        const int threads = lesser(size.threads, ggml_metal_pipeline_max_theads_per_threadgroup(kernel));

        ggml_metal_encoder_dispatch_threadgroups(encoder, size.teams[0], size.teams[1], size.teams[2], threads, 1, 1);

        // the next one reads what this one has written, and launches may run side by side
        ggml_metal_encoder_memory_barrier(encoder);
    }
}

}} // namespace refreekv::tiles

using namespace refreekv::tiles;

bool refreekv_metal_supports(ggml_metal_device_t device, const ggml_tensor * node) {
    call c;
    if (!metal_call_of(node, c) || team_bytes(c.s) > (int64_t) ggml_metal_device_get_props(device)->max_theadgroup_memory_size) {
        return false;
    }
    auto library = library_of(device);

    for (int p = 0; library && p < N_PASSES; ++p) {
        if (!kernel_of(library, p).pipeline) {
            return false;
        }
    }
    return library != nullptr;
}

int refreekv_metal_encode(ggml_metal_device_t device, ggml_metal_encoder_t encoder, ggml_tensor * node) {
    call c;
    GGML_ASSERT(metal_call_of(node, c)); // as refreekv_metal_supports() has said

    for_pieces(c, [&](const call & piece) { encode_piece(library_of(device), encoder, node, piece); });

    return 1;
}
