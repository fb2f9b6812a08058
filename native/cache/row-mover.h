#pragma once

#include "cache/layer.h"

#include <atomic>
#include <cstdint>
#include <vector>

struct llama_context;

namespace refreekv {

// Which backend each layer is on, and moves of its rows there. Rows move only between graphs, and a graph that was built before
// must not run again: generation counts up.
class row_mover {
public:
    // by_graph: rows in host memory are moved as those of a device are (debug)
    row_mover(const std::vector<layer> & layers, bool by_graph, std::atomic<uint64_t> & generation) :
        layers(layers), by_graph(by_graph), generation(generation) {}

    // sets the context that owns the backends. Until the first update there is none
    void set_context(llama_context * ctx) { lctx = ctx; }

    ggml_backend_t backend_of(const layer & layer) const; // nullptr: none of the context's holds it
    ggml_backend_t host_backend() const;

    // whether the host may read and write rows where they are
    bool in_place(const layer & layer) const;

    // how many threads may work on different layers at the same time
    uint32_t n_threads() const;

    // a graph may still read what is about to be freed
    void synchronize() const;

    // see rows::move and read
    bool move(layer & layer, const std::vector<uint32_t> & slots, uint32_t capacity, const rows::host_rows & in = {});
    void read(layer & layer, const std::vector<uint32_t> & slots, rows::host_rows & out) const;

    // the backend of a node of the graph that is being built
    void run_on(ggml_tensor * node, ggml_backend_t backend) const;

private:
    const std::vector<layer> & layers;
    const bool                 by_graph;
    std::atomic<uint64_t> &    generation;

    llama_context * lctx = nullptr;
};

} // namespace refreekv
