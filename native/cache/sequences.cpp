// What operations on sequences do to a refreekv::store.

#include "cache/store.h"

#include "api/error.h"

#include <algorithm>
#include <limits>
#include <numeric>

namespace refreekv {

bool store::valid_seq(llama_seq_id seq_id) const {
    return seq_id >= 0 && (size_t) seq_id < pruned.size();
}

llama_pos store::pruned_pos(llama_seq_id seq_id) const {
    return pruned[seq_id];
}

// a sequence that has no cells any more
void store::forget_seq(llama_seq_id seq_id) {
    pruned[seq_id] = -1;
    spans[seq_id].clear();
    ring.forget(seq_id);
    turn.forget(seq_id);
}

void store::clear() {
    mover.synchronize();
    for (auto & layer : layers) {
        layer.rows.clear();
        layer.res.reset(logical.size());
        if (layer.warm) {
            layer.warm->clear();
        }
    }
    cold.reset(layers);
    for (llama_seq_id s = 0; s < logical.n_seq_ids(); ++s) {
        forget_seq(s);
    }

    n_expected    = 0;
    stale_slots   = false;
    layouts.make_stale();
    restoring     = true;
    n_generation++;
}

// f(sequence, whether all of it) for the sequences that positions p0.. are about to be removed from; stops at false
template <typename F>
bool store::for_removed(llama_seq_id seq_id, llama_pos p0, llama_pos p1, F && f) const {
    if (seq_id >= logical.n_seq_ids()) {
        return true; // upstream's to refuse
    }
    p0 = std::max(p0, 0);

    const llama_seq_id s0 = seq_id < 0 ? 0 : seq_id;
    const llama_seq_id s1 = seq_id < 0 ? logical.n_seq_ids() : seq_id + 1;

    for (llama_seq_id s = s0; s < s1; ++s) {
        const llama_pos pos_max = logical.table_of_seq(s).seq_pos_max(s);

        if (pos_max >= p0 && (p1 < 0 || p1 > p0) && !f(s, p0 <= logical.table_of_seq(s).seq_pos_min(s) && (p1 < 0 || p1 > pos_max))) {
            return false;
        }
    }

    return true;
}

// whether queries see all cells: what layers do not hold is warm
bool store::attends_to_all() const {
    return warm.theta() > 0.0f && std::all_of(layers.begin(), layers.end(), [&](const layer & layer) {
        return layer.res.n_visible() + (layer.warm ? layer.warm->n_cells() : 0) >= logical.n_used();
    });
}

bool store::may_seq_rm(llama_seq_id seq_id, llama_pos p0, llama_pos p1) {
    // all of it: the other part of the memory may still refuse
    return for_removed(seq_id, p0, p1, [&](llama_seq_id s, bool whole) {
        return whole || std::max(p0, 0) > pruned[s] || can_remove(s, p0, -1, -1);
    });
}

// part of a pruned sequence, from p0 on. gone0, gone1: what need not come back of it, because it goes
bool store::can_remove(llama_seq_id seq_id, llama_pos p0, llama_pos gone0, llama_pos gone1) {
    const llama_pos pos = pruned[seq_id];

    mover.synchronize();
    release_stale();

    if (attends_to_all() || restore_now(seq_id, gone0, gone1) >= 0) {
        return true;
    }
    const std::string why = refreekv_last_error();
    set_error("seq_rm: positions %d.. of sequence %d cannot be removed: the cache was pruned at position %d; "
            "only later positions or the whole sequence can (%s)", p0, seq_id, pos, why.c_str());

    return false;
}

bool store::on_seq_rm(llama_seq_id seq_id, llama_pos p0, llama_pos p1) {
    p0 = std::max(p0, 0);

    const bool allowed = for_removed(seq_id, p0, p1, [&](llama_seq_id s, bool whole) {
        if (seq_id < 0) {
            return whole || p0 > pruned[s] || can_remove(s, p0, -1, -1); // another sequence may still refuse
        }
        return whole || p0 > pruned[s] || can_remove(s, p0, p0, p1 < 0 ? std::numeric_limits<llama_pos>::max() : p1);
    });
    if (!allowed) {
        return false;
    }

    for_removed(seq_id, p0, p1, [&](llama_seq_id s, bool whole) {
        if (whole) {
            forget_seq(s);
            idle_rows = true;
        } else if (p1 < 0) {
            for (auto & [start, end] : spans[s]) {
                end = std::min(end, std::max(start, p0)); // what comes there next is something else
            }
        }
        stale_slots = true;
        return true;
    });

    return true;
}

bool store::may_seq_cp(llama_seq_id src, llama_seq_id dst, llama_pos p0, llama_pos p1) {
    const bool whole = p0 <= logical.table_of_seq(src).seq_pos_min(src) && (p1 < 0 || p1 > logical.table_of_seq(src).seq_pos_max(src));

    if (pruned[dst] >= 0 && logical.table_of_seq(dst).seq_pos_max(dst) >= 0) {
        set_error("seq_cp: sequence %d was pruned; remove it before copying into it", dst);
        return false;
    }
    if (logical.stream_of(src) != logical.stream_of(dst) && (p0 > 0 || p1 >= 0)) { // upstream would abort
        set_error("seq_cp: between streams only whole sequences can be copied (p0 = -1, p1 = -1)");
        return false;
    }
    if (!whole && pruned[src] >= 0 && restore_now(src) < 0) {
        const std::string why = refreekv_last_error();
        set_error("seq_cp: a part of sequence %d cannot be copied: the cache was pruned at position %d; only the whole sequence can (%s)", src, pruned[src], why.c_str());
        return false;
    }

    return true;
}

bool store::on_seq_cp(llama_seq_id src, llama_seq_id dst, llama_pos p0, llama_pos p1) {
    refused_copy = false;

    if (src == dst || !valid_seq(src) || !valid_seq(dst)) {
        return true; // nothing to do, or upstream's to refuse
    }

    const bool streams = logical.stream_of(src) != logical.stream_of(dst);

    const auto copies = [&]() { // called from upstream's function, which nothing may be thrown through
        try {
            return copy_stream(src, dst);
        } catch (const std::exception & err) {
            for (auto & layer : layers) {
                layer.res.release([&](uint32_t cell) { return logical.stream_of(dst) == cell/logical.stream_size(); });
            }
            kv.seq_rm(dst, -1, -1);
            set_error("seq_cp: %s; sequence %d is empty now", err.what(), dst);
            return false;
        }
    };

    if (!may_seq_cp(src, dst, p0, p1) || (streams && !copies())) {
        refused_copy = true;
        return false;
    }

    pruned[dst] = pruned[src];
    if (streams) {
        spans[dst].clear(); // nothing of it is left
    }
    spans[dst].insert(spans[dst].end(), spans[src].begin(), spans[src].end());
    ring.forget(dst);
    turn.copy(src, dst);

    layouts.make_stale();

    return true;
}

// Upstream is about to give the stream of dst the cells of src, at the same indices. Their rows are copied now: by the
// next batch, when upstream copies its own, the original may be gone or pruned.
bool store::copy_stream(llama_seq_id src, llama_seq_id dst) {
    const uint32_t first_src = logical.first_of(src);
    const uint32_t first_dst = logical.first_of(dst);

    const auto in_dst = [&](uint32_t cell) { return cell/logical.stream_size() == first_dst/logical.stream_size(); };

    mover.synchronize();
    release_stale();

    layouts.make_stale();

    std::vector<uint32_t> cells_dst(logical.stream_size());
    std::iota(cells_dst.begin(), cells_dst.end(), first_dst);

    for (auto & layer : layers) {
        layer.res.release(in_dst);
        cold.forget(layer, cells_dst);
    }
    warm.refresh(layers);

    const auto fail = [&]() {
        for (auto & layer : layers) {
            layer.res.release(in_dst);
        }
        kv.seq_rm(dst, -1, -1);
        set_error("seq_cp: no room for a copy of sequence %d; sequence %d is empty now", src, dst);
        return false;
    };

    for (auto & layer : layers) {
        auto slots = layer.used_slots();

        const size_t n_old = slots.size();

        std::vector<uint32_t> cells;
        for (uint32_t i = 0; i < logical.stream_size(); ++i) {
            const int32_t slot = layer.res.slot(first_src + i);
            if (slot >= 0 && !layer.res.hidden(slot)) {
                cells.push_back(first_dst + i);
                slots.push_back(slot);
            }
        }

        const uint32_t n_need = layouts.padded(slots.size());
        if (n_need > layer.rows.capacity() && !within_limit(stats().bytes + layer.rows.bytes_for(n_need) - layer.rows.bytes())) {
            return fail();
        }
        if (!mover.move(layer, slots, n_need)) {
            return fail();
        }

        slots.resize(n_old);
        layer.res.compact(slots);
        for (uint32_t cell : cells) {
            layer.res.assign(cell); // no holes are left: the slots behind, in this order
        }
    }
    copy_cold(first_src, first_dst);

    return true;
}

void store::on_seq_keep(llama_seq_id seq_id) {
    if (!valid_seq(seq_id)) {
        return; // upstream's to refuse
    }
    for (llama_seq_id s = 0; s < logical.n_seq_ids(); ++s) {
        // upstream keeps to the stream of the sequence
        if (s != seq_id && logical.stream_of(s) == logical.stream_of(seq_id)) {
            forget_seq(s);
        }
    }
    stale_slots   = true;
    layouts.make_stale();
    idle_rows     = true;
}

void store::refuse_shift(const char * op, llama_seq_id seq_id) const {
    set_error("%s: positions of sequence %d cannot change: a context with a KV policy does not shift (llama_memory_can_shift is false)", op, seq_id);
}

// slots of cells that upstream has emptied
void store::release_stale() {
    if (!stale_slots) {
        return;
    }
    for (auto & layer : layers) {
        if (layer.res.release([&](uint32_t cell) { return logical.is_empty(cell); })) {
            layouts.make_stale();
        }
    }
    if (cold.bytes() > 0) {
        std::vector<uint32_t> empty;
        for (uint32_t cell = 0; cell < logical.size(); ++cell) {
            if (logical.is_empty(cell)) {
                empty.push_back(cell);
            }
        }
        for (auto & layer : layers) {
            cold.forget(layer, empty);
        }
    }
    warm.refresh(layers);
    stale_slots = false;
}

// layouts

} // namespace refreekv
