#include "cache/row-mover.h"

#include "llama-context.h"

#include <algorithm>

namespace refreekv {

static const uint32_t MAX_THREADS = 4;

ggml_backend_t row_mover::backend_of(const layer & layer) const {
    if (!lctx) {
        return nullptr;
    }

    auto * sched = lctx->get_sched();
    auto * buft  = layer.rows.get_shape().buft;
    auto * dev   = ggml_backend_buft_get_device(buft); // nullptr for plain host memory

    for (int i = 0; i < ggml_backend_sched_get_n_backends(sched); ++i) {
        auto * backend = ggml_backend_sched_get_backend(sched, i);
        auto * owner   = ggml_backend_get_device(backend);

        if (owner == dev || (!dev && ggml_backend_dev_buffer_type(owner) == buft)) {
            return backend;
        }
    }

    return nullptr;
}

ggml_backend_t row_mover::host_backend() const {
    auto * sched = lctx->get_sched();

    return ggml_backend_sched_get_backend(sched, ggml_backend_sched_get_n_backends(sched) - 1); // ggml has it there
}

// whether the host may read and write rows where they are
bool row_mover::in_place(const layer & layer) const {
    return ggml_backend_buft_is_host(layer.rows.get_shape().buft) && !by_graph;
}

// that may work on layers beside each other: much of the time goes into memory that was never touched, and into the system
uint32_t row_mover::n_threads() const {
    const bool on_host = std::all_of(layers.begin(), layers.end(), [&](const layer & layer) { return in_place(layer); });

    return on_host && lctx ? std::clamp(lctx->n_threads_batch(), 1u, MAX_THREADS) : 1;
}

bool row_mover::move(layer & layer, const std::vector<uint32_t> & slots, uint32_t capacity, const rows::host_rows & in) {
    generation++;

    return layer.rows.move(slots, capacity, backend_of(layer), by_graph, in);
}

void row_mover::read(layer & layer, const std::vector<uint32_t> & slots, rows::host_rows & out) const {
    layer.rows.read(slots, backend_of(layer), by_graph, out);
}

// not llama_synchronize: that ends upstream's timing of a batch, which has not begun
void row_mover::synchronize() const {
    if (lctx) {
        ggml_backend_sched_synchronize(lctx->get_sched());
    }
}

void row_mover::run_on(ggml_tensor * node, ggml_backend_t backend) const {
    ggml_backend_sched_set_tensor_backend(lctx->get_sched(), node, backend);
}

} // namespace refreekv
