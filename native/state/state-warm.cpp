// The part of a state behind the evicted rows: codes of evicted cells, so that decoding goes on attending to them after loading, also
// where the state has no exact rows.

#include "state/state.h"

#include "api/error.h"
#include "kernels/codes.h"

#include "llama-io.h"

#include <algorithm>
#include <cstring>
#include <unordered_map>

namespace refreekv {

static const uint32_t REFREEKV_STATE_WARM = 0x574b4652; // "RFKW"
static const uint32_t REFREEKV_NO_CELL    = UINT32_MAX;

struct state_warm {
    uint32_t magic;
    uint32_t n_layers; // 0: there are no codes
    uint32_t bits_k;
    uint32_t bits_v;
};

// Before the blocks of a layer. A block: indices of the list of its 64 cells (or REFREEKV_NO_CELL), then of each KV head in turn the codes of
// K and those of V
struct state_warm_layer {
    uint32_t magic;
    uint32_t n_blocks;
};

void write_warm(const parts & p, llama_io_write_i & io, const std::vector<uint32_t> & list) {
    std::unordered_map<uint32_t, uint32_t> index_of; // of a cell in the list
    for (uint32_t i = 0; i < list.size(); ++i) {
        index_of[list[i]] = i;
    }

    const bool any = std::any_of(p.layers.begin(), p.layers.end(), [](const layer & layer) { return layer.warm && layer.warm->n_blocks() > 0; });

    state_warm header = { REFREEKV_STATE_WARM, any ? (uint32_t) p.layers.size() : 0, 0, 0 };
    if (any) {
        header.bits_k = p.layers.front().warm->view.bits_k;
        header.bits_v = p.layers.front().warm->view.bits_v;
    }
    io.write(&header, sizeof(header));

    for (uint32_t i_layer = 0; i_layer < header.n_layers; ++i_layer) {
        const auto & its = *p.layers[i_layer].warm;

        std::vector<std::pair<uint32_t, std::vector<uint32_t>>> blocks; // that have a cell of the list
        for (uint32_t b = 0; b < its.n_blocks(); ++b) {
            std::vector<uint32_t> indices(REFREEKV_CODED_CELLS, REFREEKV_NO_CELL);

            bool has = false;
            for (uint64_t left = its.view.there[b]; left; left &= left - 1) {
                const int64_t i  = lowest_bit(left);
                const auto    it = index_of.find(its.cell(b, i));
                if (it != index_of.end()) {
                    indices[i] = it->second;
                    has = true;
                }
            }
            if (has) {
                blocks.emplace_back(b, std::move(indices));
            }
        }

        const state_warm_layer info = { REFREEKV_STATE_WARM, (uint32_t) blocks.size() };
        io.write(&info, sizeof(info));

        for (const auto & [b, indices] : blocks) {
            io.write(indices.data(), indices.size()*sizeof(indices[0]));
            for (int64_t h = 0; h < its.view.n_head_kv; ++h) {
                io.write(its.codes_of(b, h, false), its.head_bytes(false));
                io.write(its.codes_of(b, h, true),  its.head_bytes(true));
            }
        }
    }
}

// Codes that this context has no use for (its decoding does not attend to what is evicted, or by other bits) are passed over. false: the state
// is damaged
bool read_warm(parts & p, llama_io_read_i & io, const std::vector<uint32_t> & list) {
    state_warm header;
    io.read(&header, sizeof(header));

    const bool fits = header.n_layers == 0 || (header.n_layers == p.layers.size() && header.bits_k >= 1 && header.bits_k <= 8 && header.bits_v >= 1 && header.bits_v <= 8);

    if (header.magic != REFREEKV_STATE_WARM || !fits) {
        set_error("state: damaged, there are no codes behind its evicted rows");
        return false;
    }

    std::vector<uint8_t> codes[2];

    for (uint32_t i_layer = 0; i_layer < header.n_layers; ++i_layer) {
        auto & layer = p.layers[i_layer];

        state_warm_layer info;
        io.read(&info, sizeof(info));

        if (info.magic != REFREEKV_STATE_WARM || info.n_blocks > list.size()) {
            set_error("state: damaged, %u blocks of codes in layer %d", info.n_blocks, layer.il);
            return false;
        }

        const int64_t n_head_kv = p.hparams.n_head_kv(layer.il);

        codes[0].resize(codes_bytes(p.hparams.n_embd_head_k(layer.il), header.bits_k));
        codes[1].resize(codes_bytes(p.hparams.n_embd_head_v(layer.il), header.bits_v));

        const bool takes = layer.warm && layer.warm->view.bits_k == (int) header.bits_k && layer.warm->view.bits_v == (int) header.bits_v;

        for (uint32_t b = 0; b < info.n_blocks; ++b) {
            uint32_t cells[REFREEKV_CODED_CELLS];
            io.read(cells, sizeof(cells));

            uint64_t there = 0;
            uint32_t first = REFREEKV_NO_CELL; // one of them
            for (int64_t i = 0; i < REFREEKV_CODED_CELLS; ++i) {
                if (cells[i] == REFREEKV_NO_CELL) {
                    continue;
                }
                if (cells[i] >= list.size() || layer.res.slot(list[cells[i]]) >= 0) {
                    set_error("state: damaged, layer %d has codes of a cell that is not there or that it holds", layer.il);
                    return false;
                }
                cells[i] = list[cells[i]];
                first    = first == REFREEKV_NO_CELL ? cells[i] : first;
                there   |= 1ull << i;
            }
            if (there == 0) {
                set_error("state: damaged, a block of codes in layer %d has no cells", layer.il);
                return false;
            }
            std::replace(std::begin(cells), std::end(cells), REFREEKV_NO_CELL, first);

            // cells of one block were neighbours; in this cache they may have come to lie far from each other
            const auto [lowest, highest] = std::minmax_element(std::begin(cells), std::end(cells));
            const bool adds = takes && warm_cells::may_share(*lowest, *highest);
            if (adds) {
                layer.warm->add(cells, REFREEKV_CODED_CELLS, there);
            }
            for (int64_t h = 0; h < n_head_kv; ++h) {
                for (bool v : { false, true }) {
                    io.read(codes[v].data(), codes[v].size());
                    if (adds) {
                        memcpy(layer.warm->codes_of(h, v), codes[v].data(), codes[v].size());
                    }
                }
            }
            if (adds) {
                layer.warm->note_steps();
            }
        }
    }

    p.n_generation++;

    return true;
}

// codes of cells that the cold store has and that came without
void code_missing(parts & p, const std::vector<uint32_t> & list) {
    for (auto & layer : p.layers) {
        if (!layer.warm || !p.cold.exists()) {
            continue;
        }
        const auto is_coded = layer.warm->cells(p.logical.size());

        std::vector<uint32_t> cells;
        for (uint32_t cell : list) {
            if (layer.res.slot(cell) < 0 && p.cold.has(layer, cell) && !is_coded[cell]) {
                cells.push_back(cell);
            }
        }
        std::sort(cells.begin(), cells.end());

        const size_t row_k = layer.row_size(false);
        const size_t row_v = layer.row_size(true);

        std::vector<uint8_t> k(cells.size()*row_k);
        std::vector<uint8_t> v(cells.size()*row_v);

        const bool got = p.cold.get(layer, cells, [&](size_t i, size_t n, const uint8_t * rows_k, const uint8_t * rows_v) {
            memcpy(k.data() + i*row_k, rows_k, n*row_k);
            memcpy(v.data() + i*row_v, rows_v, n*row_v);
        });
        if (!got) {
            continue; // they are lost
        }
        p.warm.add(layer, cells, [&](const uint32_t * indices, size_t n, uint8_t * rows_k, uint8_t * rows_v) {
            for (size_t i = 0; i < n; ++i) {
                memcpy(rows_k + i*row_k, k.data() + indices[i]*row_k, row_k);
                memcpy(rows_v + i*row_v, v.data() + indices[i]*row_v, row_v);
            }
        });
    }
}

} // namespace refreekv
