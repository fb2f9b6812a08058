#pragma once

#include "refreekv.h"

#include "cache/growth.h"
#include "cache/inspection.h"
#include "cache/parts.h"
#include "cache/sequences.h"
#include "cache/updates.h"
#include "evict/evict.h"
#include "graph/views.h"
#include "library/library.h"
#include "state/state.h"
#include "tiers/restore.h"

#include <map>
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
// slots and cannot. Rows move (and graphs become stale, see generation()) only between graphs: in reserve(), updates::run() and
// sequences::clear(), and where a sequence is copied to another stream or restored.
class store {
public:
    using slot_info       = llama_kv_cache::slot_info;
    using slot_info_vec_t = llama_kv_cache::slot_info_vec_t;

    store(cache & kv, const refreekv_params & params, bool prunes_read);

    // of the cache with a policy in a memory; nullptr: it has none
    static refreekv::store * of(llama_memory_t mem);

private:
    parts p;

    const bool prunes_read;

    growth      grow     { p };
    eviction    evict    { p };
    restoration restore  { p };

public:
    // the jobs
    sequences  seqs   { p, restore };
    updates    update { p, evict, restore };
    states     state  { p };
    library    books  { p };
    inspection look   { p };

    //
    // batches
    //

    // room for a batch. false: no memory; what was there is untouched
    bool reserve(const slot_info_vec_t & sinfos) { return grow.reserve(sinfos); }

    // tokens to come, the next batch's among them: its reservation makes room for all of them, where it can
    void expect(uint32_t n_tokens) { p.n_expected = n_tokens; }

    // the next n_tokens tokens of a sequence are the rest of a prompt, and expected; -1: there is none
    void announce(llama_seq_id seq_id, int32_t n_tokens);

    const refreekv::turn & get_turn() const { return p.turn; }

    // something failed halfway: what it has left is removed before the next batch
    void note_failure() { p.stale_slots = true; }

    void apply(const slot_info & sinfo, const llama_ubatch & ubatch);

    // the cells of a batch are about to be computed with
    void begin_batch(const llama_ubatch & ubatch) { p.warm.begin_batch(p.layers, ubatch); }

    // Whether a thread that computes a batch has no memory is noted from here on; check_memory() throws std::bad_alloc then
    void watch_memory() { p.no_memory = false; }
    void check_memory();

    //
    // graphs
    //

    // counts up when a graph built before must not run again
    uint64_t generation() const { return p.n_generation; }

    uint32_t layout_of(uint32_t i_layer) const { return p.layers[i_layer].layout; }

    uint32_t n_layers() const { return p.layers.size(); }

    const layer & get_layer(uint32_t i_layer) const { return p.layers[i_layer]; }

    // of the model's layer il: whether it attends to a cache, the layer that has it, and its place among those that attend to it
    bool     has_layer(int32_t il) const { return p.readers.count(il) > 0; }
    uint32_t layer_of (int32_t il) const { return p.readers.at(il).first; }
    uint32_t reader_of(int32_t il) const { return p.readers.at(il).second; }
    uint32_t n_readers()           const { return p.readers.size(); }

    bool has_v(uint32_t i_layer) const { return p.layers[i_layer].has_v(); } // false: V is a part of K

    const refreekv::layouts & get_layouts() const { return p.layouts; }

    refreekv::views & get_views() { return views; }

    const query_ring & get_ring() const { return p.ring; }
    bool has_rings() const { return !p.ring_bufs.empty(); }
    ggml_tensor * ring_of(int32_t il) const { return p.layers[layer_of(il)].readers[reader_of(il)].ring; }

    // what the eviction graph has to know of the attention of the model's layer il, seen when the decoding graph is built;
    // known: it is of the kind that the eviction graph computes. false: another layer, whose cells it shares, has other scales
    bool note_attention(int32_t il, float kq_scale, ggml_tensor * sinks, bool known);

    // nullptr: the attention of the model's layer il is not of that kind
    const decode_softmax * softmax_of(int32_t il) const;

    // whether cells may be evicted: the cache is not the elastic full one
    bool evicts() const { return p.params.policy != REFREEKV_POLICY_ELASTIC; }

    // the evicted cells of a layer that decoding goes on attending to, by our kernel; nullptr: none
    const warm_view * warm_of(uint32_t i_layer) const;

    // the same as tensors of the graph (graph/codes.h); nullptr: none
    const warm_cells * codes_of(uint32_t i_layer) const;
    bool has_code_tensors() const { return p.warm.has_tensors(); } // or may have

    // nodes of the decoding graph that is being built; where the cache of a layer is
    void run_with_cache(ggml_tensor * node, uint32_t i_layer) const;
    ggml_backend_buffer_type_t buft_of(uint32_t i_layer) const { return p.layers[i_layer].rows.get_shape().buft; }
    void run_on_host(ggml_tensor * node) const;

    //
    // the C API (refreekv.h)
    //

    // these positions stay, whatever the policy; a refreekv_status
    int32_t protect(llama_seq_id seq_id, llama_pos p0, llama_pos p1);

    // see refreekv_usable_prefix()
    int32_t usable_prefix(llama_seq_id seq_id, int32_t n_prefix, int32_t n_prompt) const;

    // the last position that a pruning has looked at; -1: the sequence is whole
    llama_pos pruned_pos(llama_seq_id seq_id) const { return p.pruned[seq_id]; }
    bool      valid_seq (llama_seq_id seq_id) const { return p.valid_seq(seq_id); }

    // note the figures of now, for other threads to read. The owner's, between changes
    void publish() { refreekv::publish(p); }
    publishing publish_later() { return publishing(p); }

    const figures_board & get_figures() const { return p.board; }

    std::map<ggml_backend_buffer_type_t, size_t> memory_breakdown() const { return p.memory_breakdown(); }
    std::map<ggml_backend_buffer_type_t, size_t> ring_breakdown()   const { return p.ring_breakdown(); }

private:
    refreekv::views views { p.hparams, p.layers, p.logical, p.layouts };
};

} // namespace refreekv
