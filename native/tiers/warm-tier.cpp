#include "tiers/warm-tier.h"

#include "api/error.h"
#include "graph/codes.h"
#include "graph/device-node.h"
#include "kernels/codes.h"
#include "kernels/device/call.h"
#include "kernels/kernels.h"

#include "llama-batch.h"
#include "llama-hparams.h"
#include "llama-impl.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>

namespace refreekv {

// bits of codes: docs/lab/constants.md says what other choices give
static const int BITS_K = 4;
static const int BITS_V = 2;

static_assert(BITS_K == tiles::BITS_K && BITS_V == tiles::BITS_V, "kernels for devices read the same codes");

static const size_t N_CELLS = REFREEKV_CODED_CELLS;
static const size_t N_SENT  = 16; // blocks on their way to a device

// whether our kernel can attend to codes of the layer's cells
bool warm_tier::fits_kernel(const layer & layer) const {
    const auto * kernels = find_kernels();

    const int64_t n_k = hparams.n_embd_head_k(layer.il);
    const int64_t n_v = hparams.n_embd_head_v(layer.il);

    const auto whole = [](int64_t n, ggml_type type) { return n % ggml_blck_size(type) == 0; };

    const bool few_heads = std::all_of(layer.readers.begin(), layer.readers.end(), [&](const reader & r) { return hparams.n_gqa(r.il) <= REFREEKV_WARM_GQA; });

    return ggml_backend_buft_is_host(layer.rows.get_shape().buft) && whole(n_k, layer.type(false)) && whole(n_v, layer.type(true)) &&
           kernels && few_heads && kernels->codes_fit(n_k, BITS_K) && kernels->codes_fit(n_v, BITS_V);
}

// the same of our kernels on the layer's device, which read exact rows from host memory
bool warm_tier::fits_device_kernels(const layer & layer) const {
    const auto & shape   = layer.rows.get_shape();
    const auto * kernels = find_kernels(); // that encode

    const int64_t n_k = hparams.n_embd_head_k(layer.il);
    const int64_t n_v = hparams.n_embd_head_v(layer.il);

    return !ggml_backend_buft_is_host(shape.buft) && layer.has_v() && cold.in_memory() && kernels && kernels->codes_fit(n_k, BITS_K) && kernels->codes_fit(n_v, BITS_V) &&
           std::all_of(layer.readers.begin(), layer.readers.end(), [&](const reader & r) {
               return device_has_kernels(ggml_backend_buft_get_device(shape.buft), {
                   hparams.n_head(r.il), hparams.n_head_kv(layer.il), n_k, n_v, shape.type_k, shape.type_v, cold.type_of(layer, false), cold.type_of(layer, true), shape.v_trans,
               });
           });
}

ggml_type warm_tier::type_of_v(const layer & layer) const {
    if (n_by_device > 0 && fits_device_kernels(layer)) {
        return GGML_TYPE_I8;
    }
    return code_tensors::type_of_v(layer.il, hparams.n_layer());
}

void warm_tier::open(const refreekv_params & params, const std::vector<layer> & layers) {
    if (params.theta <= 0.0f) {
        return;
    }
    std::string why;

    if (hparams.use_alibi) {
        why = "attention with ALiBi is not supported";
    }
    for (const auto & layer : layers) {
        auto * device = ggml_backend_buft_get_device(layer.rows.get_shape().buft); // nullptr for plain host memory: the CPU

        if (fits_kernel(layer) && !params.by_graph) {
            n_by_kernel++;
        } else if (fits_device_kernels(layer) && !params.by_graph) {
            n_by_device++;
            shared = ggml_backend_dev_host_buffer_type(device);
        } else if (!device || device_attends_to_codes(device, type_of_v(layer), hparams.n_head(layer.il), hparams.n_head_kv(layer.il), hparams.n_embd_head_k(layer.il), hparams.n_embd_head_v(layer.il), hparams.attn_soft_cap)) {
            n_by_graph++;
        } else {
            why = std::string("device ") + ggml_backend_dev_name(device) + " lacks an operation for it";
        }
    }
    if (params.max_error > 0.0f && (has_tensors() || !why.empty())) {
        set_error("max_error reads exact rows, which needs the cache in host memory, heads that the CPU's kernel fits, and attention without ALiBi");
        throw std::runtime_error(last_error());
    }
    if (!why.empty()) {
        n_by_kernel = n_by_graph = n_by_device = 0;
        shared      = nullptr;
        LLAMA_LOG_WARN("refreekv: what is evicted takes no part in attention: %s\n", why.c_str());
        return;
    }
    share     = params.theta;
    max_error = params.max_error;
    by_graph  = params.by_graph;

    if (n_by_device > 0) {
        LLAMA_LOG_WARN("refreekv: %u of %zu layers attend to what is evicted by our kernels on their device, which have never run on a GPU%s (REFREEKV_DEVICE_KERNELS)\n",
                n_by_device, layers.size(), shared ? "" : ", and read no exact rows of it");
    }
    if (n_by_graph > 0) {
        LLAMA_LOG_INFO("refreekv: %u of %zu layers attend to what is evicted by codes on their device (K in %s, V in %s to %s), and read no exact rows of it\n",
                n_by_graph, layers.size(), ggml_type_name(code_tensors::TYPE_K), ggml_type_name(type_of_v(layers.front())), ggml_type_name(type_of_v(layers.back())));
    }
}

void warm_tier::make(layer & layer) const {
    if (share <= 0.0f) {
        return;
    }

    const int64_t n_head_kv = hparams.n_head_kv(layer.il);
    const int64_t n_k       = hparams.n_embd_head_k(layer.il);
    const int64_t n_v       = hparams.n_embd_head_v(layer.il);

    if (by_graph || !fits_kernel(layer)) {
        const auto backend = [this, &layer]() { return mover.backend_of(layer); };

        layer.warm = std::make_unique<warm_cells>(std::make_unique<code_tensors>(layer.rows.get_shape().buft, backend, layer.il, type_of_v(layer), n_head_kv, n_k, n_v));

        layer.warm->view.bits_k = BITS_K; // of our kernels' tensors
        layer.warm->view.bits_v = BITS_V;
        layer.warm->view.theta  = share;
        layer.warm->view.type_k = cold.type_of(layer, false);
        layer.warm->view.type_v = cold.type_of(layer, true);
        return;
    }
    layer.warm = std::make_unique<warm_cells>(n_head_kv, n_k, n_v, BITS_K, layer.has_v() ? BITS_V : 0);

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

float warm_tier::share_of_f16(const std::vector<layer> & layers) const {
    uint64_t bytes     = 0; // of a block of codes in each layer
    uint64_t bytes_f16 = 0;

    for (const auto & layer : layers) {
        bytes     += layer.warm ? layer.warm->block_bytes() : 0;
        bytes_f16 += N_CELLS*hparams.n_head_kv(layer.il)*(hparams.n_embd_head_k(layer.il) + (layer.has_v() ? hparams.n_embd_head_v(layer.il) : 0))*sizeof(ggml_fp16_t);
    }
    return bytes_f16 > 0 ? (float) bytes/bytes_f16 : 0.0f;
}

// the codes of n rows of K or V, for the block that was added last
void warm_tier::encode(const layer & layer, bool is_v, int64_t n, const float * numbers) const {
    const auto & view = layer.warm->view;

    const int64_t n_head = is_v ? view.n_v : view.n_k;

    for (int64_t h = 0; h < view.n_head_kv; ++h) {
        find_kernels()->encode(numbers + h*n_head, layer.n_embd(is_v), n, n_head, is_v ? view.bits_v : view.bits_k, is_v, layer.warm->codes_of(h, is_v));
    }
}

// n rows of K or V as numbers
static void to_float(const layer & layer, bool is_v, int64_t n, const uint8_t * rows, float * numbers) {
    const auto *  kernels = find_kernels();
    const int64_t n_row   = layer.n_embd(is_v);
    const auto    type    = layer.type(is_v);

    for (int64_t i = 0; i < n; ++i, rows += layer.row_size(is_v), numbers += n_row) {
        if (kernels) {
            kernels->to_float(type, rows, numbers, n_row);
        } else if (type == GGML_TYPE_F32) {
            memcpy(numbers, rows, n_row*sizeof(float));
        } else {
            ggml_get_type_traits(type)->to_float(rows, numbers, n_row);
        }
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

    // indices of the cells of each block
    std::vector<std::vector<uint32_t>> blocks;

    for (auto & r : runs) {
        std::sort(r.cells.begin(), r.cells.end());

        uint32_t lowest  = UINT32_MAX;
        uint32_t highest = 0;

        for (size_t i = 0; i < r.cells.size(); ++i) {
            const uint32_t index = r.cells[i].second;

            lowest  = std::min(lowest,  cells[index]);
            highest = std::max(highest, cells[index]);

            if (i == 0 || blocks.back().size() == N_CELLS || !warm_cells::may_share(lowest, highest)) {
                blocks.emplace_back();
                lowest = highest = cells[index];
            }
            blocks.back().push_back(index);
        }
    }

    std::vector<uint8_t> rows_k(N_CELLS*layer.row_size(false));
    std::vector<uint8_t> rows_v(N_CELLS*layer.row_size(true));
    std::vector<float>   k(N_CELLS*layer.n_embd(false));
    std::vector<float>   v(N_CELLS*layer.n_embd(true));

    auto * tensors = layer.warm->get_tensors();

    layer.warm->reserve(blocks.size());

    // tensors get some at once: each transfer takes its time
    code_tensors::blocks piece;
    size_t               first = 0; // block of it

    for (size_t b = 0; b < blocks.size(); ++b) {
        const size_t n = blocks[b].size();

        if (tensors && b == first) {
            piece = tensors->make(std::min<size_t>(blocks.size() - first, N_SENT));
        }

        uint32_t its[N_CELLS];
        for (size_t i = 0; i < n; ++i) {
            its[i] = cells[blocks[b][i]];
        }
        rows(blocks[b].data(), n, rows_k.data(), rows_v.data());

        to_float(layer, false, n, rows_k.data(), k.data());
        if (layer.has_v()) {
            to_float(layer, true, n, rows_v.data(), v.data());
        }

        layer.warm->add(its, n);

        if (!tensors) {
            encode(layer, false, n, k.data());
            if (layer.has_v()) {
                encode(layer, true, n, v.data());
            }
            layer.warm->note_steps();
            continue;
        }
        tensors->encode(piece, b - first, n, k.data(), layer.n_embd(false), (layer.has_v() ? v : k).data(), layer.n_embd(layer.has_v()));

        if (b + 1 == first + piece.n) {
            tensors->set(layer.warm->n_blocks() - piece.n, piece);
            first = b + 1;
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

void warm_tier::update_exact(layer & layer) const {
    auto & tensors = *layer.warm->get_tensors();

    std::vector<uint64_t> addresses(layer.warm->n_blocks()*N_CELLS, 0);
    for (uint32_t b = 0; b < layer.warm->n_blocks(); ++b) {
        for (uint64_t left = layer.warm->cells_there(b); left; left &= left - 1) {
            const int64_t i = lowest_bit(left);
            addresses[b*N_CELLS + i] = cold.shared_address(layer, layer.warm->cell(b, i));
        }
    }
    tensors.set_exact(addresses);

    layer.warm->counts.n_read += tensors.take_n_read();
}

void warm_tier::begin_batch(std::vector<layer> & layers, const llama_ubatch & ubatch) {
    const bool readable = share > 0.0f && cold.readable();

    if (n_by_device > 0 && exact_generation != n_generation) {
        mover.synchronize(); // the graph before reads them
        for (auto & layer : layers) {
            if (layer.warm && layer.warm->get_tensors() && layer.warm->get_tensors()->for_kernels()) {
                update_exact(layer);
            }
        }
        exact_generation = n_generation;
    }

    for (auto & layer : layers) {
        if (!layer.warm || layer.warm->get_tensors() || layer.warm->n_blocks() == 0) {
            continue; // of tensors the mask says it (graph/views.h)
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
                warm.visible[i*n_blocks + b] = logical.seen_by(cell, ubatch.seq_id[i][0], ubatch.pos[i]);
            }
        }

        if (warm.is_lost && !warned_of_lost) {
            LLAMA_LOG_WARN("refreekv: the cold store cannot be read any more; decoding goes on with the codes of what was evicted\n");
            warned_of_lost = true;
        }
    }
}

} // namespace refreekv
