#include "evict/evict.h"

#include "api/error.h"
#include "cache/parallel.h"

#include "ggml.h"

#include <algorithm>
#include <atomic>

namespace refreekv {

static const size_t REFREEKV_SCRATCH_BYTES = 128u*1024*1024; // of all threads, with one query head in each
static const size_t REFREEKV_WEIGHTS_BYTES =  16u*1024*1024; // of all threads, with more of them

int64_t eviction::run(llama_seq_id seq_id, int32_t il, const std::vector<llama_pos> * pos) {
    try {
        return evict(seq_id, il, pos);
    } catch (...) {
        p.stale_slots = true; // codes of rows that stayed after all
        throw;
    }
}

int64_t eviction::evict(llama_seq_id seq_id, int32_t il, const std::vector<llama_pos> * pos) {
    const int64_t t_start = ggml_time_us();
    const size_t  before  = p.bytes();

    // which rows find room in a store with a limit depends on their order
    uint32_t n_threads = p.params.cold_limit > 0 ? 1 : p.mover.n_threads();

    // nor is the scratch memory to grow with them beyond a bound: a query head's weights at least (kernels/attention-cpu.cpp)
    const size_t size = (size_t) std::max(1, p.logical.table_of_seq(seq_id).seq_pos_max(seq_id))*p.params.n_window*sizeof(float);

    n_threads = std::clamp<size_t>(REFREEKV_SCRATCH_BYTES/size, 1, n_threads);

    const auto all = p.evictor.cells_of(seq_id);

    std::vector<evictor::scratch> scratch(n_threads);
    for (auto & s : scratch) {
        s.attention.weights_limit = REFREEKV_WEIGHTS_BYTES/n_threads;
    }
    std::atomic<int64_t>          n_evicted { 0 };

    int32_t status = run_parallel(p.layers.size(), n_threads, [&](uint32_t i, uint32_t thread) {
        auto & layer = p.layers[i];

        const bool asked = pos ? layer.il == il : i >= (uint32_t) p.params.n_full_layers;

        return asked ? p.evictor.evict(layer, seq_id, all, pos, scratch[thread], n_evicted) : REFREEKV_OK;
    });

    for (auto & s : scratch) {
        const int32_t put = guard([&]() {
            cold_transfer::finish(s.lane);
            return s.lane.put_status;
        });
        status = status == REFREEKV_OK ? put : status;
    }

    p.n_expected = 0;
    p.turn.note_pruned(seq_id);

    // after an error, what was evicted before it is gone
    if (n_evicted > 0) {
        const llama_pos last = p.logical.table_of_seq(seq_id).seq_pos_max(seq_id);

        p.n_prunes += p.pruned[seq_id] != last; // by hand, a pruning is a job for each layer

        p.pruned[seq_id] = last;
        p.layouts.make_stale();
        p.prune_us += ggml_time_us() - t_start;
    }
    if (status != REFREEKV_OK) {
        p.stale_slots = true; // codes of rows that stayed after all
        p.release_stale();
    }
    if (p.layouts.is_stale()) {
        p.update_layouts();
    }

    pages_trim();

    const size_t after = p.bytes();
    p.bytes_freed += before > after ? before - after : 0;

    return status == REFREEKV_OK ? n_evicted.load() : status;
}

} // namespace refreekv
