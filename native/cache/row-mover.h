#pragma once

#include "cache/groups.h"

#include <atomic>
#include <cstdint>
#include <vector>

struct llama_context;

namespace refreekv {

// Which backend each group is on, and moves of its rows there. Rows move only between graphs, and a graph that was built before
// must not run again: generation counts up.
class row_mover {
public:
    // by_graph: rows in host memory are moved as those of a device are (debug)
    row_mover(const std::vector<group> & groups, bool by_graph, std::atomic<uint64_t> & generation) :
        groups(groups), by_graph(by_graph), generation(generation) {}

    // whose backends these are; there is none before the first update
    void set_context(llama_context * ctx) { lctx = ctx; }

    ggml_backend_t backend_of(const group & g) const; // nullptr: none of the context's holds it
    ggml_backend_t host_backend() const;

    // whether the host may read and write rows where they are
    bool in_place(const group & g) const;

    // that may work on groups beside each other
    uint32_t n_threads() const;

    // a graph may still read what is about to be freed
    void synchronize() const;

    // see refreekv_rows::move and read
    bool move(group & g, const std::vector<uint32_t> & slots, uint32_t capacity, const refreekv_rows::host_rows & in = {});
    void read(group & g, const std::vector<uint32_t> & slots, refreekv_rows::host_rows & out) const;

    // the backend of a node of the graph that is being built
    void run_on(ggml_tensor * node, ggml_backend_t backend) const;

private:
    const std::vector<group> & groups;
    const bool                 by_graph;
    std::atomic<uint64_t> &    generation;

    llama_context * lctx = nullptr;
};

} // namespace refreekv
