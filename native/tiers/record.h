#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace refreekv {

// The row of one cell in the cold store, as bytes: K and V of each KV head are beside each other, so that one read fetches what one
// head wants (without V where that is a part of K). At the end are the bytes that a row has beyond its heads, since upstream may pad V.
struct record {
    size_t row_k   = 0; // bytes of the whole row of K
    size_t row_v   = 0;
    size_t n_heads = 1; // KV heads
    size_t head_k  = 0; // bytes of K of one KV head
    size_t head_v  = 0;

    size_t bytes() const { return row_k + row_v; }
    size_t head()  const { return head_k + head_v; }

    // records of n rows of K and of V
    void join(const uint8_t * k, const uint8_t * v, size_t n, uint8_t * records) const {
        for_pieces(n, [&](size_t at_k, size_t at_v, size_t at, size_t n_k, size_t n_v) {
            memcpy(records + at, k + at_k, n_k);
            if (n_v > 0) {
                memcpy(records + at + n_k, v + at_v, n_v);
            }
        });
    }

    // and back
    void split(const uint8_t * records, size_t n, uint8_t * k, uint8_t * v) const {
        for_pieces(n, [&](size_t at_k, size_t at_v, size_t at, size_t n_k, size_t n_v) {
            memcpy(k + at_k, records + at, n_k);
            if (n_v > 0) {
                memcpy(v + at_v, records + at + n_k, n_v);
            }
        });
    }

private:
    template <typename F>
    void for_pieces(size_t n, F && f) const {
        const size_t more_k = row_k - n_heads*head_k;
        const size_t more_v = row_v - n_heads*head_v;

        for (size_t i = 0; i < n; ++i) {
            const size_t first = i*bytes();

            for (size_t h = 0; h < n_heads; ++h) {
                f(i*row_k + h*head_k, i*row_v + h*head_v, first + h*head(), head_k, head_v);
            }
            if (more_k + more_v > 0) {
                f((i + 1)*row_k - more_k, (i + 1)*row_v - more_v, first + n_heads*head(), more_k, more_v);
            }
        }
    }
};

} // namespace refreekv
