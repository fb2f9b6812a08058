// Evicted rows on their way to the cold store and back.

#include "cache/store.h"

#include "tiers/cold-store.h"
#include "api/error.h"
#include "cache/parallel.h"
#include "cache/row-bytes.h"
#include "cache/runs.h"

#include "llama-context.h"
#include "llama-impl.h"

#include <algorithm>
#include <cstring>
#include <future>
#include <system_error>
#include <utility>

// that rows of one group pass through, on their way from a device and back: much of the time goes into memory that was never touched
static const uint32_t REFREEKV_COLD_THREADS = 4;

// rows that are about to be evicted
void refreekv_store::stash(group & g, std::vector<uint32_t> cells, eviction_scratch & scratch) {
    if (!cold) {
        return;
    }

    // a row never changes: what came back from a file is still there
    cells.erase(std::remove_if(cells.begin(), cells.end(), [&](uint32_t cell) { return g.is_cold[cell]; }), cells.end());
    std::sort(cells.begin(), cells.end());

    if (cells.empty()) {
        return;
    }

    std::vector<uint32_t> slots;
    for (uint32_t cell : cells) {
        slots.push_back(g.res.slot(cell));
    }

    if (!in_place(g)) {
        g.rows.read(slots, backend_of(g), params.by_graph, scratch.rows[0]);

        finish_put(scratch);
        std::swap(scratch.rows[0], scratch.rows[1]);

        // which rows a store with a limit has room for hangs on their order
        const uint32_t n_parts = params.cold_limit > 0 ? 1 : REFREEKV_COLD_THREADS;

        const auto put = [this, &g, &rows = scratch.rows[1], cells = std::move(cells), n_parts]() {
            const size_t n_part = (cells.size() + n_parts - 1)/n_parts;

            return refreekv_parallel(n_parts, n_parts, [&](uint32_t p, uint32_t) {
                const size_t first = std::min(cells.size(), p*n_part);

                refreekv_for_runs(cells.data() + first, std::min(cells.size() - first, n_part), [&](size_t i, size_t n) {
                    i += first;
                    return put_cold(g, cells[i], n, rows.k.data() + i*cache_row(g, false), rows.v.data() + i*cache_row(g, true));
                });
                return (int32_t) REFREEKV_OK; // what there is no room for is lost
            });
        };
        // a sketch is made of what the store has: that waits for it
        try {
            scratch.put = std::async(g.evicted ? std::launch::deferred : std::launch::async, put);
        } catch (const std::system_error &) {
            scratch.put = std::async(std::launch::deferred, put); // no more threads to be had
        }
        if (g.evicted) {
            finish_put(scratch);
        }
        return;
    }

    const refreekv_row_bytes k(g.rows.k(), false);
    const refreekv_row_bytes v(g.rows.v(), g.rows.get_shape().v_trans);

    std::vector<uint8_t> bytes_k;
    std::vector<uint8_t> bytes_v;

    refreekv_for_runs(cells, [&](size_t i, size_t n) {
        bytes_k.resize(n*k.row());
        bytes_v.resize(n*v.row());
        k.get(slots.data() + i, n, bytes_k.data());
        v.get(slots.data() + i, n, bytes_v.data());

        return put_cold(g, cells[i], n, bytes_k.data(), bytes_v.data());
    });
}

void refreekv_store::finish_put(eviction_scratch & scratch) {
    if (!scratch.put.valid()) {
        return;
    }
    // its error is another thread's
    if (const int32_t status = scratch.put.get()) {
        refreekv_set_error("no memory on the way to the cold store");
        scratch.put_status = status;
    }
}

// has evicted, or hides
bool refreekv_store::lacks(const group & g, uint32_t cell) const {
    const int32_t slot = g.res.slot(cell);
    return slot < 0 || g.res.hidden(slot);
}

// ascending
std::vector<uint32_t> refreekv_store::missing(const group & g, const std::vector<placed> & cells) const {
    std::vector<uint32_t> res;
    for (const auto & [_, cell] : cells) {
        if (lacks(g, cell)) {
            res.push_back(cell);
        }
    }
    std::sort(res.begin(), res.end());

    return res;
}

// in: memory for rows on their way to a device, that is kept from group to group
int32_t refreekv_store::bring_back(group & g, const std::vector<uint32_t> & cells, refreekv_rows::host_rows & in) {
    const auto no_memory = [&]() {
        refreekv_set_error("restore: no memory for %zu cells in layer %d", g.res.n_used() + cells.size(), g.il);
        return REFREEKV_ERR_MEMORY;
    };
    const auto not_there = [&]() {
        refreekv_set_error("restore: the cold store cannot be read any more (layer %d)", g.il);
        return REFREEKV_ERR_STATE;
    };

    std::vector<uint32_t> absent; // those that are not just hidden
    std::vector<uint8_t>  is_absent(n_cells, 0);
    for (uint32_t cell : cells) {
        if (g.res.slot(cell) < 0) {
            absent.push_back(cell);
            is_absent[cell] = 1;
        } else {
            g.res.assign(cell);
        }
    }
    if (absent.empty()) {
        return REFREEKV_OK;
    }

    // in the order of cells, as if nothing had been evicted
    std::vector<uint32_t> order;
    std::vector<uint32_t> slots_now;
    std::vector<uint32_t> slots; // of those that are absent, then
    for (uint32_t cell = 0; cell < n_cells; ++cell) {
        if (is_absent[cell]) {
            slots.push_back(order.size());
        } else if (g.res.slot(cell) < 0) {
            continue;
        }
        order.push_back(cell);
        slots_now.push_back(is_absent[cell] ? refreekv_rows::none : g.res.slot(cell));
    }

    if (!in_place(g)) {
        const size_t row_k = cache_row(g, false);
        const size_t row_v = cache_row(g, true);

        in.k.resize(absent.size()*row_k);
        in.v.resize(absent.size()*row_v);

        const size_t n_part = (absent.size() + REFREEKV_COLD_THREADS - 1)/REFREEKV_COLD_THREADS;

        const int32_t status = refreekv_parallel(REFREEKV_COLD_THREADS, REFREEKV_COLD_THREADS, [&](uint32_t p, uint32_t) {
            const size_t first = std::min(absent.size(), p*n_part);

            const std::vector<uint32_t> part(absent.begin() + first, absent.begin() + std::min(absent.size(), first + n_part));

            const bool ok = get_cold(g, false, part, [&](size_t i, size_t n, const uint8_t * bytes) { memcpy(in.k.data() + (first + i)*row_k, bytes, n*row_k); }) &&
                            get_cold(g, true,  part, [&](size_t i, size_t n, const uint8_t * bytes) { memcpy(in.v.data() + (first + i)*row_v, bytes, n*row_v); });

            return ok ? REFREEKV_OK : not_there();
        });
        if (status != REFREEKV_OK) {
            return status;
        }
        if (!move(g, slots_now, padded(order.size()), in)) {
            return no_memory();
        }
        g.res.arrange(order);

        return REFREEKV_OK;
    }

    if (!move(g, slots_now, padded(order.size()))) {
        return no_memory();
    }
    g.res.arrange(order);
    g.res.release([&](uint32_t cell) { return is_absent[cell]; }); // until their rows are there

    for (bool is_v : { false, true }) {
        refreekv_row_bytes rows(is_v ? g.rows.v() : g.rows.k(), is_v && g.rows.get_shape().v_trans);
        if (!get_cold(g, is_v, absent, [&](size_t i, size_t n, const uint8_t * bytes) { rows.set(slots.data() + i, n, bytes); })) {
            return not_there();
        }
    }
    for (uint32_t cell : absent) {
        g.res.assign(cell); // the free slots, lowest first
    }

    return REFREEKV_OK;
}

// cells: of each group
int32_t refreekv_store::bring_back(const std::vector<std::vector<uint32_t>> & cells) {
    std::vector<refreekv_rows::host_rows> in(n_threads());

    const int32_t status = refreekv_parallel(groups.size(), n_threads(), [&](uint32_t i, uint32_t thread) {
        return bring_back(groups[i], cells[i], in[thread]);
    });
    idle_rows |= status != REFREEKV_OK; // room for what did not come

    return status;
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
    const int64_t t_start = ggml_time_us();

    synchronize();
    release_stale();

    const auto all = cells_of(seq_id, p0, p1);

    std::vector<std::vector<uint32_t>> cells;

    uint64_t bytes      = stats().bytes;
    int64_t  n_restored = 0;

    for (auto & g : groups) {
        cells.push_back(missing(g, all));

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
        bytes += n_need > g.rows.capacity() ? g.rows.bytes_for(n_need) - g.rows.bytes() : 0;
        n_restored += cells.back().size();
    }
    if (!within_limit(bytes)) {
        return REFREEKV_ERR_MEMORY;
    }

    if (n_restored > 0) {
        stale_layouts = true;
        if (const int32_t status = bring_back(cells)) {
            refresh_sketches();
            return status;
        }

        n_restores++;
        restore_us += ggml_time_us() - t_start;

        if (cold && !cold->is_file()) {
            for (uint32_t i = 0; i < groups.size(); ++i) {
                forget_cold(groups[i], cells[i]); // in memory they would be there twice
            }
        }
        refresh_sketches();
    }

    // whoever shares these cells is whole again, too
    for (llama_seq_id s = 0; s < n_seq_ids(); ++s) {
        if (pruned[s] < 0 || kv.seq_to_stream[s] != kv.seq_to_stream[seq_id]) {
            continue;
        }
        const auto its   = s == seq_id ? all : cells_of(s);
        const bool whole = std::all_of(groups.begin(), groups.end(), [&](const group & g) {
            return std::none_of(its.begin(), its.end(), [&](const placed & c) { return lacks(g, c.cell); });
        });
        if (whole) {
            pruned[s]     = -1;
            stale_layouts = true;
        }
    }

    return n_restored;
}
