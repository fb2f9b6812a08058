#pragma once

#include "graph/codes.h"

#include "ggml-backend.h"

namespace refreekv {

// Attention to the cells that a layer holds and to those that it has in codes, as one node for our kernels on a device
// (kernels/device/node.h), in the place of attend_to_codes(). On CUDA it also reads exact rows where they are in host memory that the device
// can read.
//
// REFREEKV_DEVICE_KERNELS=1 asks for it. It has never run on a GPU.
struct device_call {
    codes_call call; // its codes are those of code_tensors with the kernel's format

    ggml_tensor * exact;  // [capacity of the codes] I64, see kernels/device/call.h
    ggml_tensor * n_read; // [n_head_kv] I64

    float     theta;
    ggml_type exact_type_k;
    ggml_type exact_type_v;
};

// [n_embd_head_v*n_head, n_tokens] f32. node: the operation itself, which is to run where the cache is
ggml_tensor * attend_on_device(ggml_context * ctx, const device_call & call, ggml_tensor *& node);

// Whether they were asked for, and a device has them for a layer with these numbers of heads and channels, and these types of its rows, in the
// cache and in host memory
struct device_layer {
    int64_t   n_head;
    int64_t   n_head_kv;
    int64_t   n_k;
    int64_t   n_v;
    ggml_type type_k;
    ggml_type type_v;
    ggml_type exact_type_k;
    ggml_type exact_type_v;
    bool      v_trans;
};
bool device_has_kernels(ggml_backend_dev_t device, const device_layer & layer);

} // namespace refreekv
