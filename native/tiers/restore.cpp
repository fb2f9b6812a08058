#include "tiers/restore.h"

#include "api/error.h"
#include "cache/parallel.h"

#include "ggml.h"

#include <algorithm>
#include <exception>

namespace refreekv {

// ascending
static std::vector<uint32_t> missing(const layer & layer, const std::vector<placed> & cells) {
    std::vector<uint32_t> res;
    for (const auto & [_, cell] : cells) {
        if (layer.lacks(cell)) {
            res.push_back(cell);
        }
    }
    std::sort(res.begin(), res.end());

    return res;
}

// cells: of each layer
int32_t restoration::restore_rows(const std::vector<std::vector<uint32_t>> & cells) {
    std::vector<rows::host_rows> in(p.mover.n_threads());

    const int32_t status = run_parallel(p.layers.size(), p.mover.n_threads(), [&](uint32_t i, uint32_t thread) {
        return p.transfer.get(p.layers[i], cells[i], in[thread]);
    });
    p.idle_rows |= status != REFREEKV_OK; // room for what did not come

    return status;
}

int64_t restoration::run(llama_seq_id seq_id, llama_pos p0, llama_pos p1, uint32_t n_more) {
    try {
        return restore_rows(seq_id, p0, p1, n_more);
    } catch (const std::exception & err) {
        p.stale_slots = true; // codes of rows that came back all the same
        set_error("restore: %s", err.what());
        return REFREEKV_ERR_MEMORY;
    }
}

int64_t restoration::restore_rows(llama_seq_id seq_id, llama_pos p0, llama_pos p1, uint32_t n_more) {
    const int64_t t_start = ggml_time_us();

    p.mover.synchronize();
    p.release_stale();

    const auto all = p.logical.of_seq(seq_id, p0, p1);

    std::vector<std::vector<uint32_t>> cells;

    uint64_t bytes      = p.bytes();
    int64_t  n_restored = 0;

    for (auto & layer : p.layers) {
        cells.push_back(missing(layer, all));

        uint32_t n_absent = 0;
        for (uint32_t cell : cells.back()) {
            if (layer.res.slot(cell) >= 0) {
                continue;
            }
            if (!p.cold.has(layer, cell)) {
                set_error("restore: rows of sequence %d in layer %d were not kept: %s", seq_id, layer.il, !p.cold.exists() ? "this context has no cold store" : p.cold.lost() ? "the cold store had no room for all" : "the state that was loaded did not have them");
                return REFREEKV_ERR_STATE;
            }
            n_absent++;
        }

        const uint32_t n_need = p.layouts.padded(layer.res.n_used() + n_absent + n_more);
        bytes += n_need > layer.rows.capacity() ? layer.rows.bytes_for(n_need) - layer.rows.bytes() : 0;
        n_restored += cells.back().size();
    }
    if (!p.within_limit(bytes)) {
        return REFREEKV_ERR_MEMORY;
    }

    if (n_restored > 0) {
        p.layouts.make_stale();
        if (const int32_t status = restore_rows(cells)) {
            p.warm.refresh(p.layers);
            return status;
        }

        p.n_restores++;
        p.restore_us += ggml_time_us() - t_start;

        for (uint32_t i = 0; i < p.layers.size() && p.cold.exists(); ++i) {
            p.cold.forget_copies(p.layers[i], cells[i]);
        }
        p.warm.refresh(p.layers);
    }

    // whoever shares these cells is whole again, too
    for (llama_seq_id s = 0; s < p.logical.n_seq_ids(); ++s) {
        if (p.pruned[s] < 0 || p.logical.stream_of(s) != p.logical.stream_of(seq_id)) {
            continue;
        }
        const auto its   = s == seq_id ? all : p.logical.of_seq(s);
        const bool whole = std::all_of(p.layers.begin(), p.layers.end(), [&](const layer & layer) {
            return std::none_of(its.begin(), its.end(), [&](const placed & c) { return layer.lacks(c.cell); });
        });
        if (whole) {
            p.pruned[s] = -1;
            p.exact [s] = p.keeps_exact_rows() ? p.exact[s] : 0;
            p.layouts.make_stale();
        }
    }

    return n_restored;
}

} // namespace refreekv
