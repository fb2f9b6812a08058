#pragma once

#include "cache/pages.h"
#include "kernels/warm.h"
#include "tiers/code-tensors.h"
#include "tiers/record.h"

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

namespace refreekv {

class cold_store;

// the index of the lowest bit that is set; x is not 0
static inline int64_t lowest_bit(uint64_t x) {
#if defined(__GNUC__)
    return __builtin_ctzll(x);
#else
    int64_t i = 0;
    while (!(x >> i & 1)) {
        ++i;
    }
    return i;
#endif
}

// The warm cells of one layer: cells that left the cache, and whose K and V are held in codes, in blocks of 64 cells. A block is freed
// once none of its cells is warm any more. The codes are
//
// - those of our kernel (kernels/codes.h), in host memory. The exact rows of warm cells are in the cold store, and decoding reads some of
//   them (view.read), from several threads;
// - or tensors of the layer's backend (tiers/code-tensors.h), for ggml's operations. No exact rows are read.
class warm_cells {
public:
    // n_k, n_v: channels of a KV head; bits_v: 0: V is a part of K, and has no codes of its own. The caller sets what `view` has of the
    // soft-max and theta, and `exact`
    warm_cells(int64_t n_head_kv, int64_t n_k, int64_t n_v, int bits_k, int bits_v);

    explicit warm_cells(std::unique_ptr<code_tensors> tensors);

    // nullptr: the codes are those of our kernel
    code_tensors * get_tensors() const { return tensors.get(); }

    warm_cells(const warm_cells &) = delete;

    void clear();

    // room for n blocks more, so that they come at once. Throws std::bad_alloc
    void reserve(size_t n);

    // Adds a block of at most 64 cells. Their numbers have to be less than 65536 apart. The caller then writes the codes (codes_of) and
    // calls note_steps(), or writes them to the tensors. there: bit i: cell i is warm. Throws std::bad_alloc, and nothing has changed then
    void add(const uint32_t * cells, size_t n, uint64_t there);
    void add(const uint32_t * cells, size_t n) { add(cells, n, ~0ull >> (64 - n)); }

    // of the block that was added last
    uint8_t * codes_of(int64_t h_kv, bool is_v) { return is_v ? codes_v.back() + h_kv*view.next_head_v : codes_k.back() + h_kv*view.next_head_k; }
    void note_steps() { note_steps(n_blocks() - 1); }

    const uint8_t * codes_of(uint32_t block, int64_t h_kv, bool is_v) const { return is_v ? codes_v[block] + h_kv*view.next_head_v : codes_k[block] + h_kv*view.next_head_k; }
    size_t head_bytes(bool is_v) const { return is_v ? bytes_v : bytes_k; } // of one KV head in a block
    size_t block_bytes()         const { return n_head_kv*(bytes_k + bytes_v); }

    // the codes of a block, head after head, those of K before those of V
    void get_codes(uint32_t block, uint8_t * dst) const;
    void set_codes(uint32_t block, const uint8_t * src);

    // whether it has the same cells at the same places as another layer's
    bool alike(const warm_cells & other) const;

    static bool may_share(uint32_t lowest, uint32_t highest) { return highest - lowest < 1 << 16; }

    // cells first_dst + i get what first_src + i have, for i < n
    void copy(uint32_t first_src, uint32_t first_dst, uint32_t n);

    // Cells for which is_warm(cell) is false are no longer warm. Returns whether there were any
    template <typename F>
    bool keep(F && is_warm) {
        bool any = false;
        for (size_t b = 0; b < blocks.size(); ++b) {
            for (uint64_t left = there[b]; left; left &= left - 1) {
                const int64_t i = lowest_bit(left);
                if (!is_warm(cell(b, i))) {
                    there[b] &= ~(1ull << i);
                    any = true;
                }
            }
        }
        drop_empty(); // also those of a time when there was no memory for it
        return any;
    }

    // Cells of a block for which alike(a, b) is false come to lie in blocks of their own. Returns whether there were any. Where there is no
    // memory for them, they are no longer warm
    template <typename F>
    bool split(F && alike) {
        bool any = false;
        for (size_t b = 0, n = blocks.size(); b < n; ++b) {
            const uint32_t first = first_cell(b);

            uint64_t others = 0;
            for (uint64_t left = there[b]; left; left &= left - 1) {
                const int64_t i = lowest_bit(left);
                others |= (uint64_t) !alike(first, cell(b, i)) << i;
            }
            if (others) {
                any = true;
                move_to_new(b, others); // and that one is looked at, too
                n = blocks.size();
            }
        }
        return any;
    }

    // the places that a mask has for its tensors, used or not; 0: no cells of it are in tensors
    uint32_t n_places()                      const { return tensors && !blocks.empty() ? tensors->capacity() : 0; }

    uint32_t n_blocks()                      const { return blocks.size(); }
    uint32_t n_cells()                       const; // that are warm
    uint64_t cells_there(uint32_t block)     const { return there[block]; } // bit i: its cell i is warm

    std::vector<uint8_t> cells(uint32_t n_cells) const; // [n_cells] whether each is warm
    uint32_t cell(uint32_t block, int64_t i) const { return blocks[block].lowest + blocks[block].behind[i]; }
    uint32_t first_cell(uint32_t block)      const { return cell(block, lowest_bit(there[block])); } // that is warm

    size_t bytes() const;

    warm_view            view = {};
    std::vector<uint8_t> visible; // [n_tokens][n_blocks]

    // where the exact rows are
    struct {
        const cold_store * store = nullptr;
        uint64_t           place = 0;        // of the layer's cell 0
        refreekv::record   record;
        const uint8_t *    there = nullptr;  // [n_cells] whether the store has the row of a cell
        bool               readable = false; // by this process, as it was when the batch began
    } exact;

    warm_counts counts;

    // the cold store could not be read
    mutable std::atomic<bool> is_lost { false };

private:
    struct block {
        uint32_t lowest; // cell
        uint16_t behind[64];

        bool operator==(const block & other) const { return lowest == other.lowest && std::equal(behind, behind + 64, other.behind); }
    };

    const int64_t n_head_kv;
    const size_t  bytes_k; // codes of one KV head in a block
    const size_t  bytes_v;

    const std::unique_ptr<code_tensors> tensors;

    std::vector<block>              blocks;
    std::vector<float>              largest_steps; // [n_head_kv][n_k]
    std::vector<uint64_t>           there; // bit i of a block: its cell i is warm
    std::vector<uint8_t *>          codes_k; // of KV head 0
    std::vector<uint8_t *>          codes_v;
    std::vector<pages_ptr> slabs;   // memory of codes: of some blocks the K of each KV head, and then the V

    void copy_codes(const std::vector<uint32_t> & src, const std::vector<uint32_t> & dst);
    void move_to_new(uint32_t block, uint64_t cells);
    void note_steps(uint32_t block);
    void drop_empty();
    void update_view();
    uint64_t read(uint32_t block, uint64_t cells, uint32_t head, uint8_t * rows) const;
};

} // namespace refreekv
