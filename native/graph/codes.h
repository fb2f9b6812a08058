#pragma once

#include "kernels/decode.h"

#include "ggml-backend.h"

#include <cstdint>

struct ggml_context;
struct ggml_tensor;

namespace refreekv {

// Attention to the cells that a layer holds and to those that it has in codes, by ggml's operations, in the place of build_attn_mha's: one
// soft-max over the scores of both.
struct codes_call {
    ggml_tensor * q;     // [n_embd_head_k, n_head, n_tokens] f32
    ggml_tensor * k;     // [n_embd_head_k, n_head_kv, n_kv], what the layer holds
    ggml_tensor * v;     // [n_embd_head_v, n_head_kv, n_kv], or [n_kv, n_head_kv, n_embd_head_v]
    ggml_tensor * mask;  // [capacity of the codes + n_kv, n_tokens]
    ggml_tensor * sinks; // [n_head] f32; nullptr: none

    const decode_softmax & softmax;

    ggml_tensor * codes_k; // tiers/code-tensors.h
    ggml_tensor * codes_v;
};

// A batch whose scores would take much memory is computed in parts, and in so many at most
static const int64_t CODES_PARTS = 16;

// nodes that the attention of a layer takes
static const int64_t CODES_NODES = 32*CODES_PARTS;

// [n_embd_head_v*n_head, n_tokens] f32
ggml_tensor * attend_to_codes(ggml_context * ctx, const codes_call & call);

// Whether a device has all operations for it, for a layer with codes of V in this type, and these numbers of heads and channels
bool device_attends_to_codes(ggml_backend_dev_t device, ggml_type type_v, int64_t n_head, int64_t n_head_kv, int64_t n_k, int64_t n_v, bool soft_cap);

} // namespace refreekv
