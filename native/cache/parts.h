#pragma once

#include "refreekv.h"

#include "cache/cache.h"
#include "cache/figures.h"
#include "cache/layer.h"
#include "cache/logical-cells.h"
#include "cache/turn.h"
#include "evict/evictor.h"
#include "graph/layouts.h"
#include "tiers/cold-rows.h"
#include "tiers/warm-tier.h"

#include <atomic>
#include <map>
#include <utility>
#include <vector>

struct llama_ubatch;

namespace refreekv {

// The parts of a cache with a policy, and what is known of its sequences. Each part is given those that it works on; the jobs of a cache
// (growth, sequences, eviction, restoration, updates, states) work on all of them, and are classes of their own.
struct parts {
    parts(cache & kv, const refreekv_params & params);

    cache &               kv;
    const llama_model &   model;
    const llama_hparams & hparams;
    const bool            v_trans;
    const uint32_t        n_stream;

    const logical_cells logical;

    refreekv_params params;

    std::vector<layer>          layers;
    std::map<int32_t, std::pair<uint32_t, uint32_t>> readers; // by layer of the model: the layer that has its cells, and its place among the readers
    refreekv::layouts           layouts;

    query_ring ring; // n_window + 1 queries, so that the window is whole after a token was decoded and removed
    std::vector<std::pair<ggml_context_ptr, ggml_backend_buffer_ptr>> ring_bufs;

    std::vector<llama_pos> pruned; // [n_seq_ids] the last position that a pruning has looked at; -1: the sequence is whole
    std::vector<uint32_t>  exact;  // [n_seq_ids] leading tokens that were read while nothing before them was evicted
    std::vector<uint8_t>   loaded; // [n_seq_ids] some of it came with a state
    std::vector<span_list> spans;  // [n_seq_ids] protected positions

    std::atomic<uint64_t> n_generation { 0 }; // counts up when a graph built before must not run again

    uint32_t n_expected  = 0;     // tokens to come, for which the next reservation makes room where it can
    bool     stale_slots = false; // cells may have become empty, or something failed halfway: release_stale() has to run before the next batch
    bool     idle_rows   = false; // whole sequences are gone: give their room back with the next batch
    std::atomic<bool> no_memory { false }; // a thread of our kernels had none (kernels/decode.h)

    bool     emptied     = false; // cleared, and no batch since: a whole state may be read

    row_mover         mover;
    cold_rows         cold;
    warm_tier         warm;
    cold_transfer     transfer;
    refreekv::evictor evictor;
    refreekv::turn    turn;

    figures_board board;
    uint32_t      n_changes = 0; // scopes of changes, one in the other (publishing)

    // for the figures
    int64_t  n_prunes       = 0;
    int64_t  prune_us       = 0;
    uint64_t bytes_freed    = 0;
    int64_t  n_restores     = 0;
    int64_t  restore_us     = 0;
    int32_t  n_turns_failed = 0;

    void add_readers();

    bool valid_seq(llama_seq_id seq_id) const;

    size_t bytes() const; // of rows

    // whether so many bytes of rows, with the codes there are, are within the limit; sets the error
    bool within_limit(uint64_t bytes) const;

    // Whether the codes that came with a state or a copy are within the limit, beside rows that the next batch can shrink to; sets the error
    bool has_room_for_codes();

    // room for n cells more; false: there is none, and the error says why
    bool make_room(layer & layer, uint32_t n);

    // after cells came or went; whether graphs need another reservation
    bool update_layouts();

    // slots of cells that upstream has emptied
    void release_stale();

    // a sequence that has no cells any more
    void forget_seq(llama_seq_id seq_id);

    // whether rows come back from the cold store as they were
    bool keeps_exact_rows() const { return params.cold_type < 0; }

    // tokens have been read
    void note_exact(const llama_ubatch & ubatch);

    // a sequence in another stream is about to have the cells of this one: first_dst + i for first_src + i
    void copy_cold(uint32_t first_src, uint32_t first_dst);

    std::map<ggml_backend_buffer_type_t, size_t> memory_breakdown() const;

    // of the query rings; without allocation (hparams.no_alloc) what they would need
    std::map<ggml_backend_buffer_type_t, size_t> ring_breakdown() const;
};

// the figures of now, for other threads to read. The owner's, between changes
void publish(parts & p);

// Publishes the figures at the end of a scope that changes what the cache holds, the outermost one: a state that is read, for example,
// removes a sequence first
class publishing {
public:
    explicit publishing(parts & p) : p(p) { p.n_changes++; }
    ~publishing();

    publishing(const publishing &) = delete;

private:
    parts & p;
};

} // namespace refreekv
