#pragma once

#include "ggml.h"

#include <cstdint>
#include <vector>

// What stays of the keys that one group of KV heads has evicted: 4 bits a number. Cells that are
// neighbours, but for those that stayed, make a block; in each block every channel has its least number and its step. (Neither bounds
// per channel nor 4 bits per row tell enough: docs/fidelity.md.)
class refreekv_sketch {
public:
    static const uint32_t n_cells = 64; // of a block, at most

    struct block {
        std::vector<uint32_t> cells; // as they were sketched
        uint64_t              there; // bit i: cells[i] is still evicted
    };

    // of a cell's key: channels
    void reset(int64_t n_embd);

    // memory for so many blocks more, and not for twice as many, as it would grow by itself
    void reserve(size_t n_more);

    // a block; keys: [n_embd] of each of its cells
    void add(const std::vector<uint32_t> & cells, const float * keys);

    // cells first_dst + i get what first_src + i have, for i < n
    void copy(uint32_t first_src, uint32_t first_dst, uint32_t n);

    // a cell for which evicted(cell) is false is no part of its block any more. Whether there was one
    template <typename F>
    bool keep(F && evicted) {
        bool any = false;
        for (auto & b : blocks) {
            for (size_t i = 0; i < b.cells.size(); ++i) {
                if ((b.there >> i & 1) && !evicted(b.cells[i])) {
                    b.there &= ~(1ull << i);
                    any = true;
                }
            }
        }
        if (any) {
            drop_empty();
        }
        return any;
    }

    uint32_t      n_blocks()            const { return blocks.size(); }
    const block & operator[](uint32_t i) const { return blocks[i]; }

    size_t bytes() const;

    // of block i and channel d: the number of cell j is about least + step*code, its code in the lower half of codes[j] for
    // j < n_cells/2, else in the upper half of codes[j - n_cells/2]
    struct channel {
        ggml_fp16_t least;
        ggml_fp16_t step;
    };
    const channel * channels(uint32_t i)            const { return &all_channels[i*n_embd]; }
    const uint8_t * codes   (uint32_t i, int64_t d) const { return &all_codes[(i*n_embd + d)*n_cells/2]; }

private:
    int64_t n_embd = 0;

    std::vector<block>   blocks;
    std::vector<channel> all_channels; // [n_blocks][n_embd]
    std::vector<uint8_t> all_codes;    // [n_blocks][n_embd][n_cells/2]

    void drop_empty();
};
