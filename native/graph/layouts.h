#pragma once

#include "cache/layer.h"
#include "cache/logical-cells.h"

#include <algorithm>
#include <cstdint>
#include <vector>

namespace refreekv {

// Layers whose slots look alike to every query that may still come share a layout: one mask and one pair of index inputs in
// the graph. Before anything is evicted there is one layout, and the graph is upstream's.
class layouts {
public:
    // use_alibi: queries can tell cells apart by their distance; n_pad: upstream's padding
    layouts(std::vector<layer> & layers, const logical_cells & logical, bool use_alibi, uint32_t n_pad);

    uint32_t n_layouts() const { return first_of.size(); }
    uint32_t n_kv(uint32_t layout) const; // cells that its graphs attend to, padding included

    // by default with upstream's padding of n_kv (llama_kv_cache::get_n_kv)
    uint32_t padded(uint32_t n) const;
    void     set_pad(uint32_t n) { pad = std::max(n, n_pad); }

    // Layouts that end in the same way: the mask of one is that of the longest from this slot on, and a new cell has the
    // same distance from the end in each. -1: it is none of them
    int64_t  tail_of(uint32_t layout)  const { return tails[layout]; }
    uint32_t layer_of_longest()        const { return first_of[longest]; }
    uint32_t layer_of_shortest()       const { return first_of[shortest]; } // of those that are tails

    // slots have changed in a way that layers may see differently
    void make_stale()     { stale = true; }
    bool is_stale() const { return stale; }

    // pruned: [n_seq_ids] the position that each sequence was pruned at, or -1
    // true when layers share masks in another way than before
    bool update(const std::vector<llama_pos> & pruned);

private:
    std::vector<layer> &  layers;
    const logical_cells & logical;
    const bool            use_alibi;
    const uint32_t        n_pad;
    uint32_t              pad;

    bool                  stale = true;
    std::vector<uint32_t> first_of; // [n_layouts] a layer that has it
    std::vector<int64_t>  tails;    // [n_layouts]
    uint32_t              longest  = 0;
    uint32_t              shortest = 0;

    bool same_from(const layer & a, uint32_t n, const layer & b, const std::vector<uint8_t> & settled) const;
};

} // namespace refreekv
