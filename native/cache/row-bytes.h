#pragma once

#include "cache/pages.h"

#include "ggml-backend.h"

#include <cstdint>
#include <vector>

namespace refreekv {

// Which rows go where: slot i gets what slots[i] has. It is found before anything moves, since a failure between the moves of K and of V would
// leave rows that belong to no cell
struct row_moves {
    struct run {
        size_t to;
        size_t from;
        size_t n;
    };
    const std::vector<uint32_t> & slots; // has to outlive this
    std::vector<run>      runs;
    std::vector<uint32_t> others; // that have no source (row_bytes::none)
    std::vector<uint32_t> places; // with_spare: 0, 1, ...

    // with_spare: rows may have to pass through other memory
    row_moves(const std::vector<uint32_t> & slots, bool with_spare);
};

// The rows of a K or V tensor in host memory as bytes, cell after cell, however it is laid out: side by side, or one element
// in each line of a V that is transposed.
class row_bytes {
public:
    // trans: cells lie along the first dimension. t: nullptr: rows of no bytes
    row_bytes(const ggml_tensor * t, bool trans) : refreekv::row_bytes(t, trans, t ? t->data : nullptr) {}

    // base: a copy of all its bytes
    row_bytes(const ggml_tensor * t, bool trans, void * base);

    size_t row() const { return part*n_parts; } // of one cell

    // the rows in these slots, one after the other
    void get(const uint32_t * slots, size_t n, uint8_t * dst) const;
    void set(const uint32_t * slots, size_t n, const uint8_t * src);

    // slot i gets what slots[i] of another tensor has, which may lie in the same memory; none: it is passed over. Allocates nothing
    static constexpr uint32_t none = UINT32_MAX;

    void copy(const refreekv::row_bytes & src, const row_moves & moves, const refreekv::bytes & spare);

    // bytes of other memory that this takes, in the same memory
    size_t spare(const refreekv::row_bytes & src, const std::vector<uint32_t> & slots) const;

private:
    uint8_t * base;
    size_t    part;    // bytes that lie side by side
    size_t    n_parts; // of a cell
    size_t    line;    // from one part of a cell to the next

    // rows that can be moved in this order, and none is overwritten before it has been
    bool forward (const refreekv::row_bytes & src, const std::vector<uint32_t> & slots) const;
    bool backward(const refreekv::row_bytes & src, const std::vector<uint32_t> & slots) const;

    bool trans() const { return n_parts > 1; }

    uint8_t * at(uint32_t slot, size_t p = 0) const { return base + p*line + slot*part; }
};

} // namespace refreekv
