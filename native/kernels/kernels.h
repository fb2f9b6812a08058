#pragma once

#include "evict/attention-inputs.h"
#include "kernels/decode.h"
#include "policies/policy.h"

#include <memory>
#include <vector>

namespace refreekv {

// Our kernels for the CPU. They are compiled into ggml's CPU backend (CMakeLists.txt), not into libllama: so they have its
// instruction sets, and where ggml chooses among several builds of its backend at run time (GGML_CPU_ALL_VARIANTS), it chooses
// theirs, too.
struct kernels {
    // kernels/attention-cpu.cpp; nullptr: it cannot read these inputs. memory has to outlive the result
    std::unique_ptr<refreekv::attention> (*make_attention)(const attention_inputs & in, attention_scratch & memory);

    // kernels/decode.cpp: whether it can compute this call, and faster than upstream's operations: K and V in host memory, few
    // tokens, lengths that are multiples of the vectors'
    bool (*decode_fits)(const decode_call & call);

    // [n_embd_head_v*n_head, n_tokens] f32; nodes: all of it
    ggml_tensor * (*decode)(ggml_context * ctx, const decode_call & call, std::vector<ggml_tensor *> & nodes);

    // n numbers of a type that has a to_float
    void (*to_float)(ggml_type type, const uint8_t * src, float * dst, int64_t n);

    // kernels/codes.h
    bool (*codes_fit)(int64_t n_channels, int bits);
    void (*encode)(const float * rows, int64_t stride, int64_t n_cells, int64_t n_channels, int bits, bool is_v, uint8_t * dst);
};

// those of the CPU backend that is loaded; nullptr: it has none, because its compiler lacks vectors of fixed size
const refreekv::kernels * find_kernels();

} // namespace refreekv
