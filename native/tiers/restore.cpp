// Evicted rows on their way to the cold store and back.

#include "cache/store.h"

#include "api/error.h"
#include "cache/parallel.h"
#include "cache/row-bytes.h"
#include "cache/runs.h"
#include "tiers/cold-store.h"

#include "llama-context.h"
#include "llama-impl.h"

#include <algorithm>
#include <cstring>
#include <future>
#include <system_error>
#include <utility>

namespace refreekv {

// ascending
std::vector<uint32_t> store::missing(const layer & layer, const std::vector<placed> & cells) const {
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
int32_t store::restore_rows(const std::vector<std::vector<uint32_t>> & cells) {
    std::vector<rows::host_rows> in(mover.n_threads());

    const int32_t status = run_parallel(layers.size(), mover.n_threads(), [&](uint32_t i, uint32_t thread) {
        return transfer.get(layers[i], cells[i], in[thread]);
    });
    idle_rows |= status != REFREEKV_OK; // room for what did not come

    return status;
}

int64_t store::restore(llama_context * lctx, llama_seq_id seq_id) {
    return run_job(lctx, [this, seq_id]() {
        const int64_t res = restore_now(seq_id);
        if (layouts.is_stale()) {
            update_layouts();
        }
        return res;
    });
}

// But for positions that are about to go: p0 to p1 - 1. n_more: tokens that the limit has to have room for afterwards. Called from
// upstream's functions, which nothing may be thrown through
int64_t store::restore_now(llama_seq_id seq_id, llama_pos p0, llama_pos p1, uint32_t n_more) {
    try {
        return restore_rows(seq_id, p0, p1, n_more);
    } catch (const std::exception & err) {
        set_error("restore: %s", err.what());
        return REFREEKV_ERR_MEMORY;
    }
}

int64_t store::restore_rows(llama_seq_id seq_id, llama_pos p0, llama_pos p1, uint32_t n_more) {
    const int64_t t_start = ggml_time_us();

    mover.synchronize();
    release_stale();

    const auto all = logical.of_seq(seq_id, p0, p1);

    std::vector<std::vector<uint32_t>> cells;

    uint64_t bytes      = stats().bytes;
    int64_t  n_restored = 0;

    for (auto & layer : layers) {
        cells.push_back(missing(layer, all));

        uint32_t n_absent = 0;
        for (uint32_t cell : cells.back()) {
            if (layer.res.slot(cell) >= 0) {
                continue;
            }
            if (!cold.has(layer, cell)) {
                set_error("restore: rows of sequence %d in layer %d were not kept: %s", seq_id, layer.il, !cold.exists() ? "this context has no cold store" : cold.lost() ? "the cold store had no room for all" : "the state that was loaded did not have them");
                return REFREEKV_ERR_STATE;
            }
            n_absent++;
        }

        const uint32_t n_need = layouts.padded(layer.res.n_used() + n_absent + n_more);
        bytes += n_need > layer.rows.capacity() ? layer.rows.bytes_for(n_need) - layer.rows.bytes() : 0;
        n_restored += cells.back().size();
    }
    if (!within_limit(bytes)) {
        return REFREEKV_ERR_MEMORY;
    }

    if (n_restored > 0) {
        layouts.make_stale();
        if (const int32_t status = restore_rows(cells)) {
            warm.refresh(layers);
            return status;
        }

        n_restores++;
        restore_us += ggml_time_us() - t_start;

        if (cold.kind() == REFREEKV_COLD_MEMORY) {
            for (uint32_t i = 0; i < layers.size(); ++i) {
                cold.forget(layers[i], cells[i]); // in memory they would be there twice
            }
        }
        warm.refresh(layers);
    }

    // whoever shares these cells is whole again, too
    for (llama_seq_id s = 0; s < logical.n_seq_ids(); ++s) {
        if (pruned[s] < 0 || logical.stream_of(s) != logical.stream_of(seq_id)) {
            continue;
        }
        const auto its   = s == seq_id ? all : logical.of_seq(s);
        const bool whole = std::all_of(layers.begin(), layers.end(), [&](const layer & layer) {
            return std::none_of(its.begin(), its.end(), [&](const placed & c) { return layer.lacks(c.cell); });
        });
        if (whole) {
            pruned[s]     = -1;
            layouts.make_stale();
        }
    }

    return n_restored;
}

} // namespace refreekv
