#include "cache/sequences.h"

#include "api/error.h"

#include <algorithm>
#include <limits>
#include <numeric>

namespace refreekv {

void sequences::clear() {
    p.mover.synchronize();
    for (auto & layer : p.layers) {
        layer.rows.clear();
        layer.res.reset(p.logical.size());
        if (layer.warm) {
            layer.warm->clear();
        }
    }
    p.cold.reset(p.layers);
    for (llama_seq_id s = 0; s < p.logical.n_seq_ids(); ++s) {
        p.forget_seq(s);
    }

    p.n_expected    = 0;
    p.stale_slots   = false;
    p.layouts.make_stale();
    p.emptied = true;
    p.n_generation++;
}

// f(sequence, whether all of it) for the sequences that positions p0.. are about to be removed from; stops at false
template <typename F>
bool sequences::for_removed(llama_seq_id seq_id, llama_pos p0, llama_pos p1, F && f) const {
    if (seq_id >= p.logical.n_seq_ids()) {
        return true; // upstream's to refuse
    }
    p0 = std::max(p0, 0);

    const llama_seq_id s0 = seq_id < 0 ? 0 : seq_id;
    const llama_seq_id s1 = seq_id < 0 ? p.logical.n_seq_ids() : seq_id + 1;

    for (llama_seq_id s = s0; s < s1; ++s) {
        const llama_pos pos_max = p.logical.table_of_seq(s).seq_pos_max(s);

        if (pos_max >= p0 && (p1 < 0 || p1 > p0) && !f(s, p0 <= p.logical.table_of_seq(s).seq_pos_min(s) && (p1 < 0 || p1 > pos_max))) {
            return false;
        }
    }

    return true;
}

// whether queries see all cells: what layers do not hold is warm
bool sequences::attends_to_all() const {
    return p.warm.exists() && std::all_of(p.layers.begin(), p.layers.end(), [&](const layer & layer) {
        return layer.res.n_visible() + (layer.warm ? layer.warm->n_cells() : 0) >= p.logical.n_used();
    });
}

bool sequences::may_remove(llama_seq_id seq_id, llama_pos p0, llama_pos p1) {
    // all of it: the other part of the memory may still refuse
    return for_removed(seq_id, p0, p1, [&](llama_seq_id s, bool whole) {
        return whole || std::max(p0, 0) > p.pruned[s] || can_remove(s, p0, -1, -1);
    });
}

// part of a pruned sequence, from p0 on. gone0, gone1: what need not come back of it, because it goes
bool sequences::can_remove(llama_seq_id seq_id, llama_pos p0, llama_pos gone0, llama_pos gone1) {
    const llama_pos pos = p.pruned[seq_id];

    p.mover.synchronize();
    p.release_stale();

    if (attends_to_all() || restore.run(seq_id, gone0, gone1) >= 0) {
        return true;
    }
    set_error("seq_rm: positions %d.. of sequence %d cannot be removed: the cache was pruned at position %d; "
            "only later positions or the whole sequence can (%s)", p0, seq_id, pos, last_error());

    return false;
}

bool sequences::remove(llama_seq_id seq_id, llama_pos p0, llama_pos p1) {
    p0 = std::max(p0, 0);

    const bool allowed = for_removed(seq_id, p0, p1, [&](llama_seq_id s, bool whole) {
        if (seq_id < 0) {
            return whole || p0 > p.pruned[s] || can_remove(s, p0, -1, -1); // another sequence may still refuse
        }
        return whole || p0 > p.pruned[s] || can_remove(s, p0, p0, p1 < 0 ? std::numeric_limits<llama_pos>::max() : p1);
    });
    if (!allowed) {
        return false;
    }

    for_removed(seq_id, p0, p1, [&](llama_seq_id s, bool whole) {
        if (whole) {
            p.forget_seq(s);
            p.idle_rows = true;
        } else if (p1 < 0) {
            p.pruned[s] = std::min(p.pruned[s], p0 - 1); // where what is missing of it has codes
            for (auto & [start, end] : p.spans[s]) {
                end = std::min(end, std::max(start, p0)); // what comes there next is something else
            }
        }
        p.exact[s] = std::min<uint32_t>(p.exact[s], p0);
        p.stale_slots = true;
        return true;
    });

    return true;
}

bool sequences::may_copy(llama_seq_id src, llama_seq_id dst, llama_pos p0, llama_pos p1) {
    const bool whole = p0 <= p.logical.table_of_seq(src).seq_pos_min(src) && (p1 < 0 || p1 > p.logical.table_of_seq(src).seq_pos_max(src));

    if (p.pruned[dst] >= 0 && p.logical.table_of_seq(dst).seq_pos_max(dst) >= 0) {
        set_error("seq_cp: sequence %d was pruned; remove it before copying into it", dst);
        return false;
    }
    if (p.logical.stream_of(src) != p.logical.stream_of(dst) && (p0 > 0 || p1 >= 0)) { // upstream would abort
        set_error("seq_cp: between streams only whole sequences can be copied (p0 = -1, p1 = -1)");
        return false;
    }
    if (!whole && p.pruned[src] >= 0 && restore.run(src) < 0) {
        set_error("seq_cp: a part of sequence %d cannot be copied: the cache was pruned at position %d; only the whole sequence can (%s)", src, p.pruned[src], last_error());
        return false;
    }

    return true;
}

bool sequences::copy(llama_seq_id src, llama_seq_id dst, llama_pos p0, llama_pos p1) {
    refused_copy = true; // until it is known that it is not

    if (src == dst || !p.valid_seq(src) || !p.valid_seq(dst)) {
        refused_copy = false;
        return true; // nothing to do, or upstream's to refuse
    }

    const bool streams = p.logical.stream_of(src) != p.logical.stream_of(dst);

    const auto copies = [&]() { // called from upstream's function, which nothing may be thrown through
        try {
            if (copy_stream(src, dst)) {
                return true;
            }
            set_error("seq_cp: no room for a copy of sequence %d; sequence %d is empty now (%s)", src, dst, last_error());
        } catch (const std::exception & err) {
            set_error("seq_cp: %s; sequence %d is empty now", err.what(), dst);
        }
        empty_stream(dst);
        p.idle_rows = true;
        p.kv.seq_rm(dst, -1, -1);
        return false;
    };

    if (!may_copy(src, dst, p0, p1) || (streams && !copies())) {
        return false;
    }

    if (streams) {
        p.spans[dst].clear(); // nothing of it is left
    }
    p.spans[dst].insert(p.spans[dst].end(), p.spans[src].begin(), p.spans[src].end());
    p.pruned[dst] = p.pruned[src];
    p.exact [dst] = p0 > 0 ? 0 : p1 < 0 ? p.exact[src] : std::min<uint32_t>(p.exact[src], p1);
    p.loaded[dst] |= p.loaded[src];
    p.ring.forget(dst);
    p.turn.copy(src, dst);

    p.layouts.make_stale();
    refused_copy = false;

    return true;
}

// forgets what layers and tiers have of the stream of a sequence
void sequences::empty_stream(llama_seq_id seq_id) {
    const uint32_t stream = p.logical.first_of(seq_id)/p.logical.stream_size();

    std::vector<uint32_t> cells(p.logical.stream_size());
    std::iota(cells.begin(), cells.end(), p.logical.first_of(seq_id));

    for (auto & layer : p.layers) {
        layer.res.release([&](uint32_t cell) { return cell/p.logical.stream_size() == stream; });
        p.cold.forget(layer, cells);
        if (layer.warm && layer.warm->keep([&](uint32_t cell) { return cell/p.logical.stream_size() != stream; })) {
            p.n_generation++;
        }
    }
    p.layouts.make_stale();
}

// Upstream is about to give the stream of dst the cells of src, at the same indices. Their rows are copied now: by the
// next batch, when upstream copies its own, the original may be gone or pruned.
bool sequences::copy_stream(llama_seq_id src, llama_seq_id dst) {
    const uint32_t first_src = p.logical.first_of(src);
    const uint32_t first_dst = p.logical.first_of(dst);

    p.mover.synchronize();
    p.release_stale();

    empty_stream(dst);

    for (auto & layer : p.layers) {
        auto slots = layer.used_slots();

        const size_t n_old = slots.size();

        std::vector<uint32_t> cells;
        for (uint32_t i = 0; i < p.logical.stream_size(); ++i) {
            const int32_t slot = layer.res.slot(first_src + i);
            if (slot >= 0 && !layer.res.hidden(slot)) {
                cells.push_back(first_dst + i);
                slots.push_back(slot);
            }
        }

        const uint32_t n_need = p.layouts.padded(slots.size());
        if (n_need > layer.rows.capacity() && !p.within_limit(p.bytes() + layer.rows.bytes_for(n_need) - layer.rows.bytes())) {
            return false;
        }
        if (!p.mover.move(layer, slots, n_need)) {
            set_error("no memory for %u cells in layer %d", n_need, layer.il);
            return false;
        }

        slots.resize(n_old);
        layer.res.compact(slots);
        for (uint32_t cell : cells) {
            layer.res.assign(cell); // no holes are left: the slots behind, in this order
        }
    }
    p.copy_cold(first_src, first_dst);

    return p.has_room_for_codes();
}

void sequences::keep(llama_seq_id seq_id) {
    if (!p.valid_seq(seq_id)) {
        return; // upstream's to refuse
    }
    for (llama_seq_id s = 0; s < p.logical.n_seq_ids(); ++s) {
        // upstream keeps to the stream of the sequence
        if (s != seq_id && p.logical.stream_of(s) == p.logical.stream_of(seq_id)) {
            p.forget_seq(s);
        }
    }
    p.stale_slots   = true;
    p.layouts.make_stale();
    p.idle_rows     = true;
}

bool sequences::can_shift() const {
    // codes of cells whose rows are gone would keep the old positions
    const bool codes_only = p.warm.exists() && !p.cold.exists();

    // ggml cannot turn keys in bf16
    return !codes_only && std::none_of(p.layers.begin(), p.layers.end(), [](const layer & layer) { return layer.type(false) == GGML_TYPE_BF16; });
}

bool sequences::may_shift(const char * op, llama_seq_id seq_id) {
    if (!p.valid_seq(seq_id)) {
        set_error("%s: there is no sequence %d", op, seq_id);
        return false;
    }
    if (!p.kv.get_can_shift()) {
        set_error("%s: positions of sequence %d cannot change: llama_memory_can_shift is false for this context", op, seq_id);
        return false;
    }
    for (llama_seq_id s = 0; s < p.logical.n_seq_ids(); ++s) {
        if (p.pruned[s] < 0 || p.logical.stream_of(s) != p.logical.stream_of(seq_id)) {
            continue;
        }
        const auto cells = p.logical.of_seq(s);
        if (s != seq_id && std::none_of(cells.begin(), cells.end(), [&](const placed & c) { return p.logical.seq_has(c.cell, seq_id); })) {
            continue;
        }
        // without a cold store what was evicted is gone, and nothing has to be turned
        if (p.cold.exists() && restore.run(s) < 0) {
            set_error("%s: positions of sequence %d cannot change: the cache was pruned at position %d (%s)", op, seq_id, p.pruned[s], last_error());
            return false;
        }
        if (s != seq_id && p.pruned[s] >= 0) {
            set_error("%s: positions of sequence %d cannot change: sequence %d was pruned and shares cells with it", op, seq_id, s);
            return false;
        }
    }
    return true;
}

bool sequences::shift(const char * op, llama_seq_id seq_id, llama_pos p0, llama_pos p1, const position_fn & to) {
    const auto moved = [&](llama_pos pos) {
        return pos < std::max(p0, 0) || (p1 >= 0 && pos >= p1) ? pos : to(pos);
    };

    refused_shift = true; // until it is known that it is not

    std::vector<uint32_t> cells;
    if (p.valid_seq(seq_id)) {
        for (const auto & [pos, cell] : p.logical.of_seq(seq_id)) {
            if (moved(pos) != pos) {
                cells.push_back(cell);
            }
        }
        if (cells.empty()) {
            refused_shift = false;
            return true;
        }
    }

    if (!may_shift(op, seq_id)) {
        return false;
    }

    for (auto & layer : p.layers) {
        p.cold.forget(layer, cells);
    }

    // upstream moves a cell for all sequences that have it
    for (llama_seq_id s = 0; s < p.logical.n_seq_ids(); ++s) {
        if (p.logical.stream_of(s) != p.logical.stream_of(seq_id) ||
                std::none_of(cells.begin(), cells.end(), [&](uint32_t cell) { return p.logical.seq_has(cell, s); })) {
            continue;
        }
        if (p.pruned[s] >= 0) {
            p.pruned[s] = std::max(-1, moved(p.pruned[s]));
        }
        p.exact[s] = std::min<uint32_t>(p.exact[s], std::max(p0, 0)); // the others were read behind what is gone
        for (auto & [start, end] : p.spans[s]) {
            end   = end > start ? moved(end - 1) + 1 : moved(end);
            start = moved(start);
        }
        p.ring.forget(s); // its queries were turned by their old positions
        p.turn.shift(s);
    }

    p.stale_slots = true; // upstream removes what gets a position below 0
    p.layouts.make_stale();
    refused_shift = false;

    return true;
}

} // namespace refreekv
