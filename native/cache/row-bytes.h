#pragma once

#include "cache/pages.h"

#include "ggml-backend.h"

#include <cstdint>
#include <vector>

namespace refreekv {

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

    // slot i gets what slots[i] of another tensor has, which may lie in the same memory; none: it is passed over
    static constexpr uint32_t none = UINT32_MAX;

    void copy(const refreekv::row_bytes & src, const std::vector<uint32_t> & slots, const refreekv::bytes & spare);

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
