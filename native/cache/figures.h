#pragma once

#include "refreekv.h"

#include <mutex>
#include <vector>

// Where the memory of a model and a context lies, for any thread to read (llama_context::buffers).
//
// llama_context::memory_breakdown() asks the scheduler and the store, which a decode or a pruning in another thread may be
// changing. So the thread that owns the context writes the figures down at moments when they are consistent.
struct refreekv_buffers {
    std::mutex mutex;

    std::vector<refreekv_buffer_info> infos; // bytes_context without the rows and rings of a store, which publishes its own

    uint64_t bytes_compute = 0; // the sum over the backends; nothing else changes once the context is there
};

