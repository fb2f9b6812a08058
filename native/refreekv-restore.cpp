// Evicted rows on their way to the cold store and back.

#include "refreekv-store.h"

#include "refreekv-cold.h"
#include "refreekv-error.h"
#include "refreekv-runs.h"

#include "llama-context.h"
#include "llama-impl.h"

#include <algorithm>
#include <cstring>

// Rows of K or V by cell: n bytes of each, wherever the tensor is and however it is laid out.
class refreekv_row_bytes {
public:
    refreekv_row_bytes(ggml_tensor * t, bool trans) :
        t(t), trans(trans), n(trans ? t->ne[1]*t->nb[0] : t->nb[1]), host(ggml_backend_buffer_is_host(t->buffer)) {
        if (!host) {
            bytes.resize(ggml_nbytes(t));
        }
    }

    size_t row() const { return n; }

    void fetch() {
        if (!host) {
            ggml_backend_tensor_get(t, bytes.data(), 0, bytes.size());
        }
    }

    void send() {
        if (!host) {
            ggml_backend_tensor_set(t, bytes.data(), 0, bytes.size());
        }
    }

    void get(uint32_t slot, uint8_t * dst) { for_parts(slot, dst, [](uint8_t * ours, uint8_t * theirs, size_t size) { memcpy(theirs, ours, size); }); }
    void set(uint32_t slot, uint8_t * src) { for_parts(slot, src, [](uint8_t * ours, uint8_t * theirs, size_t size) { memcpy(ours, theirs, size); }); }

private:
    ggml_tensor * t;
    const bool    trans;
    const size_t  n;
    const bool    host;

    std::vector<uint8_t> bytes; // a copy of all of it, when it is on a device

    template <typename F>
    void for_parts(uint32_t slot, uint8_t * row, F && f) {
        uint8_t * base = host ? (uint8_t *) t->data : bytes.data();
        if (!trans) {
            f(base + slot*n, row, n);
            return;
        }
        const size_t size = t->nb[0];
        for (int64_t j = 0; j < t->ne[1]; ++j) {
            f(base + j*t->nb[1] + slot*size, row + j*size, size);
        }
    }
};

// rows that are about to be evicted
void refreekv_store::stash(group & g, std::vector<uint32_t> cells) {
    if (!cold) {
        return;
    }

    // a row never changes: what came back from a file is still there
    cells.erase(std::remove_if(cells.begin(), cells.end(), [&](uint32_t cell) { return g.is_cold[cell]; }), cells.end());
    std::sort(cells.begin(), cells.end());

    if (cells.empty()) {
        return;
    }

    refreekv_row_bytes k(g.rows.k, false);
    refreekv_row_bytes v(g.rows.v, g.rows.get_shape().v_trans);
    k.fetch();
    v.fetch();

    std::vector<uint8_t> bytes_k;
    std::vector<uint8_t> bytes_v;

    refreekv_for_runs(cells, [&](size_t i, size_t n) {
        bytes_k.resize(n*k.row());
        bytes_v.resize(n*v.row());
        for (size_t j = 0; j < n; ++j) {
            k.get(g.res.slot(cells[i + j]), bytes_k.data() + j*k.row());
            v.get(g.res.slot(cells[i + j]), bytes_v.data() + j*v.row());
        }
        return put_cold(g, cells[i], n, bytes_k.data(), bytes_v.data());
    });
}

// the cells of a sequence that a group has lost, ascending; where(pos): only these
std::vector<uint32_t> refreekv_store::missing(llama_seq_id seq_id, const group & g, const std::function<bool(llama_pos)> & where) const {
    std::vector<uint32_t> res;
    for (const auto & [pos, index] : table_of_seq(seq_id).seq_pos_get(seq_id)) {
        const uint32_t cell = kv.seq_to_stream[seq_id]*kv_size + index;
        const int32_t  slot = g.res.slot(cell);
        if ((slot < 0 || g.res.hidden(slot)) && where(pos)) {
            res.push_back(cell);
        }
    }
    std::sort(res.begin(), res.end());

    return res;
}

int32_t refreekv_store::bring_back(group & g, const std::vector<uint32_t> & cells) {
    std::vector<uint32_t> absent; // those that are not just hidden
    for (uint32_t cell : cells) {
        if (g.res.slot(cell) < 0) {
            absent.push_back(cell);
        } else {
            g.res.assign(cell);
        }
    }
    if (absent.empty()) {
        return REFREEKV_OK;
    }

    // before anything is touched
    std::vector<uint8_t> bytes_k(absent.size()*cold_row(g, false));
    std::vector<uint8_t> bytes_v(absent.size()*cold_row(g, true));

    const auto get = [&](bool v, std::vector<uint8_t> & rows) {
        return get_cold(g, v, absent, [&](size_t i, size_t n, const uint8_t * bytes) { memcpy(rows.data() + i*cold_row(g, v), bytes, n*cold_row(g, v)); });
    };
    if (!get(false, bytes_k) || !get(true, bytes_v)) {
        refreekv_set_error("restore: the cold store cannot be read any more");
        return REFREEKV_ERR_STATE;
    }

    // in the order of cells, as if nothing had been evicted
    std::vector<std::pair<uint32_t, uint32_t>> order; // (cell, slot now)
    for (uint32_t slot : used_slots(g)) {
        order.emplace_back(g.res.cell(slot), slot);
    }
    for (uint32_t cell : absent) {
        order.emplace_back(cell, refreekv_rows::none);
    }
    std::sort(order.begin(), order.end());

    std::vector<uint32_t> slots;
    std::vector<uint32_t> order_cells;
    for (const auto & [cell, slot] : order) {
        order_cells.push_back(cell);
        slots.push_back(slot);
    }

    if (!move(g, slots, padded(slots.size()))) {
        refreekv_set_error("restore: no memory for %zu cells in layer %d", slots.size(), g.il);
        return REFREEKV_ERR_MEMORY;
    }
    g.res.arrange(order_cells);

    refreekv_row_bytes k(g.rows.k, false);
    refreekv_row_bytes v(g.rows.v, g.rows.get_shape().v_trans);
    k.fetch();
    v.fetch();
    for (size_t i = 0; i < absent.size(); ++i) {
        k.set(g.res.slot(absent[i]), bytes_k.data() + i*k.row());
        v.set(g.res.slot(absent[i]), bytes_v.data() + i*v.row());
    }
    k.send();
    v.send();

    return REFREEKV_OK;
}

int64_t refreekv_store::restore(llama_context * lctx, llama_seq_id seq_id) {
    return run_job(lctx, [this, seq_id]() {
        const int64_t res = restore_now(seq_id);
        if (stale_layouts) {
            update_layouts();
        }
        return res;
    });
}

// but for positions that are about to go: p0 to p1 - 1. Called from upstream's functions, which nothing may be thrown through
int64_t refreekv_store::restore_now(llama_seq_id seq_id, llama_pos p0, llama_pos p1) {
    try {
        return bring_back(seq_id, p0, p1);
    } catch (const std::exception & err) {
        refreekv_set_error("restore: %s", err.what());
        return REFREEKV_ERR_MEMORY;
    }
}

int64_t refreekv_store::bring_back(llama_seq_id seq_id, llama_pos p0, llama_pos p1) {
    const auto where = [&](llama_pos pos) { return pos < p0 || pos >= p1; };

    const int64_t t_start = ggml_time_us();

    synchronize();
    release_stale();

    std::vector<std::vector<uint32_t>> cells;

    uint64_t bytes      = stats().bytes;
    int64_t  n_restored = 0;

    for (auto & g : groups) {
        cells.push_back(missing(seq_id, g, where));

        uint32_t n_absent = 0;
        for (uint32_t cell : cells.back()) {
            if (g.res.slot(cell) >= 0) {
                continue;
            }
            if (!cold || !g.is_cold[cell]) {
                refreekv_set_error("restore: rows of sequence %d in layer %d were not kept: %s", seq_id, g.il, !cold ? "this context has no cold store" : cold_full ? "the cold store had no room for all" : "the state that was loaded did not have them");
                return REFREEKV_ERR_STATE;
            }
            n_absent++;
        }

        const uint32_t n_need = padded(g.res.n_used() + n_absent);
        bytes += n_need > g.rows.capacity() ? (uint64_t) (n_need - g.rows.capacity())*g.rows.row_bytes() : 0;
        n_restored += cells.back().size();
    }
    if (!within_limit(bytes)) {
        return REFREEKV_ERR_MEMORY;
    }

    for (uint32_t i = 0; i < groups.size() && n_restored > 0; ++i) {
        stale_layouts = true;
        if (const int32_t status = bring_back(groups[i], cells[i])) {
            return status;
        }
    }

    if (n_restored > 0) {
        n_restores++;
        restore_us += ggml_time_us() - t_start;

        if (cold && !cold->is_file()) {
            for (uint32_t i = 0; i < groups.size(); ++i) {
                forget_cold(groups[i], cells[i]); // in memory they would be there twice
            }
        }
    }

    // whoever shares these cells is whole again, too
    for (llama_seq_id s = 0; s < n_seq_ids(); ++s) {
        if (pruned[s] < 0 || kv.seq_to_stream[s] != kv.seq_to_stream[seq_id]) {
            continue;
        }
        const bool whole = std::all_of(groups.begin(), groups.end(), [&](const group & g) {
            return missing(s, g, [&](llama_pos pos) { return s != seq_id || where(pos); }).empty();
        });
        if (whole) {
            pruned[s]     = -1;
            stale_layouts = true;
        }
    }

    return n_restored;
}
