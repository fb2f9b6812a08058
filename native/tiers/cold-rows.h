#pragma once

#include "refreekv.h"
#include "cache/layer.h"

#include "ggml-backend.h"

#include <atomic>
#include <functional>
#include <memory>
#include <vector>

struct llama_hparams;

namespace refreekv {

class cold_store;
class file;

// The evicted rows that are kept in a cold store. It has a place for every cell of every layer, so nothing is looked up: a flag
// per cell says whether its row is there. A row never changes while its cell is in use.
//
// put() and get() may be called for several layers at once.
class cold_rows {
public:
    // on_host: whether all of the cache is in host memory. Throws std::runtime_error where a file was asked for and cannot be had
    cold_rows(const refreekv_params & params, const llama_hparams & hparams, bool on_host, uint32_t n_cells);
    ~cold_rows();

    int32_t  kind()   const; // enum refreekv_cold_kind, what it is
    bool     exists() const { return store != nullptr; } // else what is evicted is gone
    bool     lost()   const { return is_full; }          // there was no room for a row
    bool     readable() const;                           // by this process
    uint64_t bytes()  const { return n_bytes; }          // of its own
    bool     any()    const { return n_bytes + n_attached > 0; }

    bool has(const layer & g, uint32_t cell) const { return exists() && g.is_cold[cell]; }
    bool is_attached(const layer & g, uint32_t cell) const { return exists() && g.is_cold[cell] == ATTACHED; } // to a file that others wrote

    // empty, with places for the rows of these layers
    void reset(std::vector<layer> & layers);

    // rows that nobody will ask for again
    void forget(layer & g, const std::vector<uint32_t> & cells);

    // Rows that the cache holds again: in memory they would be there twice
    void forget_copies(layer & g, std::vector<uint32_t> cells);

    // The records of n neighbouring cells, which the store does not have, are in a file from `at` on (cold_store::attach). Throws std::bad_alloc
    void attach(layer & g, uint32_t cell, size_t n, const std::shared_ptr<const file> & in, uint64_t at);

    // the records of n neighbouring cells: made of rows as the cache has them; and those that the store has. false: it cannot be read
    void pack(const layer & g, size_t n, const uint8_t * k, const uint8_t * v, uint8_t * records) const;
    bool read(const layer & g, uint32_t cell, size_t n, uint8_t * records) const;

    // The rows of n neighbouring cells, as the cache has them. false: no room, and what comes later is lost, too
    bool put(layer & g, uint32_t cell, size_t n, const uint8_t * k, const uint8_t * v);

    // f(i, n, k, v) for the rows of these cells, which ascend: n of them from the i-th on, as the cache has them. false: the store
    // cannot be read
    using rows_fn = std::function<void(size_t i, size_t n, const uint8_t * k, const uint8_t * v)>;
    bool get(const layer & g, const std::vector<uint32_t> & cells, const rows_fn & f) const;

    // whether rows are in host memory, and from now on in memory that a device can read (cold_store::share_by)
    bool in_memory() const;
    void share_by(ggml_backend_buffer_type_t buft, std::function<void()> wait);

    // the address of a cell's record for a device; 0: it cannot read it
    uint64_t shared_address(const layer & g, uint32_t cell) const;

    // for those who read single rows of the store (warm_cells)
    const cold_store * get_store() const { return store.get(); }
    ggml_type             type_of(const layer & g, bool v) const;

    // cells first_dst + i get what first_src + i have, for i < n
    void copy(layer & g, uint32_t first_src, uint32_t first_dst, uint32_t n);

private:
    enum : uint8_t { OWN = 1, ATTACHED = 2 }; // layer::is_cold

    const llama_hparams & hparams;

    const bool     by_heads; // single heads are read (warm_cells)
    const int32_t  type;    // of rows that the cache has not quantised; -1: the cache's
    const uint64_t limit;   // bytes; 0: none
    const uint32_t n_cells; // of each layer

    std::unique_ptr<cold_store> store;

    std::atomic<uint64_t> n_bytes { 0 };
    uint64_t              n_attached = 0; // rows
    std::atomic<bool>     is_full { false };

    size_t   row_size(const layer & g, bool v) const;
    uint64_t place_of(const layer & g, uint32_t cell) const { return g.cold_place + cell*(uint64_t) g.record.bytes(); }

    bool write(const layer & g, uint32_t cell, size_t n, const uint8_t * k, const uint8_t * v);
};

} // namespace refreekv
