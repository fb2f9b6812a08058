#pragma once

#include "refreekv.h"

#include "cache/cache.h"
#include "cache/figures.h"
#include "cache/layer.h"
#include "cache/logical-cells.h"
#include "cache/turn.h"
#include "evict/evictor.h"
#include "graph/views.h"
#include "tiers/warm-tier.h"

#include <atomic>
#include <functional>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <vector>

namespace refreekv {

// The storage of a cache.
//
// Upstream's table of logical cells (positions, sequences, slot search, masks' rules) goes on as it is; what changes is
// where K and V lie. Each layer holds its own subset of the logical cells (refreekv::residency) in rows of its own
// (refreekv::rows), which grow as tokens come and shrink as they are evicted.
//
// Layers whose slots look alike to every query that may still come share a layout: one mask and one pair of index
// inputs in the graph. Before anything is evicted there is one layout, and the graph is upstream's.
//
// Contract: reserve() is the only place where a decode allocates, and the only one where it can fail; apply() assigns
// slots and cannot. Rows move (and graphs become stale, see generation()) only between graphs: in reserve(), update() and
// clear(), and where a sequence is copied to another stream or restored.
class store {
public:
    using slot_info       = llama_kv_cache::slot_info;
    using slot_info_vec_t = llama_kv_cache::slot_info_vec_t;

    // of the cache with a policy in a memory; nullptr: it has none
    static refreekv::store * of(llama_memory_t mem);

    //
    // operations on sequences; false: refused, and refreekv_last_error() says why
    //

    void clear();
    bool on_seq_rm   (llama_seq_id seq_id, llama_pos p0, llama_pos p1);
    bool on_seq_cp   (llama_seq_id src, llama_seq_id dst, llama_pos p0, llama_pos p1);
    void on_seq_keep (llama_seq_id seq_id);
    void refuse_shift(const char * op, llama_seq_id seq_id) const;

    // whether on_seq_rm() would not refuse, asked before another part of the memory removes the same
    bool may_seq_rm(llama_seq_id seq_id, llama_pos p0, llama_pos p1);

    // the last on_seq_cp()
    bool refused_seq_cp() const { return refused_copy; }

    std::map<ggml_backend_buffer_type_t, size_t> memory_breakdown() const;

    // room for a batch. false: no memory; what was there is untouched
    bool reserve(const slot_info_vec_t & sinfos);

    // tokens to come, this batch's among them: the next reserve() makes room for all of them, where it can
    void expect(uint32_t n_tokens) { n_expected = n_tokens; }

    // the next n_tokens tokens of a sequence are the rest of a prompt, and expected; -1: there is none
    void announce(llama_seq_id seq_id, int32_t n_tokens);

    const refreekv::turn & get_turn() const { return turn; }

    // true: something has to be done before this batch. update() does it, and the batch comes again
    bool plan_turn(const std::vector<llama_ubatch> & ubatches);

    // called before every batch; true when update() has something to do
    bool begin_update(llama_context * lctx);
    bool update(llama_context * lctx);

    void apply(const slot_info & sinfo, const llama_ubatch & ubatch);

    void state_write(llama_io_write_i & io, uint32_t strm, const std::vector<std::pair<uint32_t, uint32_t>> & ranges);
    void clear_rows (const slot_info & sinfo);
    bool state_read (llama_io_read_i  & io, uint32_t cell_count, const slot_info & sinfo);

    //
    // graphs
    //

    // counts up when a graph built before must not run again
    uint64_t generation() const { return n_generation; }

    uint32_t layout_of(uint32_t i_layer) const { return layers[i_layer].layout; }

    uint32_t n_layers() const { return layers.size(); }

    // of the model's layer il: whether it has a cache, and its place among those that have
    bool     has_layer(int32_t il) const { return il_to_layer.count(il) > 0; }
    uint32_t layer_of (int32_t il) const { return il_to_layer.at(il); }

    const refreekv::layouts & get_layouts() const { return layouts; }

    refreekv::views &         get_views() { return views; }

    const query_ring & get_ring() const { return ring; }
    bool has_rings() const { return !ring_bufs.empty(); }

    // their bytes; without allocation (hparams.no_alloc) what they would need
    std::map<ggml_backend_buffer_type_t, size_t> ring_breakdown() const;
    ggml_tensor * ring_of(uint32_t i_layer) const { return layers[i_layer].ring; }

    // what the eviction graph has to know of a layer's attention, seen when the decoding graph is built;
    // known: it is of the kind that the eviction graph computes
    void note_attention(uint32_t i_layer, float kq_scale, ggml_tensor * sinks, bool known);

    // nullptr: the attention of the layer is not of that kind
    const decode_softmax * softmax_of(uint32_t i_layer) const;

    // whether cells may be evicted: the cache is not the elastic full one
    bool evicts() const { return params.policy != REFREEKV_POLICY_ELASTIC; }

    // the evicted cells of a layer that decoding goes on attending to; nullptr: none
    const warm_view * warm_of(uint32_t i_layer) const;

    // a batch is about to be computed
    void begin_batch(const llama_ubatch & ubatch) { warm.begin_batch(layers, ubatch); }

    // nodes of the decoding graph that is being built; where the cache of a layer is
    void run_with_cache(ggml_tensor * node, uint32_t i_layer) const;
    ggml_backend_buffer_type_t buft_of(uint32_t i_layer) const { return layers[i_layer].rows.get_shape().buft; }
    void run_on_host(ggml_tensor * node) const;

    //
    // the C API (refreekv.h)
    //

    // cells evicted, or a refreekv_status; both run in update()
    int64_t prune(llama_context * lctx, llama_seq_id seq_id);
    int64_t keep (llama_context * lctx, llama_seq_id seq_id, int32_t il, const std::vector<llama_pos> & pos);

    // these positions stay, whatever the policy; a refreekv_status
    int32_t protect(llama_seq_id seq_id, llama_pos p0, llama_pos p1);

    // what was evicted comes back from the cold store; cells, or a refreekv_status
    int64_t restore(llama_context * lctx, llama_seq_id seq_id);

    // see refreekv_usable_prefix()
    int32_t usable_prefix(llama_seq_id seq_id, int32_t n_prefix, int32_t n_prompt) const;

    llama_pos pruned_pos(llama_seq_id seq_id) const;
    bool      valid_seq (llama_seq_id seq_id) const;

    // note the figures of now, for other threads to read. The owner's, between changes (publishing)
    void publish();

    const figures_board & get_figures() const { return board; }

    std::vector<llama_pos> kept(llama_seq_id seq_id, uint32_t i_layer) const;

    int32_t read_queries(llama_seq_id seq_id, uint32_t i_layer, float * out, llama_pos * pos, int32_t n_max) const;
    int32_t read_keys   (llama_seq_id seq_id, uint32_t i_layer, float * out, llama_pos * pos, int32_t n_max) const;

    // a refreekv_status
    int32_t read_attention(llama_context * lctx, llama_seq_id seq_id, uint32_t i_layer, float * out, uint64_t n_max, int32_t * shape);

    // prune the sequences noted by apply() since the last call (REFREEKV_NATIVE_PRUNE=tests)
    void prune_read(llama_context * lctx);

    store(cache & kv, const refreekv_params & params, bool prunes_read);
    ~store();

private:
    cache & kv;

    const logical_cells logical;

    refreekv_params       params;
    const bool            prunes_read;
    std::set<llama_seq_id> read;         // sequences that batches of several tokens added to

    std::vector<layer>          layers;
    std::map<int32_t, uint32_t> il_to_layer;
    refreekv::layouts           layouts;
    refreekv::views             views;

    query_ring ring; // one query more than a policy looks at: a token may be decoded and taken back before a pruning
    std::vector<std::pair<ggml_context_ptr, ggml_backend_buffer_ptr>> ring_bufs;

    std::vector<llama_pos> pruned;        // [LLAMA_MAX_SEQ] see pruned_pos()

    std::vector<span_list> spans; // [LLAMA_MAX_SEQ] see protect()

    std::atomic<uint64_t> n_generation { 0 };
    uint32_t n_expected    = 0;
    bool     stale_slots   = false;       // cells may have become empty
    bool     idle_rows     = false;       // whole sequences are gone: give their room back with the next batch
    bool     refused_copy  = false;
    bool     restoring     = false;       // cleared, and no batch since: a whole state may be read

    std::vector<std::function<int64_t()>> jobs; // what the next update() does
    int64_t          job_result = 0;

    figures_board board;

    refreekv_stats      stats() const;
    refreekv_layer_info layer_info(uint32_t i_layer) const;

    int64_t  n_prunes    = 0;
    int64_t  prune_us    = 0;
    uint64_t bytes_freed = 0;

    row_mover     mover;
    cold_rows     cold;
    warm_tier     warm;
    cold_transfer transfer;
    refreekv::evictor evictor;
    refreekv::turn    turn;

    int32_t n_turns_failed = 0;

    int64_t  n_restores = 0;
    int64_t  restore_us = 0;

    template <typename F>
    bool for_removed(llama_seq_id seq_id, llama_pos p0, llama_pos p1, F && f) const;
    bool can_remove (llama_seq_id seq_id, llama_pos p0, llama_pos gone0, llama_pos gone1);
    bool may_seq_cp (llama_seq_id src, llama_seq_id dst, llama_pos p0, llama_pos p1);

    void forget_seq(llama_seq_id seq_id);
    bool attends_to_all() const;
    void release_stale();
    bool copy_stream(llama_seq_id src, llama_seq_id dst);
    bool update_layouts();

    bool within_limit(uint64_t bytes) const;
    bool grow(const slot_info_vec_t & sinfos, uint32_t n_more);
    void give_back();

    bool make_room(layer & layer, uint32_t n);

    bool read_layer_head(llama_io_read_i & io, const layer & layer, uint32_t cell_count, std::vector<uint32_t> & cells) const;

    // a sequence in another stream is about to have the cells of this one: first_dst + i for first_src + i
    void copy_cold(uint32_t first_src, uint32_t first_dst);

    void write_cold(llama_io_write_i & io, const std::vector<uint32_t> & list) const;
    bool read_cold (llama_io_read_i  & io, const std::vector<uint32_t> & list);
    void write_warm(llama_io_write_i & io, const std::vector<uint32_t> & list) const;
    bool read_warm (llama_io_read_i  & io, const std::vector<uint32_t> & list);
    void code_missing(const std::vector<uint32_t> & list);

    std::vector<uint32_t> missing(const layer & layer, const std::vector<placed> & cells) const;

    int32_t restore_rows(const std::vector<std::vector<uint32_t>> & cells); // a refreekv_status
    int64_t restore_rows(llama_seq_id seq_id, llama_pos p0, llama_pos p1, uint32_t n_more);
    int64_t restore_now(llama_seq_id seq_id, llama_pos p0 = -1, llama_pos p1 = -1, uint32_t n_more = 0);

    int64_t run_job(llama_context * lctx, std::function<int64_t()> && job);
    int64_t run_step(const refreekv::turn::todo & todo); // a failure is counted, and the sequence goes on from what is there

    // pos: what to keep of layer il; nullptr: the policy decides, in every layer
    int64_t run_eviction(llama_seq_id seq_id, int32_t il, const std::vector<llama_pos> * pos);
};

// Publishes the figures of a store at the end of a scope that changes what the cache holds; nullptr: there is none
class publishing {
public:
    explicit publishing(refreekv::store * store) : store(store) {}
    ~publishing();

    publishing(const publishing &) = delete;

private:
    refreekv::store * store;
};

} // namespace refreekv
