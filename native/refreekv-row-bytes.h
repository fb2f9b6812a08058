#pragma once

#include "ggml-backend.h"

#include <cstdint>
#include <vector>

// The rows of a K or V tensor as bytes, cell after cell, wherever the tensor is and however it is laid out.
class refreekv_row_bytes {
public:
    // trans: cells lie along the first dimension
    refreekv_row_bytes(ggml_tensor * t, bool trans);

    size_t row() const { return n_bytes; } // of one cell

    // on a device: a copy of all of it comes before the first row is asked for, and goes back after the last was set
    void fetch();
    void send();

    // the rows in these slots, one after the other
    void get(const uint32_t * slots, size_t n, uint8_t * dst) const;
    void set(const uint32_t * slots, size_t n, const uint8_t * src);

private:
    ggml_tensor * t;
    const bool    trans;
    const size_t  n_bytes;
    const bool    host;

    std::vector<uint8_t> copy;

    uint8_t * base() const { return host ? (uint8_t *) t->data : const_cast<uint8_t *>(copy.data()); }
};
