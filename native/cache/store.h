#pragma once

#include "refreekv.h"
#include "kernels/decode.h"
#include "kernels/attention-cpu.h"
#include "cache/residency.h"
#include "evict/query-ring.h"
#include "cache/rows.h"

#include "cache/cache.h"

#include <atomic>
#include <functional>
#include <future>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <vector>

class refreekv_attention;
class refreekv_cold;

// The storage of a refreekv::cache.
//
// Upstream's table of logical cells (positions, sequences, slot search, masks' rules) goes on as it is; what changes is
// where K and V lie. The unit is a group of KV heads of one layer: it holds its own subset of the logical cells
// (refreekv_residency) in rows of its own (refreekv_rows), which grow as tokens come and shrink as they are evicted. A
// layer is one group, or two where some of its heads are kept whole (set_whole_heads).
//
// Groups whose slots look alike to every query that may still come share a layout: one mask and one pair of index
// inputs in the graph. Before anything is evicted there is one layout, and the graph is upstream's.
//
// Contract: reserve() is the only place where a decode allocates, and the only one where it can fail; apply() assigns
// slots and cannot. Rows move (and graphs become stale, see generation()) only between graphs: in reserve(), update() and
// clear(), and where a sequence is copied to another stream or restored.
class refreekv_store {
public:
    using slot_info       = llama_kv_cache::slot_info;
    using slot_info_vec_t = llama_kv_cache::slot_info_vec_t;

    // what has run in this process (refreekv_hooks_ran)
    enum hook : uint32_t {
        HOOK_CREATE     = 1 << 0,
        HOOK_RESERVE    = 1 << 1,
        HOOK_APPLY      = 1 << 2,
        HOOK_ATTENTION  = 1 << 3,
        HOOK_UPDATE     = 1 << 4,
    };
    static uint32_t hooks_ran();
    static void     hook_ran(hook h);

    // of the cache with a policy in a memory; nullptr: it has none
    static refreekv_store * of(llama_memory_t mem);

    // the same reports for a cache without a policy
    static refreekv_stats      full_stats(llama_memory_t mem, const llama_hparams & hparams);
    static refreekv_group_info full_group(llama_memory_t mem, const llama_hparams & hparams, uint32_t i_group);

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

    uint32_t n_layouts() const { return layouts.size(); }
    uint32_t layout_of(uint32_t i_group) const { return groups[i_group].layout; }

    uint32_t n_layers()   const { return layers.size(); }
    uint32_t n_heads_kv() const; // over all layers

    bool has_layer(int32_t il) const { return il_to_layer.count(il) > 0; }

    const std::vector<uint32_t> & groups_of(int32_t il)       const { return layers[il_to_layer.at(il)].groups; }
    const std::vector<uint32_t> & heads_of (uint32_t i_group) const { return groups[i_group].heads; }
    uint32_t layout_n_kv(uint32_t layout) const;

    // Layouts that end in the same way: the mask of one is that of the longest from this slot on, and a cell to come lies as far
    // from the end of each. -1: it is none of them
    int64_t  tail_of(uint32_t layout)  const { return tails[layout]; }
    uint32_t group_of_longest()        const { return layouts[longest]; }
    uint32_t group_of_shortest()       const { return layouts[shortest]; }

    // the indices, of the shortest, that cpy_k() and cpy_v() get for all of them in the graph that is being built; nullptr: none
    void share_idxs(const ggml_tensor * idxs) const { tail_idxs = idxs; }
    uint32_t worst_n_kv() const { return n_cells; }

    // indices that one token of a group takes in v_idxs
    int64_t n_v_idxs(uint32_t i_group) const;

    // reservation: a view of the worst case, which has no data
    ggml_tensor * get_k(ggml_context * ctx, uint32_t i_group, bool reservation) const;
    ggml_tensor * get_v(ggml_context * ctx, uint32_t i_group, bool reservation) const;
    // k_cur, v_cur: all heads of the layer
    ggml_tensor * cpy_k(ggml_context * ctx, ggml_tensor * k_cur, ggml_tensor * k_idxs, uint32_t i_group, bool reservation) const;
    ggml_tensor * cpy_v(ggml_context * ctx, ggml_tensor * v_cur, ggml_tensor * v_idxs, uint32_t i_group, bool reservation) const;

    void set_input_k_idxs(ggml_tensor * dst, uint32_t i_group, const slot_info & sinfo) const;
    void set_input_v_idxs(ggml_tensor * dst, uint32_t i_group, const slot_info & sinfo) const;
    void set_input_mask  (ggml_tensor * dst, uint32_t i_group, const llama_ubatch & ubatch, bool causal) const;

    const refreekv_ring & get_ring() const { return ring; }
    bool has_rings() const { return !ring_bufs.empty(); }

    // their bytes; without allocation (hparams.no_alloc) what they would need
    std::map<ggml_backend_buffer_type_t, size_t> ring_breakdown() const;
    ggml_tensor * ring_of(int32_t il) const { return layers[il_to_layer.at(il)].ring; }

    // what the eviction graph has to know of a layer's attention, seen when the decoding graph is built;
    // known: it is of the kind that the eviction graph computes
    void note_attention(int32_t il, float kq_scale, ggml_tensor * sinks, bool known);

    // nullptr: the attention of the layer is not of that kind
    const refreekv_decode_softmax * softmax_of(int32_t il) const;

    // whether cells may be evicted: the cache is not the elastic full one
    bool evicts() const { return params.policy != REFREEKV_POLICY_ELASTIC; }

    // what decoding may have of a group's evicted rows; nullptr: nothing
    refreekv_decode_evicted * evicted_of(uint32_t i_group) const;

    void note_batch(const llama_ubatch & ubatch);

    // nodes of the decoding graph that is being built; where the cache of a group is
    void run_with_cache(ggml_tensor * node, uint32_t i_group) const;
    ggml_backend_buffer_type_t buft_of(uint32_t i_group) const { return groups[i_group].rows.get_shape().buft; }
    void run_on_host(ggml_tensor * node) const;

    //
    // the C API (refreekv.h)
    //

    // cells evicted, or a refreekv_status; both run in update()
    // by: parameters to choose by in place of the context's, nullptr: none
    int64_t prune(llama_context * lctx, llama_seq_id seq_id, const refreekv_params * by = nullptr);
    int64_t keep (llama_context * lctx, llama_seq_id seq_id, int32_t il, const std::vector<llama_pos> & pos);

    // these positions stay, whatever the policy; a refreekv_status
    int32_t protect(llama_seq_id seq_id, llama_pos p0, llama_pos p1);

    // what was evicted comes back from the cold store; cells, or a refreekv_status
    int64_t restore(llama_context * lctx, llama_seq_id seq_id);

    // (layer, KV head) that policies do not touch; a refreekv_status. The cache has to be empty
    using heads_list = std::vector<std::pair<int32_t, uint32_t>>;
    int64_t set_whole_heads(llama_context * lctx, const heads_list & heads);

    llama_pos pruned_pos(llama_seq_id seq_id) const;
    bool      valid_seq (llama_seq_id seq_id) const;

    // What the store says of itself, of one moment, and allocated so that publishing allocates nothing
    struct figures {
        refreekv_stats                                             stats = {};
        std::vector<refreekv_group_info>                           groups;
        std::vector<std::pair<ggml_backend_buffer_type_t, size_t>> bytes; // of rows and rings; empty when nothing is allocated
    };

    // note the figures of now, for other threads to read. The owner's, between changes (refreekv_publishing)
    void publish();

    // f(figures) of the last publish(); any thread
    template <typename F>
    void read_figures(F && f) const {
        std::lock_guard<std::mutex> lock(figures_mutex);
        f(published);
    }

    uint32_t n_groups() const { return groups.size(); }

    std::vector<llama_pos> kept(llama_seq_id seq_id, uint32_t i_group) const;

    int32_t read_queries(llama_seq_id seq_id, uint32_t i_group, float * out, llama_pos * pos, int32_t n_max) const;
    int32_t read_keys   (llama_seq_id seq_id, uint32_t i_group, float * out, llama_pos * pos, int32_t n_max) const;

    // a refreekv_status
    int32_t read_attention(llama_context * lctx, llama_seq_id seq_id, uint32_t i_group, float * out, uint64_t n_max, int32_t * shape);

    // prune the sequences noted by apply() since the last call (REFREEKV_NATIVE_PRUNE=auto)
    void prune_read(llama_context * lctx);

    refreekv_store(refreekv::cache & kv, const refreekv_params & params, bool prunes_read);
    ~refreekv_store();

private:
    refreekv::cache & kv;

    struct layer {
        int32_t il;

        refreekv_rows::shape  shape; // of all its KV heads together
        std::vector<uint32_t> groups;

        ggml_tensor * ring = nullptr;

        // from note_attention
        float         kq_scale = 0.0f;
        ggml_tensor * sinks    = nullptr;
        bool          known    = true;

        refreekv_decode_softmax softmax = {};
    };

    // some KV heads of one layer
    struct group {
        int32_t               il;
        std::vector<uint32_t> heads; // ascending
        bool                  whole; // no policy evicts from it
        uint32_t              layout = 0;

        refreekv_residency res;
        refreekv_rows      rows;

        uint64_t             cold_place = 0; // of its rows in the cold store: K by cell, then V by cell
        std::vector<uint8_t> is_cold;        // [n_cells] whether it has the row of a cell

        std::unique_ptr<refreekv_decode_evicted> evicted; // what decoding knows of them; nullptr: it goes on without
    };

    // a cell of one sequence; upstream has them in a tree, which is walked once for all groups
    struct placed {
        llama_pos pos;
        uint32_t  cell;
    };

    // ... that one group holds
    struct held {
        llama_pos pos;
        uint32_t  cell;
        uint32_t  slot;
        bool      stays; // another sequence needs it too, or it is protected
    };

    // Upstream has a table of cells per stream (per sequence, unless kv_unified). Here all of them share the rows of a
    // group, and a cell is known by stream*kv_size + index; a mask keeps sequences apart, as in a unified cache.
    const uint32_t kv_size;
    const uint32_t n_cells; // over all streams

    const llama_kv_cells & table_of(uint32_t cell) const { return kv.v_cells[cell/kv_size]; }
    uint32_t               index_of(uint32_t cell) const { return cell % kv_size; }
    const llama_kv_cells & table_of_seq(llama_seq_id seq_id) const { return kv.v_cells[kv.seq_to_stream[seq_id]]; }
    llama_seq_id           n_seq_ids() const { return kv.seq_to_stream.size(); }

    bool      is_empty(uint32_t cell) const                  { return table_of(cell).is_empty(index_of(cell)); }
    bool      seq_has (uint32_t cell, llama_seq_id s) const  { return table_of(cell).seq_has (index_of(cell), s); }
    llama_pos pos_of  (uint32_t cell) const                  { return table_of(cell).pos_get (index_of(cell)); }
    bool      shared  (uint32_t cell) const                  { return table_of(cell).seq_count(index_of(cell)) > 1; }

    // f(cell) for the cells of a batch, in the order of its tokens
    template <typename F>
    void for_cells(const slot_info & sinfo, F && f) const {
        for (size_t s = 0; s < sinfo.n_stream(); ++s) {
            for (uint32_t i : sinfo.idxs[s]) {
                f(sinfo.strm[s]*kv_size + i);
            }
        }
    }

    const refreekv_params params;
    const bool            prunes_read;
    std::set<llama_seq_id> read;         // sequences that batches of several tokens added to
    llama_context *       lctx = nullptr; // of the last update

    std::vector<layer>          layers;
    std::map<int32_t, uint32_t> il_to_layer;
    std::vector<group>          groups; // in the order of layers
    std::vector<uint32_t>       layouts;  // the group that stands for each layout
    std::vector<int64_t>        tails;    // [n_layouts] see tail_of()
    uint32_t                    longest  = 0;
    uint32_t                    shortest = 0; // of those that are tails
    mutable const ggml_tensor * tail_idxs = nullptr;

    refreekv_ring ring; // one query more than a policy looks at: a token may be decoded and taken back before a pruning
    std::vector<std::pair<ggml_context_ptr, ggml_backend_buffer_ptr>> ring_bufs;

    std::vector<llama_pos> pruned;        // [LLAMA_MAX_SEQ] see pruned_pos()

    std::vector<std::vector<std::pair<llama_pos, llama_pos>>> spans; // [LLAMA_MAX_SEQ] protected positions, ends excluded

    std::atomic<uint64_t> n_generation { 0 };
    uint32_t n_expected    = 0;
    bool     stale_slots   = false;       // cells may have become empty
    bool     idle_rows     = false;       // whole sequences are gone: give their room back with the next batch
    bool     refused_copy  = false;
    bool     restoring     = false;       // cleared, and no batch since: a whole state may be read
    bool     stale_layouts = true;
    bool     regrouped     = false;       // layers were divided anew

    std::vector<std::function<int64_t()>> jobs; // what the next update() does
    int64_t          job_result = 0;

    mutable std::mutex figures_mutex; // of published
    figures            published;
    figures            unpublished;

    refreekv_stats      stats() const;
    refreekv_group_info group_info(uint32_t i_group) const;

    int64_t  n_prunes    = 0;
    int64_t  prune_us    = 0;
    uint64_t bytes_freed = 0;

    std::atomic<uint64_t> bytes_read    { 0 }; // answers of the eviction graph
    std::atomic<uint64_t> bytes_bounced { 0 }; // K and queries that it could not look at where they are

    std::unique_ptr<refreekv_cold> cold; // nullptr: what is evicted is gone
    std::atomic<uint64_t> bytes_cold { 0 };
    std::atomic<bool>     cold_full  { false };
    int64_t  n_restores = 0;
    int64_t  restore_us = 0;

    float                     fault_mass = 0.0f; // 0: decoding goes on without what is evicted
    std::vector<llama_seq_id> batch_seq; // of the tokens of the batch that is being decoded
    std::vector<llama_pos>    batch_pos;
    bool                      warned_of_lost = false;

    uint32_t padded(uint32_t n) const;

    template <typename F>
    bool for_removed(llama_seq_id seq_id, llama_pos p0, llama_pos p1, F && f) const;
    bool can_remove (llama_seq_id seq_id, llama_pos p0, llama_pos gone0, llama_pos gone1);
    bool may_seq_cp (llama_seq_id src, llama_seq_id dst, llama_pos p0, llama_pos p1);

    void forget_seq(llama_seq_id seq_id);
    void synchronize() const; // a graph may still read what is about to be freed
    void release_stale();
    bool copy_stream(llama_seq_id src, llama_seq_id dst);
    bool update_layouts();
    bool same_from(const group & a, uint32_t n, const group & b, const std::vector<uint8_t> & settled) const;

    std::vector<uint32_t> all_slots (const group & g) const;
    std::vector<uint32_t> used_slots(const group & g) const;

    bool within_limit(uint64_t bytes) const;
    bool grow(const slot_info_vec_t & sinfos, uint32_t n_more);
    void give_back();

    bool move(group & g, const std::vector<uint32_t> & slots, uint32_t capacity, const refreekv_rows::host_rows & in = {});
    ggml_backend_t backend_of(const group & g) const;
    bool           in_place  (const group & g) const;
    uint32_t       n_threads () const;
    ggml_backend_t host_backend() const;

    const layer & layer_of(const group & g) const { return layers[il_to_layer.at(g.il)]; }

    // heads of a layer that are stored together
    struct part {
        std::vector<uint32_t> heads;
        bool                  whole;
    };
    std::vector<part>    divide  (const layer & layer, const heads_list & whole) const;
    refreekv_rows::shape shape_of(const layer & layer, const std::vector<uint32_t> & heads) const;

    void       make_groups(const heads_list & whole);
    bool       valid_heads(const heads_list & heads) const;
    heads_list whole_heads() const; // ascending
    bool       holds_nothing() const;

    bool make_room(group & g, uint32_t n);

    bool read_whole_heads (llama_io_read_i & io, heads_list & heads) const;
    bool read_group_head  (llama_io_read_i & io, int32_t il, size_t n_heads, bool whole, const refreekv_rows::shape & shape, uint32_t cell_count, std::vector<uint32_t> & cells);
    bool read_divided_anew(llama_io_read_i & io, const heads_list & theirs, const std::vector<uint32_t> & list);

    void make_cold();
    void place_cold();
    void forget_cold(group & g, const std::vector<uint32_t> & cells);
    void copy_cold  (uint32_t first_src, uint32_t first_dst);

    // of a row in the cache and in the cold store, where it may be of a smaller type; v: its V, else its K
    ggml_type cache_type(const group & g, bool v) const;
    ggml_type cold_type (const group & g, bool v) const;
    int64_t   n_embd    (const group & g, bool v) const;
    size_t    cache_row (const group & g, bool v) const; // bytes
    size_t    cold_row  (const group & g, bool v) const;
    size_t    cold_bytes(const group & g) const;         // K and V

    uint64_t cold_place(const group & g, uint32_t cell, bool v) const;

    // rows are those of the cache
    bool put_cold(group & g, uint32_t cell, size_t n, const uint8_t * k, const uint8_t * v);
    bool get_cold(const group & g, bool v, const std::vector<uint32_t> & cells, const std::function<void(size_t, size_t, const uint8_t *)> & f) const;

    void write_cold(llama_io_write_i & io, const std::vector<uint32_t> & list) const;
    bool read_cold (llama_io_read_i  & io, const std::vector<uint32_t> & list);

    float check_faults() const;
    void make_faults(uint32_t i_group);
    void sketch(group & g, const std::vector<uint32_t> & cells, const std::function<const uint8_t * (size_t)> & row);
    void refresh_sketches();

    // for one group after the other
    struct eviction_scratch {
        refreekv_attention_scratch attention;

        // rows of a device come to one of these, while those of the group before are put into the cold store from the other
        refreekv_rows::host_rows rows[2];
        std::future<int32_t>     put;                      // waits for it when it goes
        int32_t                  put_status = REFREEKV_OK; // of those that are done
    };

    static void finish_put(eviction_scratch & scratch);

    void stash(group & g, std::vector<uint32_t> cells, eviction_scratch & scratch);

    bool                  lacks  (const group & g, uint32_t cell) const;
    std::vector<uint32_t> missing(const group & g, const std::vector<placed> & cells) const;

    int32_t bring_back (group & g, const std::vector<uint32_t> & cells, refreekv_rows::host_rows & in); // a refreekv_status
    int32_t bring_back (const std::vector<std::vector<uint32_t>> & cells); // a refreekv_status
    int64_t bring_back (llama_seq_id seq_id, llama_pos p0, llama_pos p1);
    int64_t restore_now(llama_seq_id seq_id, llama_pos p0 = -1, llama_pos p1 = -1);

    int64_t run_job(llama_context * lctx, std::function<int64_t()> && job);

    // pos: what to keep of layer il; nullptr: the policy decides, in every layer, by these parameters
    int64_t run_eviction(llama_seq_id seq_id, int32_t il, const std::vector<llama_pos> * pos, const refreekv_params & by);
    int32_t evict_group (group & g, llama_seq_id seq_id, const std::vector<held> & all, const std::vector<llama_pos> * pos, const refreekv_params & by, eviction_scratch & scratch, std::atomic<int64_t> & n_evicted); // a refreekv_status

    // in the order of positions; but for p0 to p1 - 1
    std::vector<placed> cells_of(llama_seq_id seq_id, llama_pos p0 = -1, llama_pos p1 = -1) const;

    // the same, before it is known which of them a group holds, and in which slots
    std::vector<held> all_cells (llama_seq_id seq_id) const;
    std::vector<held> held_cells(const group & g, std::vector<held> all) const;

    // what a policy may see of a sequence in a group; a refreekv_status
    int32_t look  (const group & g, llama_seq_id seq_id, const std::vector<held> & list, const refreekv_params & by, refreekv_attention_scratch & scratch, std::unique_ptr<refreekv_attention> & attn) const;
    int32_t select(const group & g, llama_seq_id seq_id, const std::vector<held> & list, const refreekv_params & by, refreekv_attention_scratch & scratch, std::vector<uint8_t> & keep);
    bool evict (group & g, const std::vector<held> & list, const std::vector<uint8_t> & keep, eviction_scratch & scratch);

    // tensors of the worst case, which have no memory
    struct worst_rows {
        ggml_context_ptr ctx;
        ggml_tensor * k = nullptr;
        ggml_tensor * v = nullptr;
    };
    mutable std::vector<worst_rows> worst; // [n_groups] made when they are asked for

    const worst_rows & worst_of(const group & g) const;

    // K and V of a group as matrices; reservation: of its shape, in the worst case
    ggml_tensor * rows_k(const group & g, bool reservation) const;
    ggml_tensor * rows_v(const group & g, bool reservation) const;

    // those that indices of the shortest layout count from
    ggml_tensor * rows_for(ggml_context * ctx, ggml_tensor * rows, const group & g, const ggml_tensor * idxs) const;

    template <typename T>
    void fill_mask(T * data, int64_t n_kv, const group & g, const llama_ubatch & ubatch, bool causal) const;

    bool visible(uint32_t cell, const llama_ubatch & ubatch, uint32_t i, bool causal) const;
};

// Publishes the figures of a store at the end of a scope that changes what the cache holds; nullptr: there is none
class refreekv_publishing {
public:
    explicit refreekv_publishing(refreekv_store * store) : store(store) {}
    ~refreekv_publishing();

    refreekv_publishing(const refreekv_publishing &) = delete;

private:
    refreekv_store * store;
};
