#pragma once

#include "evict/attention-inputs.h"
#include "policies/policy.h"

namespace refreekv {

// The attention of a layer's stored queries, computed on the layer's backend. What comes back to the host is one
// float per cell (scores) and one per block, row and head (block_sums); or, where the policy is the caller's, all (read).
//
// Where the backend has no kernel for K as it is stored (a view of quantised heads, on Vulkan), K is dequantised first; where it
// lacks another one, K and the queries come to the host. supports_op decides.
//
// Heads are taken in slices, so that the scratch memory stays below a bound whatever the context is. When one slice holds
// them all, which is the usual case, the rows are computed once and kept for both questions.
class attention_graph : public refreekv::attention {
public:
    // memory has to outlive it
    attention_graph(attention_inputs in, attention_scratch & memory);

    bool scores(join heads, std::vector<float> & out) override;
    bool read(float * out) override;
    bool block_sums(const std::vector<int32_t> & block, uint32_t n_blocks, bool squared, std::vector<float> & out) override;

private:
    attention_inputs in;

    // what the mask is made of on the backend: it would be far more to upload
    std::vector<float> slot_pos; // [n_kv] of cells; of other slots a position behind all rows
    std::vector<float> row_pos;  // [n_rows]

    std::vector<float> alibi_mask; // [n_kv, n_rows] with ALiBi, in their place

    int64_t n_head_kv_slice; // KV heads per slice

    bool unsupported = false; // the backend has no kernel for the last graph
    bool dequantise  = false;

    std::vector<int32_t> all_slots; // for that

    ggml_context_ptr        host_ctx; // K and the queries, once they are there
    ggml_backend_buffer_ptr host_buf;

    // tensors to be filled before a graph runs, and with what
    using uploads = std::vector<std::pair<ggml_tensor *, const void *>>;

    attention_scratch & memory;

    // a graph that has run; its result stays until another of its kind does
    struct computed {
        int              kind;
        ggml_context_ptr ctx;
        ggml_tensor *    out = nullptr;
    };
    computed softmax { 0, {} }; // the rows of the last slice, [n_kv, n_rows, heads of the slice]

    template <typename F>
    bool for_each_slice(F && f);

    bool scores_now(join heads, std::vector<float> & out);
    bool read_now(float * out);
    bool block_sums_now(const std::vector<int32_t> & block, uint32_t n_blocks, bool squared, std::vector<float> & out);

    // f() again and again, until it has no want of a kernel
    template <typename F>
    bool by_any_way(F && f);

    bool next_way();

    void read_back(std::vector<float> & out, const ggml_tensor * t);

    ggml_tensor * build_mask   (ggml_context * ctx, uploads & ups) const;
    ggml_tensor * build_softmax(ggml_context * ctx, int64_t h_kv, int64_t n_kv_heads, uploads & ups) const;

    // f(ctx, uploads) builds
    template <typename F>
    bool compute(computed & res, F && f);
};

} // namespace refreekv
