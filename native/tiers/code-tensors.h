#pragma once

#include "ggml-backend.h"
#include "ggml-cpp.h"

#include <cstddef>
#include <cstdint>
#include <functional>
#include <utility>
#include <vector>

namespace refreekv {

// Codes of the warm cells of one layer in ggml's own types, as tensors on the backend that the layer's cache is on. So the decoding graph
// attends to them with ggml's operations (graph/codes.h), and a backend needs no kernel of ours.
//
//   K  q8_0 [n_k, capacity, n_head_kv]  a line is a cell; n_k is rounded up to whole blocks of the type, with zeros
//   V  q5_1 [capacity, n_v, n_head_kv]  a line is a channel, so that numbers which share a scale are of one channel, and the
//                                       weighted sum over the cells is a matrix product. q4_1 in the last quarter of a model's
//                                       layers, where an error passes through few layers (docs/lab/backends.md)
//
// Each head is by itself, because some backends multiply with quantised matrices only where their lines lie behind each other.
// Cells are in blocks of 64. Lines of the capacity that have no codes are zeros: they are masked, but have to be finite.
//
// Where a device has our kernels (graph/device-node.h), it has the codes of these in their place (kernels/codes.h), [bytes of a block,
// capacity in blocks, n_head_kv] for K and for V, and the addresses of exact rows.
class code_tensors {
public:
    static constexpr ggml_type TYPE_K = GGML_TYPE_Q8_0;

    static ggml_type type_of_v(int32_t il, int32_t n_layers) { return 4*il < 3*n_layers ? GGML_TYPE_Q5_1 : GGML_TYPE_Q4_1; }

    static constexpr uint32_t N_CELLS = 64; // of a block

    // n_k, n_v: channels of a KV head. backend: that of the layer; nullptr: there is none yet. type_v: GGML_TYPE_I8: the codes are those of our
    // kernels
    code_tensors(ggml_backend_buffer_type_t buft, std::function<ggml_backend_t()> backend, int32_t il, ggml_type type_v, int64_t n_head_kv, int64_t n_k, int64_t n_v) :
        buft(buft), backend(std::move(backend)), il(il), type_v(type_v), n_head_kv(n_head_kv), n_k(n_k), n_v(n_v), by_heads(n_head_kv) {}

    bool for_kernels() const { return type_v == GGML_TYPE_I8; }

    // tensors of the form above, without memory
    struct pair {
        ggml_tensor * k;
        ggml_tensor * v;

        // only for our kernels
        ggml_tensor * exact;  // I64 [capacity in cells] the address of the exact row; 0: there is none
        ggml_tensor * n_read; // I64 [n_head_kv] exact rows that were read
    };
    static pair make_tensors(ggml_context * ctx, ggml_type type_v, int64_t n_head_kv, int64_t n_k, int64_t n_v, int64_t capacity);
    static pair make_kernel_tensors(ggml_context * ctx, int64_t n_head_kv, int64_t n_k, int64_t n_v, int64_t n_blocks);

    // nullptr: there is no room for any
    ggml_tensor * k()      const { return now.k; }
    ggml_tensor * v()      const { return now.v; }
    ggml_tensor * exact()  const { return now.exact; }
    ggml_tensor * n_read() const { return now.n_read; }

    // addresses [n_blocks][64] of exact rows, where they are others than before. No graph may run
    void set_exact(const std::vector<uint64_t> & addresses);

    // exact rows that have been read since the last time. No graph may run
    uint64_t take_n_read();

    ggml_backend_buffer_type_t buffer_type() const { return buft; }

    uint32_t capacity() const { return !now.k ? 0 : for_kernels() ? now.k->ne[1]*N_CELLS : now.k->ne[1]; } // cells
    size_t   bytes()    const { return now.buf ? ggml_backend_buffer_get_size(now.buf.get()) : 0; }

    // Room for n blocks. Throws std::bad_alloc, and nothing has changed then
    void reserve(uint32_t n);

    // Block i gets the codes of block order[i], and there is room for these and not for many more. Where the memory for that cannot be
    // had, they stay where there is more room
    void arrange(const std::vector<uint32_t> & order);

    // block dst[i] gets the codes of block src[i]
    void copy(const std::vector<uint32_t> & src, const std::vector<uint32_t> & dst);

    // Neighbouring blocks on their way from or to the host
    struct blocks {
        uint32_t n;
        std::vector<uint8_t> k; // [n_head_kv][n][64] lines; for our kernels: [n_head_kv][n] blocks
        std::vector<uint8_t> v; // [n_head_kv][n_v] lines of n*64 cells; for our kernels: [n_head_kv][n] blocks
    };
    blocks make(uint32_t n) const { return { n, std::vector<uint8_t>(n*n_head_kv*head_bytes(false)), std::vector<uint8_t>(n*n_head_kv*head_bytes(true)) }; }

    // block i of them gets the codes of n cells. k, v: cell after cell, stride_k and stride_v numbers apart
    void encode(blocks & to, uint32_t i, int64_t n, const float * k, int64_t stride_k, const float * v, int64_t stride_v) const;

    void set(uint32_t first, const blocks & from);
    void get(uint32_t first, blocks & to) const;

    int64_t   n_heads()    const { return n_head_kv; }
    ggml_type get_type_v() const { return type_v; }

    // of one KV head in a block
    size_t head_bytes(bool is_v) const { return is_v ? n_lines_v()*line_v(1) : block_k(); }

    // K and V
    static size_t head_bytes(ggml_type type_v, int64_t n_k, int64_t n_v) { return N_CELLS*line_k(n_k) + n_v*ggml_row_size(type_v, N_CELLS); }

private:
    const ggml_backend_buffer_type_t      buft;
    const std::function<ggml_backend_t()> backend;

    const int32_t   il;
    const ggml_type type_v;

    const int64_t n_head_kv;
    const int64_t n_k;
    const int64_t n_v;

    struct tensors : pair {
        ggml_context_ptr        ctx;
        ggml_backend_buffer_ptr buf;
    };
    tensors now = {};

    std::vector<uint64_t> sent_exact; // what `exact` has
    uint64_t              n_counted = 0; // of rows read, before there was more room
    std::vector<uint64_t> by_heads;      // [n_head_kv], room for what the device has counted

    static int64_t padded(int64_t n_k) { return GGML_PAD(n_k, ggml_blck_size(TYPE_K)); }

    static size_t line_k(int64_t n_k) { return ggml_row_size(TYPE_K, padded(n_k)); }

    // of n blocks. The codes of our kernels are one line for each head
    size_t  block_k() const;
    size_t  line_v(uint32_t n_blocks) const;
    int64_t n_lines_v() const { return for_kernels() ? 1 : n_v; }

    uint32_t n_room() const { return capacity()/N_CELLS; }

    tensors allocate(uint32_t n_blocks) const;
    void move_to(tensors && then, const std::vector<uint32_t> & order);
    void replace_by(tensors && then);

    // all of it to where there is more room, by a graph; false: the backend cannot do that
    bool copy_to(const tensors & then) const;
};

} // namespace refreekv
