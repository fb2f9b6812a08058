#include "tiers/warm-tier.h"

#include "kernels/codes.h"
#include "kernels/kernels.h"

#include "llama-batch.h"
#include "llama-hparams.h"
#include "llama-impl.h"

#include <algorithm>
#include <cmath>

namespace refreekv {

// bits of codes: docs/fidelity.md says what other choices give
static const int BITS_K = 4;
static const int BITS_V = 2;

static const size_t N_CELLS = REFREEKV_CODED_CELLS;

// why a layer can have no warm tier, or nullptr
static const char * why_not(const llama_hparams & hparams, const layer & layer) {
    const auto * kernels = find_kernels();

    const int64_t n_k = hparams.n_embd_head_k(layer.il);
    const int64_t n_v = hparams.n_embd_head_v(layer.il);

    const auto whole = [](int64_t n, ggml_type type) { return n % ggml_blck_size(type) == 0; };

    if (!ggml_backend_buft_is_host(layer.rows.get_shape().buft)) {
        return "the cache is not in host memory";
    }
    if (hparams.use_alibi) {
        return "attention with ALiBi is not supported";
    }
    if (!whole(n_k, layer.rows.get_shape().type_k) || !whole(n_v, layer.rows.get_shape().type_v)) {
        return "heads are no whole blocks of the cache's type";
    }
    if (!kernels || hparams.n_gqa(layer.il) > REFREEKV_WARM_GQA || !kernels->codes_fit(n_k, BITS_K) || !kernels->codes_fit(n_v, BITS_V)) {
        return "this build has no decode kernel for the model's heads";
    }
    return nullptr;
}

void warm_tier::open(const refreekv_params & params, const std::vector<layer> & layers) {
    if (params.theta <= 0.0f) {
        return;
    }

    const char * why = nullptr;

    for (const auto & layer : layers) {
        why = why ? why : why_not(hparams, layer);
    }
    if (why) {
        LLAMA_LOG_WARN("refreekv: what is evicted takes no part in attention: %s\n", why);
    } else {
        share     = params.theta;
        max_error = params.max_error;
    }
}

void warm_tier::make(layer & layer) const {
    if (share <= 0.0f) {
        return;
    }

    layer.warm = std::make_unique<warm_cells>(hparams.n_head_kv(layer.il), hparams.n_embd_head_k(layer.il), hparams.n_embd_head_v(layer.il), BITS_K, BITS_V);

    layer.warm->view.softmax = &layer.softmax;
    layer.warm->view.theta     = cold.exists() ? share : INFINITY; // else there is nothing to read
    layer.warm->view.max_error = cold.exists() ? max_error : 0.0f;
    layer.warm->view.type_k  = cold.type_of(layer, false);
    layer.warm->view.type_v  = cold.type_of(layer, true);

    layer.warm->exact.store  = cold.get_store();
    layer.warm->exact.place  = layer.cold_place;
    layer.warm->exact.record = layer.record;
    layer.warm->exact.there  = layer.is_cold.data();
}

// the codes of n rows of K or V, for the block that was added last. numbers: room for the rows
void warm_tier::encode(const layer & layer, bool is_v, int64_t n, const uint8_t * rows, float * numbers) const {
    const auto & kernels = *find_kernels();
    const auto & view    = layer.warm->view;

    const int64_t n_row  = layer.n_embd(is_v);
    const int64_t n_head = is_v ? view.n_v : view.n_k;

    for (int64_t i = 0; i < n; ++i) {
        kernels.to_float(layer.type(is_v), rows + i*layer.row_size(is_v), numbers + i*n_row, n_row);
    }
    for (int64_t h = 0; h < view.n_head_kv; ++h) {
        kernels.encode(numbers + h*n_head, n_row, n, n_head, is_v ? view.bits_v : view.bits_k, is_v, layer.warm->codes_of(h, is_v));
    }
}

void warm_tier::add(layer & layer, const std::vector<uint32_t> & cells, const rows_fn & rows) const {
    if (!layer.warm) {
        return;
    }

    // the cells of a block are seen by the same sequences, and are neighbours in position
    struct run {
        uint32_t first; // one of its cells
        std::vector<std::pair<llama_pos, uint32_t>> cells; // position and index of each
    };
    std::vector<run> runs;

    for (size_t i = 0; i < cells.size(); ++i) {
        auto it = std::find_if(runs.begin(), runs.end(), [&](const run & r) { return logical.alike(r.first, cells[i]); });
        if (it == runs.end()) {
            it = runs.insert(it, { cells[i], {} });
        }
        it->cells.emplace_back(logical.pos_of(cells[i]), i);
    }

    std::vector<uint8_t> rows_k(N_CELLS*layer.row_size(false));
    std::vector<uint8_t> rows_v(N_CELLS*layer.row_size(true));
    std::vector<float>   numbers(N_CELLS*std::max(layer.n_embd(false), layer.n_embd(true)));

    for (auto & r : runs) {
        std::sort(r.cells.begin(), r.cells.end());

        for (size_t first = 0, n; first < r.cells.size(); first += n) {
            uint32_t indices [N_CELLS];
            uint32_t of_block[N_CELLS];

            uint32_t lowest  = UINT32_MAX;
            uint32_t highest = 0;

            for (n = 0; n < std::min(N_CELLS, r.cells.size() - first); ++n) {
                indices [n] = r.cells[first + n].second;
                of_block[n] = cells[indices[n]];

                lowest  = std::min(lowest,  of_block[n]);
                highest = std::max(highest, of_block[n]);
                if (!warm_cells::may_share(lowest, highest)) {
                    break;
                }
            }
            rows(indices, n, rows_k.data(), rows_v.data());

            layer.warm->add(of_block, n);
            encode(layer, false, n, rows_k.data(), numbers.data());
            encode(layer, true,  n, rows_v.data(), numbers.data());
            layer.warm->note_steps();
        }
    }
    n_generation++;
}

void warm_tier::refresh(std::vector<layer> & layers) const {
    for (auto & layer : layers) {
        if (!layer.warm) {
            continue;
        }
        const bool gone  = layer.warm->keep([&](uint32_t cell) { return layer.res.slot(cell) < 0 && !logical.is_empty(cell); });
        const bool apart = layer.warm->split([&](uint32_t a, uint32_t b) { return logical.alike(a, b); });

        n_generation += gone || apart;
    }
}

void warm_tier::copy(layer & layer, uint32_t first_src, uint32_t first_dst, uint32_t n) const {
    if (!layer.warm) {
        return;
    }
    layer.warm->copy(first_src, first_dst, n);
}

void warm_tier::begin_batch(std::vector<layer> & layers, const llama_ubatch & ubatch) {
    const bool readable = share > 0.0f && cold.readable();

    for (auto & layer : layers) {
        if (!layer.warm || layer.warm->n_blocks() == 0) {
            continue;
        }
        auto & warm = *layer.warm;

        warm.exact.readable = readable;

        const uint32_t n_blocks = warm.n_blocks();

        warm.visible.resize(ubatch.n_tokens*n_blocks);
        warm.view.visible = warm.visible.data();

        for (uint32_t b = 0; b < n_blocks; ++b) {
            // the block's other cells are of the same sequences, and no token of a batch has a position between them
            const uint32_t cell = warm.first_cell(b);

            for (uint32_t i = 0; i < ubatch.n_tokens; ++i) {
                warm.visible[i*n_blocks + b] = logical.seq_has(cell, ubatch.seq_id[i][0]) && logical.pos_of(cell) <= ubatch.pos[i];
            }
        }

        if (warm.is_lost && !warned_of_lost) {
            LLAMA_LOG_WARN("refreekv: the cold store cannot be read any more; decoding goes on with the codes of what was evicted\n");
            warned_of_lost = true;
        }
    }
}

} // namespace refreekv
