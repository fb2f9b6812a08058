// native/kernels/device/hooks-metal.cpp with a Metal that runs on the host: what it launches are the kernels of decode.metal, which clang has
// compiled as C++ (metal/metal_stdlib), with threads that wait for each other. For test_metal.py. No Mac has run either.

#include "device_tiles.cpp"

#include "kernels/device/hooks-metal.cpp"

#include <cstdio>
#include <string>

// by decode.metal. The kinds of memory, and references, are plain pointers to the processor
struct uint3 {
    uint32_t x, y, z;
};

#define ARGUMENTS const void *, const void *, const void *, const void *, const void *, const void *, const void *, const void *, void *, void *, uint3, uint3, uint32_t

extern "C" {
void refreekv_judge (ARGUMENTS, float *);
void refreekv_merge (ARGUMENTS, float *);
void refreekv_attend(ARGUMENTS, float *);
void refreekv_join  (ARGUMENTS);
}

using kernel_function = void (*)(ARGUMENTS, float *);

struct ggml_metal_pipeline {
    std::string     name;
    kernel_function function;
};

struct ggml_metal_encoder {
    ggml_metal_pipeline * kernel = nullptr;

    std::vector<uint8_t> bytes;
    void *               buffers[10] = {};
    size_t               n_room      = 0;

    bool running = false; // a launch, which the next one may not wait for
    int  n_races = 0;
};

static thread_local barrier * team_barrier = nullptr;

extern "C" {

int metal_threads = 6; // of a team, at most

void metal_barrier() { team_barrier->wait(); }

ggml_metal_library_t ggml_metal_library_init_from_source(ggml_metal_device_t, const char * source, bool) {
    return strstr(source, "kernel void refreekv_judge(") ? (ggml_metal_library_t) source : nullptr;
}

ggml_metal_pipeline_with_params ggml_metal_library_compile_pipeline(ggml_metal_library_t, const char * base, const char *, ggml_metal_cv_t) {
    static ggml_metal_pipeline kernels[] = {
        { "refreekv_judge", refreekv_judge }, { "refreekv_merge", refreekv_merge }, { "refreekv_attend", refreekv_attend }, { "refreekv_join", (kernel_function) refreekv_join },
    };
    ggml_metal_pipeline_with_params res = {};
    for (auto & kernel : kernels) {
        if (kernel.name == base) {
            res.pipeline = &kernel;
        }
    }
    return res;
}

int ggml_metal_pipeline_max_theads_per_threadgroup(ggml_metal_pipeline_with_params) { return metal_threads; }

const ggml_metal_device_props * ggml_metal_device_get_props(ggml_metal_device_t) {
    static ggml_metal_device_props props = {};
    props.max_theadgroup_memory_size = 32 << 10;
    return &props;
}

// tensors do not begin where their buffer does
ggml_metal_buffer_id ggml_metal_buffer_get_id(ggml_metal_buffer_t, const ggml_tensor * t) { return { (char *) t->data - 64, 64 }; }

void ggml_metal_encoder_set_pipeline(ggml_metal_encoder_t encoder, ggml_metal_pipeline_with_params pipeline) { encoder->kernel = pipeline.pipeline; }

void ggml_metal_encoder_set_bytes(ggml_metal_encoder_t encoder, void * data, size_t size, int) { encoder->bytes.assign((uint8_t *) data, (uint8_t *) data + size); }

void ggml_metal_encoder_set_buffer(ggml_metal_encoder_t encoder, ggml_metal_buffer_id buffer, int index) { encoder->buffers[index] = (char *) buffer.metal + buffer.offs; }

void ggml_metal_encoder_set_threadgroup_memory_size(ggml_metal_encoder_t encoder, size_t size, int) { encoder->n_room = size/sizeof(float); }

void ggml_metal_encoder_memory_barrier(ggml_metal_encoder_t encoder) { encoder->running = false; }

void ggml_metal_encoder_dispatch_threadgroups(ggml_metal_encoder_t encoder, int n_x, int n_y, int n_z, int n, int, int) {
    encoder->n_races += encoder->running;
    encoder->running = true;

    auto * const * b = encoder->buffers;

    const auto team = [&](uint3 place) {
        std::vector<tiles::four_numbers> room(encoder->n_room/4 + 1, { NAN, NAN, NAN, NAN });
        std::vector<std::thread>         threads;
        barrier                          all(n);

        const auto run = [&](uint32_t i) {
            team_barrier = &all;
            encoder->kernel->function(encoder->bytes.data(), b[1], b[2], b[3], b[4], b[5], b[6], b[7], b[8], b[9], place, { (uint32_t) n, 1, 1 }, i, room[0].x);
        };
        for (int i = 1; i < n; ++i) {
            threads.emplace_back(run, i);
        }
        run(0);
        for (auto & t : threads) {
            t.join();
        }
    };
    for (uint32_t z = 0; z < (uint32_t) n_z; ++z) {
        for (uint32_t y = 0; y < (uint32_t) n_y; ++y) {
            for (uint32_t x = 0; x < (uint32_t) n_x; ++x) {
                team({ x, y, z });
            }
        }
    }
}

// what the hooks need of ggml
size_t ggml_row_size(ggml_type type, int64_t n) {
    return type == GGML_TYPE_Q8_0 ? n/32*34 : type == GGML_TYPE_F32 ? 4*n : 2*n;
}

void ggml_abort(const char * file, int line, const char * format, ...) {
    fprintf(stderr, "%s:%d: %s\n", file, line, format);
    abort();
}

// the call as a node of a graph. Returns the number of launches that did not wait for the one before; -1: the kernels refuse it
int metal_run(const tiles_call * in) {
    static const ggml_type TYPES[] = { GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_BF16, GGML_TYPE_Q8_0 };

    ggml_backend_buffer buffer = {};

    const auto tensor = [&](ggml_type type, const void * data, std::vector<int64_t> ne, std::vector<size_t> nb) {
        ggml_tensor res = {};
        res.type   = type;
        res.data   = const_cast<void *>(data);
        res.buffer = &buffer;
        for (int i = 0; i < 4; ++i) {
            res.ne[i] = i < (int) ne.size() ? ne[i] : 1;
            res.nb[i] = i < (int) nb.size() ? nb[i] : 0;
        }
        return res;
    };
    const int n_head   = in->n_head_kv*in->n_gqa;
    const int n_places = in->n_coded + in->n_held;

    const ggml_type type = TYPES[in->type_cache];
    const ggml_type mask = in->mask_is_half ? GGML_TYPE_F16 : GGML_TYPE_F32;

    const size_t size   = ggml_row_size(type, 1);
    const size_t head_k = ggml_row_size(type, in->n_k);
    const size_t head_v = ggml_row_size(type, in->n_v);

    ggml_tensor src[] = {
        tensor(GGML_TYPE_F32, in->q, { in->n_k, n_head, in->n_tokens }, { 4, 4ul*in->n_k, 4ul*in->n_k*n_head }),
        tensor(type, in->k, { in->n_k, in->n_head_kv, in->n_held }, { size, head_k, head_k*in->n_head_kv }),
        in->v_is_transposed ? tensor(type, in->v, { in->n_held, in->n_head_kv, in->n_v }, { size, size*in->n_v*in->n_held, size*in->n_held })
                            : tensor(type, in->v, { in->n_v, in->n_head_kv, in->n_held }, { size, head_v, head_v*in->n_head_kv }),
        tensor(mask, in->mask, { n_places, in->n_tokens }, { ggml_row_size(mask, 1), ggml_row_size(mask, n_places) }),
        tensor(GGML_TYPE_I8, in->codes_k, {}, {}),
        tensor(GGML_TYPE_I8, in->codes_v, {}, {}),
        tensor(GGML_TYPE_I64, in->exact, { in->n_coded }, {}),
        tensor(GGML_TYPE_I64, in->n_read, { in->n_head_kv }, {}),
        tensor(GGML_TYPE_F32, in->sinks, { n_head }, {}),
    };
    ggml_tensor node = tensor(GGML_TYPE_F32, nullptr, {}, {});
    node.op = GGML_OP_CUSTOM;

    *tiles::params_of(&node) = { tiles::NODE_TAG, in->pre_scale, in->soft_cap, in->post_scale, in->theta, TYPES[in->type_exact], TYPES[in->type_exact] };

    for (int i = 0; i < 9; ++i) {
        node.src[i] = i == tiles::SRC_SINKS && !in->sinks ? nullptr : &src[i];
    }
    if (!refreekv_metal_supports(nullptr, &node)) {
        return -1;
    }
    tiles::call c;
    tiles::call_of(&node, c);

    std::vector<tiles::four_numbers> memory(tiles::node_size(c)/4 + 1, { NAN, NAN, NAN, NAN });
    node.data = memory.data();

    ggml_metal_encoder encoder;
    if (refreekv_metal_encode(nullptr, &encoder, &node) != 1) {
        return -1;
    }
    memcpy(in->out, node.data, sizeof(float)*in->n_tokens*n_head*in->n_v);

    return encoder.n_races;
}

}
