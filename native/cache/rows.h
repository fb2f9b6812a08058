#pragma once

#include "cache/pages.h"
#include "cache/region.h"
#include "cache/row-bytes.h"

#include "ggml-backend.h"
#include "ggml-cpp.h"

#include <cstdint>
#include <vector>

namespace refreekv {

// The K and V rows of one layer: memory of their own on the layer's backend, with room for `capacity` cells.
// Growing, shrinking and evicting are one operation, move(). In host memory and on CUDA it is done in place (cache/region.h):
// rows move within their memory, which grows before that or shrinks after it. Elsewhere it is: allocate, copy the rows that stay,
// free.
//
//   K  [n_embd_k, capacity]
//   V  [n_embd_v, capacity], or transposed [capacity, n_embd_v] (upstream's layout without flash attention); n_embd_v = 0: there is none,
//      and V is the beginning of K (multi-head latent attention)
//
// Rows move as bytes, so every cache type keeps its exact contents. On a device its backend gathers them, and what stays never
// comes to the host. Where the backend lacks a kernel for that, all rows go through host memory; bytes_bounced() counts them.
class rows {
public:
    // fixed for the life of the object
    struct shape {
        ggml_backend_buffer_type_t buft;
        ggml_type type_k;
        ggml_type type_v;
        int64_t   n_embd_k;
        int64_t   n_embd_v;
        bool      v_trans;
        uint32_t  max_cells; // that capacity() can be
    };

    rows(const shape & s, int32_t il) : s(s), il(il) {}

    ggml_tensor * k() const { return now.k; }
    ggml_tensor * v() const { return now.v; } // nullptr: there is none

    uint32_t capacity() const { return n_cap; }
    size_t   bytes()    const;              // as the allocator has them
    size_t   bytes_for(uint32_t capacity);  // what they would be
    size_t   row_bytes() const;             // K and V of one cell
    const shape & get_shape() const { return s; }

    // rows in host memory: cell after cell, however the tensors lie
    struct host_rows {
        refreekv::bytes k;
        refreekv::bytes v;
    };

    // a row without a source here
    static constexpr uint32_t none = row_bytes::none;

    // afterwards row i holds what row slots[i] held (none: the next row of `in`, which has one for each or
    // nothing at all), and there is room for capacity rows; the rest is zero, or what was there.
    // backend: gathers rows that are not in host memory
    // false when the memory cannot be had: nothing has changed then
    bool move(const std::vector<uint32_t> & slots, uint32_t capacity, ggml_backend_t backend, bool force_graph, const host_rows & in = {});

    // copies of these rows; on a device just they cross to the host
    void read(const std::vector<uint32_t> & slots, ggml_backend_t backend, bool force_graph, host_rows & out);

    void clear();

    uint64_t bytes_bounced() const { return n_bounced; }

private:
    shape    s;
    int32_t  il;
    uint32_t n_cap = 0;
    bool     no_regions = false; // there can be none

    uint64_t n_bounced = 0;

    // where they lie: in regions, or in a buffer
    std::unique_ptr<refreekv::region> region_k;
    std::unique_ptr<refreekv::region> region_v;
    ggml_backend_buffer_ptr          buf;

    // tensors of them
    struct layout {
        ggml_context_ptr ctx;
        ggml_tensor * k = nullptr;
        ggml_tensor * v = nullptr;
        size_t size_k = 0; // bytes, as the buffer type needs them
        size_t size_v = 0;
    };
    layout now;

    size_t behind_k = 0; // bytes that the buffer type wants behind K and V
    size_t behind_v = 0;

    layout make_layout(uint32_t capacity) const;

    bool has_regions(); // made when they are first asked for
    bool resize_regions(size_t size_k, size_t size_v); // both, or false

    bool move_in_place(const std::vector<uint32_t> & slots, layout && then, bool grows, ggml_backend_t backend, bool force_graph, const host_rows & in);
    bool move_to_new  (const std::vector<uint32_t> & slots, layout && then, ggml_backend_t backend, bool force_graph, const host_rows & in);

    refreekv::bytes spare; // see spare_bytes()
    size_t spare_bytes(const layout & then, const std::vector<uint32_t> & slots) const;

    void move(const layout & then, const std::vector<uint32_t> & slots, ggml_backend_t backend, bool force_graph, const host_rows & in);

    // one of K and V
    void move(ggml_tensor * src, ggml_tensor * dst, bool trans, const row_moves & moves, ggml_backend_t backend, bool force_graph, const refreekv::bytes & in);
    void read(ggml_tensor * src, bool trans, const std::vector<uint32_t> & slots, ggml_backend_t backend, bool force_graph, refreekv::bytes & out);
};

} // namespace refreekv
