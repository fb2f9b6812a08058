#pragma once

#include "refreekv-pages.h"

#include "ggml-backend.h"
#include "ggml-cpp.h"

#include <cstdint>
#include <vector>

// The K and V rows of one group of KV heads: a buffer of their own on the layer's backend, with room for `capacity`
// cells. Growing, shrinking and evicting are one operation, move(): allocate, copy the rows that stay, free.
//
//   K  [n_embd_k, capacity]
//   V  [n_embd_v, capacity], or transposed [capacity, n_embd_v] (upstream's layout without flash attention)
//
// Rows move as bytes, so every cache type keeps its exact contents.
class refreekv_rows {
public:
    // fixed for the life of the object
    struct shape {
        ggml_backend_buffer_type_t buft;
        ggml_type type_k;
        ggml_type type_v;
        int64_t   n_embd_k;
        int64_t   n_embd_v;
        bool      v_trans;
    };

    refreekv_rows(const shape & s, int32_t il) : s(s), il(il) {}

    ggml_tensor * k = nullptr;
    ggml_tensor * v = nullptr;

    uint32_t capacity() const { return n_cap; }
    size_t   bytes()    const;              // as the allocator has them
    size_t   row_bytes() const;             // K and V of one cell
    const shape & get_shape() const { return s; }

    // a row without a source
    static constexpr uint32_t none = UINT32_MAX;

    // afterwards row i holds what row slots[i] held (none: nothing to rely on), and there is room for capacity rows; the
    // rest is zero.
    // backend: gathers the rows where they are not in host memory; without it, or when it cannot, they go through the host
    // false when the memory cannot be had: nothing has changed then
    bool move(const std::vector<uint32_t> & slots, uint32_t capacity, ggml_backend_t backend, bool force_graph);

    void clear();

    // test hook (refreekv_fail_allocation)
    static void fail_allocation(int32_t n);

private:
    shape    s;
    int32_t  il;
    uint32_t n_cap = 0;

    struct storage {
        refreekv_pages_ptr      pages { nullptr, { 0 } }; // freed after buf
        ggml_backend_buffer_ptr buf;
        ggml_context_ptr        ctx;
        ggml_tensor * k = nullptr;
        ggml_tensor * v = nullptr;
    } st;

    bool alloc(storage & dst, uint32_t capacity) const;
};
