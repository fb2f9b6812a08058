#include "graph/device-node.h"

#include "kernels/device/host.h"
#include "kernels/device/node.h"
#include "tiers/code-tensors.h"

#include "ggml-cpp.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <new>
#include <stdexcept>

namespace refreekv {

// What ggml calls where the node is on the CPU, as it is on the device of tests. Nothing can be thrown through its threads
static void compute_on_host(ggml_tensor * node, int ith, int, void * no_memory) {
    tiles::call c;
    if (ith != 0) {
        return;
    }
    if (!tiles::call_of(node, c)) {
        *(std::atomic<bool> *) no_memory = true; // attend_on_device() made none like this; the batch fails
        return;
    }
    try {
        tiles::for_pieces(c, [](const tiles::call & piece) { tiles::run(piece); });
    } catch (const std::bad_alloc &) {
        *(std::atomic<bool> *) no_memory = true;
    }
}

ggml_tensor * attend_on_device(ggml_context * ctx, const device_call & call, ggml_tensor *& node) {
    const auto & its = call.call;

    ggml_tensor * args[] = { its.q, its.k, its.v, its.mask, its.codes_k, its.codes_v, call.exact, call.n_read, its.sinks };

    const int n_args = its.sinks ? 9 : 8;

    const auto make = [&](int64_t size) {
        ggml_tensor * res = ggml_custom_4d(ctx, GGML_TYPE_F32, size, 1, 1, 1, args, n_args, compute_on_host, 1, its.softmax.no_memory);

        *tiles::params_of(res) = {
            tiles::NODE_TAG, its.softmax.pre_scale, its.softmax.soft_cap, its.softmax.post_scale, call.theta, call.exact_type_k, call.exact_type_v,
        };
        return res;
    };

    // how large it is depends on what it says
    tiles::call c;
    if (!tiles::call_of(make(1), c)) {
        throw std::runtime_error("our kernels for devices cannot attend to this layer");
    }
    node = make(tiles::node_size(c));

    return ggml_view_2d(ctx, node, (int64_t) c.s.n_v*c.s.n_head(), c.s.n_tokens, c.s.n_v*c.s.n_head()*sizeof(float), 0);
}

static bool asked_for() {
    const char * value = std::getenv("REFREEKV_DEVICE_KERNELS");

    return value && strcmp(value, "1") == 0;
}

bool device_has_kernels(ggml_backend_dev_t device, const device_layer & layer) {
    static const int64_t N_CELLS = 256;

    if (!asked_for() || !device || !ggml_backend_reg_get_proc_address(ggml_backend_dev_backend_reg(device), "refreekv_device_kernels")) {
        return false;
    }
    ggml_init_params params = { ggml_tensor_overhead()*32, nullptr, true };
    ggml_context_ptr ctx { ggml_init(params) };

    const auto cells = [&](ggml_type type, int64_t n) { return ggml_new_tensor_3d(ctx.get(), type, n, layer.n_head_kv, N_CELLS); };

    const auto codes = code_tensors::make_kernel_tensors(ctx.get(), layer.n_head_kv, layer.n_k, layer.n_v, N_CELLS/code_tensors::N_CELLS);

    // the shape that views::get_v() gives it
    ggml_tensor * v = layer.v_trans ? ggml_permute(ctx.get(), ggml_new_tensor_3d(ctx.get(), layer.type_v, N_CELLS, layer.n_v, layer.n_head_kv), 0, 2, 1, 3)
                                    : cells(layer.type_v, layer.n_v);
    const decode_softmax softmax = { 1.0f, 0.0f, 1.0f, 0.0f };

    ggml_tensor * node;
    attend_on_device(ctx.get(), { {
        ggml_new_tensor_3d(ctx.get(), GGML_TYPE_F32, layer.n_k, layer.n_head, 1), cells(layer.type_k, layer.n_k), v,
        ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F32, 2*N_CELLS, 1), nullptr, softmax, codes.k, codes.v,
    }, codes.exact, codes.n_read, 0.01f, layer.exact_type_k, layer.exact_type_v }, node);

    return ggml_backend_dev_supports_op(device, node);
}

} // namespace refreekv
