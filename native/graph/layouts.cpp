#include "graph/layouts.h"

#include <algorithm>

namespace refreekv {

layouts::layouts(std::vector<layer> & layers, const logical_cells & logical, bool use_alibi, uint32_t n_pad) :
    layers(layers), logical(logical), use_alibi(use_alibi), n_pad(n_pad), pad(std::max(n_pad, 256u)) {}

uint32_t layouts::padded(uint32_t n) const {
    return GGML_PAD(n, pad);
}

uint32_t layouts::n_kv(uint32_t layout) const {
    return padded(std::max(1u, layers[first_of[layout]].res.n_slots()));
}

// Whether layer b can use layer a's mask from slot n on, now and for every token to come. Slot by slot they hold the same cell, or two cells
// that no query can tell apart any more: settled, and of the same sequences. And new cells take the slots that correspond.
bool layouts::same_from(const layer & a, uint32_t n, const layer & b, const std::vector<uint8_t> & settled) const {
    if (a.res.n_slots() != b.res.n_slots() + n) {
        return false;
    }

    for (uint32_t s = 0; s < n; ++s) {
        if (a.res.cell(s) < 0) {
            return false; // one would go there
        }
    }

    for (uint32_t s = 0; s < b.res.n_slots(); ++s) {
        const int32_t ca = a.res.cell(n + s);
        const int32_t cb = b.res.cell(s);

        if (a.res.hidden(n + s) != b.res.hidden(s)) {
            return false;
        }
        if (ca != cb && (ca < 0 || cb < 0 || !settled[ca] || !settled[cb] || !logical.alike(ca, cb))) {
            return false;
        }
    }

    return true;
}

// true when layers share masks in another way than before
bool layouts::update(const std::vector<llama_pos> & pruned) {
    // a cell is settled once it lies behind the position at which its sequences were pruned: every query to come sees it
    // (with ALiBi the distance still matters)
    std::vector<uint8_t> settled(logical.size(), !use_alibi);

    for (llama_seq_id s = 0; s < logical.n_seq_ids(); ++s) {
        const auto &   seq_pos = logical.table_of_seq(s).seq_pos_get(s);
        const uint32_t first   = logical.first_of(s);
        for (auto it = seq_pos.rbegin(); it != seq_pos.rend() && it->first > pruned[s]; ++it) {
            settled[first + it->second] = 0;
        }
    }

    first_of.clear();

    bool others = false;

    for (uint32_t i = 0; i < layers.size(); ++i) {
        uint32_t l = 0;
        while (l < first_of.size() && !(layers[first_of[l]].rows.capacity() == layers[i].rows.capacity() && same_from(layers[first_of[l]], 0, layers[i], settled))) {
            ++l;
        }
        if (l == first_of.size()) {
            first_of.push_back(i);
        }
        others |= layers[i].layout != l;

        layers[i].layout = l;
    }

    const auto n_slots = [&](uint32_t l) { return layers[first_of[l]].res.n_slots(); };

    longest = 0;
    for (uint32_t l = 1; l < first_of.size(); ++l) {
        longest = n_slots(l) > n_slots(longest) ? l : longest;
    }

    tails.assign(first_of.size(), -1);
    shortest = longest;
    for (uint32_t l = 0; l < first_of.size(); ++l) {
        const uint32_t n = n_slots(longest) - n_slots(l);

        // the padding behind them is to be the same
        if (n_kv(longest) - n_kv(l) == n && same_from(layers[first_of[longest]], n, layers[first_of[l]], settled)) {
            tails[l] = n;
            shortest = n_slots(l) < n_slots(shortest) ? l : shortest;
        }
    }

    stale = false;

    return others;
}

} // namespace refreekv
