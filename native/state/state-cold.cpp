// The part of a state behind its rows: evicted rows that are in the cold store, so that what was evicted can come back after loading.

#include "state/state.h"

#include "api/error.h"
#include "cache/runs.h"
#include "tiers/cold-store.h"

#include "llama-io.h"

#include <stdexcept>

namespace refreekv {

static const uint32_t REFREEKV_STATE_COLD = 0x434b4652; // "RFKC"

struct state_cold {
    uint32_t magic;
    uint32_t n_layers; // 0: nothing was evicted, or nothing of it was to be saved
};

// before the rows of a layer: indices of the list, ascending, and K and V in that order
struct state_cold_layer {
    uint32_t magic;
    uint32_t n_rows;
};

void write_cold(const parts & p, llama_io_write_i & io, const std::vector<uint32_t> & list) {
    std::vector<std::vector<uint32_t>> rows(p.layers.size()); // indices of the list

    bool any = false;
    for (uint32_t i_layer = 0; i_layer < p.layers.size() && p.params.cold_state && p.cold.any(); ++i_layer) {
        const auto & layer = p.layers[i_layer];
        for (uint32_t i = 0; i < list.size(); ++i) {
            if (p.cold.has(layer, list[i]) && layer.res.slot(list[i]) < 0) {
                rows[i_layer].push_back(i);
                any = true;
            }
        }
    }

    const state_cold header = { REFREEKV_STATE_COLD, any ? (uint32_t) p.layers.size() : 0 };
    io.write(&header, sizeof(header));

    for (uint32_t i_layer = 0; i_layer < header.n_layers; ++i_layer) {
        const auto & layer = p.layers[i_layer];
        const auto & idxs = rows[i_layer];

        const state_cold_layer info = { REFREEKV_STATE_COLD, (uint32_t) idxs.size() };
        io.write(&info, sizeof(info));
        if (idxs.empty()) {
            continue;
        }
        io.write(idxs.data(), idxs.size()*sizeof(idxs[0]));

        std::vector<uint32_t> cells;
        for (uint32_t i : idxs) {
            cells.push_back(list[i]);
        }
        for (bool v : { false, true }) {
            const bool ok = p.cold.get(layer, cells, [&](size_t, size_t n, const uint8_t * k_rows, const uint8_t * v_rows) { io.write(v ? v_rows : k_rows, n*layer.row_size(v)); });
            if (!ok) {
                set_error("state: the cold store cannot be read any more");
                throw std::runtime_error("the cold store cannot be read any more");
            }
        }
    }
}

// What this context cannot keep (it has no cold store, or no room in it) is passed over: the sequences are as pruned as
// the state says, and cannot be restored. false: the state is damaged
bool read_cold(parts & p, llama_io_read_i & io, const std::vector<uint32_t> & list) {
    state_cold header;
    io.read(&header, sizeof(header));

    if (header.magic != REFREEKV_STATE_COLD || (header.n_layers != 0 && header.n_layers != p.layers.size())) {
        set_error("state: damaged, there are no evicted rows behind its rows");
        return false;
    }

    for (uint32_t i_layer = 0; i_layer < header.n_layers; ++i_layer) {
        auto & layer = p.layers[i_layer];

        state_cold_layer info;
        io.read(&info, sizeof(info));

        if (info.magic != REFREEKV_STATE_COLD || info.n_rows > list.size()) {
            set_error("state: damaged, %u rows evicted from layer %d", info.n_rows, layer.il);
            return false;
        }
        if (info.n_rows == 0) {
            continue;
        }

        std::vector<uint32_t> cells(info.n_rows);
        io.read(cells.data(), cells.size()*sizeof(cells[0]));

        int64_t last = -1;
        for (uint32_t & i : cells) {
            if (i <= last || i >= list.size() || layer.res.slot(list[i]) >= 0) {
                set_error("state: damaged, layer %d has evicted a cell that is not there or that it holds", layer.il);
                return false;
            }
            last = i;
            i    = list[i];
        }

        std::vector<uint8_t> k(cells.size()*layer.row_size(false));
        std::vector<uint8_t> v(cells.size()*layer.row_size(true));
        io.read(k.data(), k.size());
        io.read(v.data(), v.size());

        if (p.cold.exists()) {
            for_runs(cells, [&](size_t i, size_t n) {
                return p.cold.put(layer, cells[i], n, k.data() + i*layer.row_size(false), v.data() + i*layer.row_size(true));
            });
        }
    }

    return true;
}

} // namespace refreekv
