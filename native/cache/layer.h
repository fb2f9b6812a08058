#pragma once

#include "cache/residency.h"
#include "cache/rows.h"
#include "kernels/decode.h"
#include "tiers/record.h"
#include "tiers/warm-cells.h"

#include <cstdint>
#include <memory>
#include <vector>

namespace refreekv {

// A layer of the model that attends to the cells of a layer of the cache
struct reader {
    int32_t il;

    ggml_tensor * ring = nullptr; // its last queries; nullptr: the policy does not look at them

    // of its attention, seen when the decoding graph is built
    ggml_tensor * sinks = nullptr;
    bool          known = true;
};

// A layer of the model that has K and V in the cache. It holds its own subset of the logical cells, in rows of its own.
struct layer {
    layer(int32_t il, const rows::shape & shape, ggml_backend_buffer_t no_memory) : il(il), readers { { il } }, rows(shape, il), no_memory(no_memory) {}

    int32_t  il;
    uint32_t layout = 0;

    std::vector<reader> readers; // itself, and then those layers that have no K and V of their own and share its

    refreekv::residency res;
    refreekv::rows      rows;

    ggml_backend_buffer_t no_memory; // that says which backend tensors without memory are on

    // of the attention of all its readers, seen when the decoding graph is built
    float          kq_scale = 0.0f;
    decode_softmax softmax  = {};

    uint64_t             cold_place = 0; // of its records in the cold store, by cell (cold_rows)
    refreekv::record     record;         // the form of one of them
    std::vector<uint8_t> is_cold;        // [n_cells] whether the cold store has the row of a cell, and where (cold_rows); 0: it has not

    std::unique_ptr<warm_cells> warm; // evicted cells that decoding goes on attending to; nullptr: it attends to none of them

    // false: V is the beginning of K, and has no rows (multi-head latent attention)
    bool has_v() const { return rows.get_shape().n_embd_v > 0; }

    // of its rows; v: V, else K
    ggml_type type    (bool v) const { return v ? rows.get_shape().type_v : rows.get_shape().type_k; }
    int64_t   n_embd  (bool v) const { return v ? rows.get_shape().n_embd_v : rows.get_shape().n_embd_k; }
    size_t    row_size(bool v) const { return ggml_row_size(type(v), n_embd(v)); } // bytes

    // whether no query sees the cell: it was evicted, or is hidden
    bool lacks(uint32_t cell) const {
        const int32_t slot = res.slot(cell);
        return slot < 0 || res.hidden(slot);
    }

    std::vector<uint32_t> all_slots()  const;
    std::vector<uint32_t> used_slots() const;
};

} // namespace refreekv
