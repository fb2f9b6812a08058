#pragma once

#include "refreekv.h"

#include "ggml-backend.h"

#include <mutex>
#include <utility>
#include <vector>

struct llama_context;
struct llama_hparams;

// Where the memory of a model and a context lies, for any thread to read (llama_context::buffers).
//
// llama_context::memory_breakdown() asks the scheduler and the store, which a decode or a pruning in another thread may be
// changing. So the thread that owns the context writes the figures down at moments when they are consistent.
struct refreekv_buffers {
    std::mutex mutex;

    std::vector<refreekv_buffer_info> infos; // bytes_context without the rows and rings of a store, which publishes its own

    uint64_t bytes_compute = 0; // the sum over the backends; nothing else changes once the context is there
};

namespace refreekv {

// what a cache with a policy says of itself, of one moment
struct figures {
    refreekv_stats                                             stats = {};
    std::vector<refreekv_layer_info>                           layers;
    std::vector<std::pair<ggml_backend_buffer_type_t, size_t>> bytes; // of rows and rings; empty when nothing is allocated
};

// The last figures that were published. The thread that owns the context writes, any thread reads. Publishing allocates nothing
// after the first time.
class figures_board {
public:
    // to be filled in before publish(); the owner's
    figures & next() { return unpublished; }

    void publish() {
        std::lock_guard<std::mutex> lock(mutex);
        std::swap(published, unpublished);
    }

    // f(figures); any thread
    template <typename F>
    void read(F && f) const {
        std::lock_guard<std::mutex> lock(mutex);
        f(published);
    }

private:
    mutable std::mutex mutex; // of published
    figures            published;
    figures            unpublished;
};

// The figures of a cache without a policy. n_tokens: full_tokens()
refreekv_stats      full_stats(llama_memory_t mem, const llama_hparams & hparams, uint32_t n_tokens);
refreekv_layer_info full_layer(llama_memory_t mem, const llama_hparams & hparams, uint32_t i_layer, uint32_t n_tokens);

// The tokens in it; while another thread changes them, those before. 0: not a cache that can have a policy
uint32_t full_tokens(llama_memory_t mem);

} // namespace refreekv
