#pragma once

#include "ggml-backend.h"

#include <cstdint>

// The rows of a K or V tensor in host memory as bytes, cell after cell, however it is laid out.
class refreekv_row_bytes {
public:
    // trans: cells lie along the first dimension
    refreekv_row_bytes(ggml_tensor * t, bool trans);

    size_t row() const { return n_bytes; } // of one cell

    // the rows in these slots, one after the other
    void get(const uint32_t * slots, size_t n, uint8_t * dst) const;
    void set(const uint32_t * slots, size_t n, const uint8_t * src);

private:
    ggml_tensor * t;
    const bool    trans;
    const size_t  n_bytes;

    uint8_t * base() const { return (uint8_t *) t->data; }
};
