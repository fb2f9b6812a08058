// Evicted rows on their way to the cold store and back.

#include "refreekv-store.h"

#include "refreekv-cold.h"
#include "refreekv-error.h"

#include "llama-context.h"
#include "llama-impl.h"

#include <algorithm>
#include <cinttypes>
#include <cstring>

void refreekv_store::make_cold() {
    if (params.cold == REFREEKV_COLD_NONE) {
        return;
    }

    const bool on_host = std::all_of(layers.begin(), layers.end(), [](const layer & l) { return ggml_backend_buft_is_host(l.shape.buft); });
    const bool file    = params.cold == REFREEKV_COLD_FILE || (params.cold == REFREEKV_COLD_AUTO && on_host);

    try {
        cold = file ? std::make_unique<refreekv_cold>(params.cold_dir ? params.cold_dir : ".") : std::make_unique<refreekv_cold>();
    } catch (const std::exception & err) {
        if (params.cold == REFREEKV_COLD_FILE) {
            refreekv_set_error("%s", err.what());
            throw;
        }
        LLAMA_LOG_WARN("refreekv: %s; evicted rows are kept in memory\n", err.what());
        cold = std::make_unique<refreekv_cold>();
    }
}

// every cell of every group has a place of its own, K of a group before its V
void refreekv_store::place_cold() {
    uint64_t place = 0;
    for (auto & g : groups) {
        g.cold_place = place;
        g.is_cold.assign(cold ? n_cells : 0, 0);
        place += n_cells*(uint64_t) g.rows.row_bytes();
    }
    bytes_cold = 0;
    cold_full  = false;
    if (cold) {
        cold->clear();
    }
}

// rows that nobody will ask for again
void refreekv_store::forget_cold(group & g, const std::vector<uint32_t> & cells) {
    if (bytes_cold == 0) {
        return;
    }
    for (uint32_t cell : cells) {
        if (g.is_cold[cell]) {
            g.is_cold[cell] = 0;
            bytes_cold -= g.rows.row_bytes();
        }
    }
    if (bytes_cold == 0) {
        cold->clear();
    }
}

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

// f(i, n) for each run of n cells, one after the other, from the i-th on; f returns false to stop
template <typename F>
static bool refreekv_for_runs(const std::vector<uint32_t> & cells, F && f) {
    for (size_t i = 0, n = 0; i < cells.size(); i += n) {
        n = 1;
        while (i + n < cells.size() && cells[i + n] == cells[i] + n) {
            ++n;
        }
        if (!f(i, n)) {
            return false;
        }
    }
    return true;
}

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

    const auto & shape = g.rows.get_shape();

    refreekv_row_bytes k(g.rows.k, false);
    refreekv_row_bytes v(g.rows.v, shape.v_trans);
    k.fetch();
    v.fetch();

    const uint64_t first_v = g.cold_place + n_cells*(uint64_t) k.row();

    std::vector<uint8_t> bytes;

    const auto write = [&](refreekv_row_bytes & rows, uint64_t place, size_t i, size_t n) {
        bytes.resize(n*rows.row());
        for (size_t j = 0; j < n; ++j) {
            rows.get(g.res.slot(cells[i + j]), bytes.data() + j*rows.row());
        }
        return cold->write(place + cells[i]*(uint64_t) rows.row(), bytes.data(), bytes.size());
    };

    const bool ok = refreekv_for_runs(cells, [&](size_t i, size_t n) {
        const uint64_t more = n*g.rows.row_bytes();

        if ((params.cold_limit > 0 && bytes_cold + more > params.cold_limit) || !write(k, g.cold_place, i, n) || !write(v, first_v, i, n)) {
            return false;
        }
        std::fill_n(g.is_cold.begin() + cells[i], n, 1);
        bytes_cold += more;

        return true;
    });

    if (!ok && !cold_full) {
        LLAMA_LOG_WARN("refreekv: no room in the cold store (%" PRIu64 " MiB are there): what is evicted now is lost\n", bytes_cold >> 20);
    }
    cold_full |= !ok;
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

    const auto & shape = g.rows.get_shape();

    const size_t row_k = ggml_row_size(shape.type_k, shape.n_embd_k);
    const size_t row_v = ggml_row_size(shape.type_v, shape.n_embd_v);

    // before anything is touched
    std::vector<uint8_t> bytes_k(absent.size()*row_k);
    std::vector<uint8_t> bytes_v(absent.size()*row_v);

    const bool ok = refreekv_for_runs(absent, [&](size_t i, size_t n) {
        return cold->read(g.cold_place +                              absent[i]*(uint64_t) row_k, bytes_k.data() + i*row_k, n*row_k) &&
               cold->read(g.cold_place + n_cells*(uint64_t) row_k + absent[i]*(uint64_t) row_v, bytes_v.data() + i*row_v, n*row_v);
    });
    if (!ok) {
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
    refreekv_row_bytes v(g.rows.v, shape.v_trans);
    k.fetch();
    v.fetch();
    for (size_t i = 0; i < absent.size(); ++i) {
        k.set(g.res.slot(absent[i]), bytes_k.data() + i*row_k);
        v.set(g.res.slot(absent[i]), bytes_v.data() + i*row_v);
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
                refreekv_set_error("restore: rows of sequence %d in layer %d were not kept: %s", seq_id, g.il, !cold ? "this context has no cold store" : cold_full ? "the cold store had no room for all" : "they were evicted before the state was saved");
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

// A sequence in another stream is about to have the cells of this one: first_dst + i for first_src + i.
void refreekv_store::copy_cold(uint32_t first_src, uint32_t first_dst) {
    if (bytes_cold == 0) {
        return;
    }
    for (auto & g : groups) {
        const size_t row_k = ggml_row_size(g.rows.get_shape().type_k, g.rows.get_shape().n_embd_k);
        const size_t row_v = g.rows.row_bytes() - row_k;

        std::vector<uint8_t> bytes;

        const auto copy = [&](uint64_t place, size_t size, uint32_t i) {
            bytes.resize(size);
            return cold->read (place + (first_src + i)*(uint64_t) size, bytes.data(), size) &&
                   cold->write(place + (first_dst + i)*(uint64_t) size, bytes.data(), size);
        };

        for (uint32_t i = 0; i < kv_size; ++i) {
            if (!g.is_cold[first_src + i]) {
                continue;
            }
            const bool fits = params.cold_limit == 0 || bytes_cold + g.rows.row_bytes() <= params.cold_limit;
            if (fits && copy(g.cold_place, row_k, i) && copy(g.cold_place + n_cells*(uint64_t) row_k, row_v, i)) {
                g.is_cold[first_dst + i] = 1;
                bytes_cold += g.rows.row_bytes();
            } else {
                cold_full = true;
            }
        }
    }
}
