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
};

// Before the blocks of a layer. A block: indices of the list of its 64 cells (or REFREEKV_NO_CELL), then of each KV head in turn the codes of
// K and those of V
struct state_warm_layer {
    uint32_t magic;
    uint32_t kind; // of the codes (kind_of)
    uint32_t n_blocks;
};

static const uint32_t REFREEKV_TENSORS = 1u << 16;

// which codes a layer has: those of our kernel, with so many bits, or tensors of these types
static uint32_t kind_of(const warm_cells & its) {
    return its.get_tensors() && !its.get_tensors()->for_kernels() ? REFREEKV_TENSORS | code_tensors::TYPE_K << 8 | its.get_tensors()->get_type_v() : its.view.bits_k << 8 | its.view.bits_v;
}

// bytes of a block; 0: there is no such kind
static size_t block_bytes(uint32_t kind, int64_t n_head_kv, int64_t n_k, int64_t n_v) {
    const int k = kind >> 8 & 0xff;
    const int v = kind      & 0xff;

    for (auto type_v : { GGML_TYPE_Q5_1, GGML_TYPE_Q4_1 }) {
        if (kind == (REFREEKV_TENSORS | code_tensors::TYPE_K << 8 | type_v)) {
            return n_head_kv*code_tensors::head_bytes(type_v, n_k, n_v);
        }
    }
    if (kind >> 16 || k < 1 || k > 8 || v > 8) {
        return 0;
    }
    return n_head_kv*(codes_bytes(n_k, k) + (v > 0 ? codes_bytes(n_v, v) : 0)); // of no bits where V is a part of K
}

void write_warm(const parts & p, llama_io_write_i & io, const std::vector<uint32_t> & list) {
    std::unordered_map<uint32_t, uint32_t> index_of; // of a cell in the list
    for (uint32_t i = 0; i < list.size(); ++i) {
        index_of[list[i]] = i;
    }

    const bool any = std::any_of(p.layers.begin(), p.layers.end(), [](const layer & layer) { return layer.warm && layer.warm->n_blocks() > 0; });

    const state_warm header = { REFREEKV_STATE_WARM, any ? (uint32_t) p.layers.size() : 0 };
    io.write(&header, sizeof(header));

    for (uint32_t i_layer = 0; i_layer < header.n_layers; ++i_layer) {
        const auto & its = *p.layers[i_layer].warm;

        std::vector<std::pair<uint32_t, std::vector<uint32_t>>> blocks; // that have a cell of the list
        for (uint32_t b = 0; b < its.n_blocks(); ++b) {
            std::vector<uint32_t> indices(REFREEKV_CODED_CELLS, REFREEKV_NO_CELL);

            bool has = false;
            for (uint64_t left = its.cells_there(b); left; left &= left - 1) {
                const int64_t i  = lowest_bit(left);
                const auto    it = index_of.find(its.cell(b, i));
                if (it != index_of.end() && p.layers[i_layer].res.slot(its.cell(b, i)) < 0) {
                    indices[i] = it->second;
                    has = true;
                }
            }
            if (has) {
                blocks.emplace_back(b, std::move(indices));
            }
        }

        const state_warm_layer info = { REFREEKV_STATE_WARM, kind_of(its), (uint32_t) blocks.size() };
        io.write(&info, sizeof(info));

        std::vector<uint8_t> codes(its.block_bytes());

        for (const auto & [b, indices] : blocks) {
            io.write(indices.data(), indices.size()*sizeof(indices[0]));
            its.get_codes(b, codes.data());
            io.write(codes.data(), codes.size());
        }
    }
}

// Codes that this context has no use for (its decoding does not attend to what is evicted, or by other bits) are passed over. false: the state
// is damaged
bool read_warm(parts & p, llama_io_read_i & io, const std::vector<uint32_t> & list) {
    state_warm header;
    io.read(&header, sizeof(header));

    if (header.magic != REFREEKV_STATE_WARM || (header.n_layers != 0 && header.n_layers != p.layers.size())) {
        set_error("state: damaged, there are no codes behind its evicted rows");
        return false;
    }

    std::vector<uint8_t> codes;

    for (uint32_t i_layer = 0; i_layer < header.n_layers; ++i_layer) {
        auto & layer = p.layers[i_layer];

        state_warm_layer info;
        io.read(&info, sizeof(info));

        codes.resize(block_bytes(info.kind, p.hparams.n_head_kv(layer.il), p.hparams.n_embd_head_k(layer.il), p.hparams.n_embd_head_v(layer.il)));

        if (info.magic != REFREEKV_STATE_WARM || info.n_blocks > list.size() || codes.empty()) {
            set_error("state: damaged, %u blocks of codes in layer %d", info.n_blocks, layer.il);
            return false;
        }

        const bool takes = layer.warm && kind_of(*layer.warm) == info.kind;

        if (takes) {
            layer.warm->reserve(std::min<size_t>(info.n_blocks, list.size()/REFREEKV_CODED_CELLS + 1));
        }

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
            io.read(codes.data(), codes.size());
            if (adds) {
                layer.warm->add(cells, REFREEKV_CODED_CELLS, there);
                layer.warm->set_codes(layer.warm->n_blocks() - 1, codes.data());
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
