#pragma once

#include "refreekv.h"
#include "cache/layer.h"
#include "cache/logical-cells.h"
#include "cache/row-mover.h"
#include "tiers/cold-rows.h"

#include <atomic>
#include <cstdint>
#include <functional>
#include <vector>

struct llama_hparams;
struct llama_ubatch;

namespace refreekv {

// The warm tier of a cache: what was evicted, and is held in codes so that decoding goes on attending to it. A layer in host memory has the
// codes of our kernel, where that fits the model; any other has tensors (tiers/code-tensors.h), of which our kernels for devices have the same
// codes (graph/device-node.h).
class warm_tier {
public:
    // Until it is opened there is no warm tier
    warm_tier(const llama_hparams & hparams, const logical_cells & logical, const row_mover & mover, const cold_rows & cold, std::atomic<uint64_t> & n_generation) :
        hparams(hparams), logical(logical), mover(mover), cold(cold), n_generation(n_generation) {}

    // where the parameters ask for one, and these layers can have it
    void open(const refreekv_params & params, const std::vector<layer> & layers);

    bool exists() const { return share > 0.0f; }

    // whether some layer has tensors
    bool has_tensors() const { return n_by_graph + n_by_device > 0; }

    // the part of a head's attention at which a row is read from the cold store; 0: no row ever is
    float theta() const { return n_by_kernel > 0 || (n_by_device > 0 && shared) ? share : 0.0f; }

    // host memory that devices with our kernels read rows from; nullptr: there is no such device
    ggml_backend_buffer_type_t shared_memory() const { return shared; }

    // bytes of codes over those of the same rows in f16; 0: there are none
    float share_of_f16(const std::vector<layer> & layers) const;

    // the layer's places in the cold store are known, and it stays where it is
    void make(layer & layer) const;

    // Codes of cells that are about to leave the cache, or have come from a state. rows(indices, n, k, v)
    // writes the rows of n of them, as the cache has them. Works on several layers at once. Throws std::bad_alloc
    using rows_fn = std::function<void(const uint32_t * indices, size_t n, uint8_t * k, uint8_t * v)>;
    void add(layer & layer, const std::vector<uint32_t> & cells, const rows_fn & rows) const;

    // after cells have come back, or have been removed from the cache or from a sequence
    void refresh(std::vector<layer> & layers) const;

    // cells first_dst + i of a layer get what first_src + i have, for i < n
    void copy(layer & layer, uint32_t first_src, uint32_t first_dst, uint32_t n) const;

    // a batch is about to be computed
    void begin_batch(std::vector<layer> & layers, const llama_ubatch & ubatch);

private:
    const llama_hparams &   hparams;
    const logical_cells &   logical;
    const row_mover &       mover;
    const cold_rows &       cold;
    std::atomic<uint64_t> & n_generation;

    float    share          = 0.0f; // theta; 0: there is no warm tier
    float    max_error      = 0.0f;
    bool     by_graph       = false; // tensors where our kernel could do it (debug)
    uint32_t n_by_kernel    = 0; // layers
    uint32_t n_by_graph     = 0;
    uint32_t n_by_device    = 0; // by our kernels for devices
    ggml_backend_buffer_type_t shared = nullptr;
    bool     warned_of_lost = false;

    uint64_t exact_generation = UINT64_MAX; // of the addresses that devices have

    bool fits_kernel(const layer & layer) const;
    bool fits_device_kernels(const layer & layer) const;

    // of codes that are tensors
    ggml_type type_of_v(const layer & layer) const;

    // the addresses of a device's exact rows, after cells came or went; and what it has read
    void update_exact(layer & layer) const;

    void encode(const layer & layer, bool is_v, int64_t n, const float * numbers) const;
};

} // namespace refreekv
