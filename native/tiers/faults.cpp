// What a refreekv_store knows of the keys it has evicted, so that decoding can have the rows of those that it looks at.

#include "cache/store.h"

#include "api/error.h"
#include "cache/row-bytes.h"
#include "kernels/kernels.h"
#include "tiers/cold-store.h"

#include "llama-batch.h"
#include "llama-impl.h"

#include <algorithm>
#include <numeric>
#include <stdexcept>

// the tolerance, or 0; throws where there can be none and they are needed
float refreekv_store::check_faults() const {
    if (params.fault_mass <= 0.0f) {
        return 0.0f;
    }

    const auto * kernels = refreekv_find_kernels();

    const char * why = params.cold == REFREEKV_COLD_NONE ? "there is no cold store" : nullptr;

    for (const auto & layer : layers) {
        if (!ggml_backend_buft_is_host(layer.rows.get_shape().buft)) {
            why = "the cache is not in host memory";
        } else if (kv.hparams.use_alibi) {
            why = "attention with ALiBi is not supported";
        } else if (!kernels || !kernels->decode_can_fault(kv.hparams.n_embd_head_k(layer.il), kv.hparams.n_embd_head_v(layer.il), layer.type(false), layer.type(true))) {
            why = "this build has no decode kernel for the model's heads";
        }
    }
    if (why && params.fault_needed) {
        refreekv_set_error("faults: %s", why);
        throw std::runtime_error(why);
    }

    return why ? 0.0f : params.fault_mass;
}

void refreekv_store::make_faults(uint32_t i_layer) {
    auto & g = layers[i_layer];

    if (fault_mass <= 0.0f) {
        return;
    }

    g.evicted = std::make_unique<refreekv_decode_evicted>();

    g.evicted->softmax   = &g.softmax;
    g.evicted->tolerance = fault_mass;
    g.evicted->row_k     = g.row_size(false);
    g.evicted->row_v     = g.row_size(true);
    g.evicted->sketch.reset(g.n_embd(false));

    g.evicted->sees = [this, i_layer](int64_t token, uint32_t block) {
        const auto & b = layers[i_layer].evicted->sketch[block];

        size_t i = 0;
        while (!(b.there >> i & 1)) {
            ++i;
        }
        const uint32_t cell = b.cells[i]; // the others are of the same sequences, and behind it

        return logical.seq_has(cell, batch_seq[token]) && logical.pos_of(cell) <= batch_pos[token];
    };

    g.evicted->read = [this, i_layer](uint32_t block, uint8_t * k, uint8_t * v) {
        const auto & g = layers[i_layer];
        const auto & b = g.evicted->sketch[block];

        std::vector<uint32_t> cells;
        for (size_t i = 0; i < b.cells.size(); ++i) {
            if (b.there >> i & 1) {
                cells.push_back(b.cells[i]);
            }
        }
        std::sort(cells.begin(), cells.end()); // their order does not matter here

        return cold.get(g, false, cells, [&](size_t i, size_t n, const uint8_t * bytes) { std::copy_n(bytes, n*g.row_size(false), k + i*g.row_size(false)); }) &&
               cold.get(g, true,  cells, [&](size_t i, size_t n, const uint8_t * bytes) { std::copy_n(bytes, n*g.row_size(true),  v + i*g.row_size(true)); });
    };
}

refreekv_decode_evicted * refreekv_store::evicted_of(uint32_t i_layer) const {
    return layers[i_layer].evicted.get();
}

// a batch is about to be computed
void refreekv_store::note_batch(const llama_ubatch & ubatch) {
    if (fault_mass <= 0.0f) {
        return;
    }

    batch_seq.clear();
    batch_pos.assign(ubatch.pos, ubatch.pos + ubatch.n_tokens);
    for (uint32_t i = 0; i < ubatch.n_tokens; ++i) {
        batch_seq.push_back(ubatch.seq_id[i][0]);
    }

    const bool lost = std::any_of(layers.begin(), layers.end(), [](const layer & g) { return g.evicted && g.evicted->n_lost > 0; });
    if (lost && !warned_of_lost) {
        LLAMA_LOG_WARN("refreekv: the cold store cannot be read any more: decoding goes on without what is evicted\n");
        warned_of_lost = true;
    }
}

// of cells that were evicted and are in the cold store; row(i): the key of cells[i], as the cache has it
void refreekv_store::sketch(layer & g, const std::vector<uint32_t> & cells, const std::function<const uint8_t * (size_t)> & row) {
    if (!g.evicted) {
        return;
    }

    // the cells of a block are seen by the same sequences
    struct run {
        uint32_t first; // one of them
        std::vector<std::pair<llama_pos, size_t>> cells; // positions, indices of cells
    };
    std::vector<run> runs;

    for (size_t i = 0; i < cells.size(); ++i) {
        if (!cold.has(g, cells[i])) {
            continue;
        }
        auto it = std::find_if(runs.begin(), runs.end(), [&](const run & r) { return logical.alike(r.first, cells[i]); });
        if (it == runs.end()) {
            it = runs.insert(it, { cells[i], {} });
        }
        it->cells.emplace_back(logical.pos_of(cells[i]), i);
    }

    const size_t n_blocks = std::accumulate(runs.begin(), runs.end(), (size_t) 0,
            [](size_t n, const run & r) { return n + (r.cells.size() + refreekv_sketch::n_cells - 1)/refreekv_sketch::n_cells; });

    g.evicted->sketch.reserve(n_blocks);

    const ggml_type type = g.type(false);
    const int64_t   n    = g.n_embd(false);

    std::vector<float> keys(refreekv_sketch::n_cells*n);

    for (auto & r : runs) {
        auto & all = r.cells;
        std::sort(all.begin(), all.end());

        for (size_t first = 0; first < all.size(); first += refreekv_sketch::n_cells) {
            std::vector<uint32_t> of_block;

            for (size_t i = first; i < std::min<size_t>(all.size(), first + refreekv_sketch::n_cells); ++i) {
                const size_t at = all[i].second;
                float *     key = keys.data() + of_block.size()*n;

                if (type == GGML_TYPE_F32) {
                    std::copy_n((const float *) row(at), n, key);
                } else {
                    ggml_get_type_traits(type)->to_float(row(at), key, n);
                }
                of_block.push_back(cells[at]);
            }
            g.evicted->sketch.add(of_block, keys.data());
        }
    }
}

// cells have come back, or are gone, or have lost their rows
void refreekv_store::refresh_sketches() {
    for (auto & g : layers) {
        if (g.evicted && g.evicted->sketch.keep([&](uint32_t cell) { return g.res.slot(cell) < 0 && cold.has(g, cell) && !logical.is_empty(cell); })) {
            n_generation++;
        }
    }
}

void refreekv_store::copy_cold(uint32_t first_src, uint32_t first_dst) {
    if (cold.bytes() == 0) {
        return;
    }
    for (auto & g : layers) {
        cold.copy(g, first_src, first_dst, logical.stream_size());

        if (g.evicted) {
            g.evicted->sketch.copy(first_src, first_dst, logical.stream_size());
            g.evicted->sketch.keep([&](uint32_t cell) { return cell/logical.stream_size() != first_dst/logical.stream_size() || cold.has(g, cell); });
        }
    }
}

void refreekv_store::sketch_rows(layer & g, const std::vector<uint32_t> & cells) {
    sketch(g, cells, [&](size_t i) { return (const uint8_t *) g.rows.k()->data + g.res.slot(cells[i])*g.rows.k()->nb[1]; });
}
