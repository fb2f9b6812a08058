#pragma once

#include "llama-kv-cache.h"

#include <memory>

namespace refreekv {

struct parts;
class  store;

// The hyperparameters with which llama_kv_cache makes its tensors without memory. A base class, because llama_kv_cache is
// constructed after it and keeps a reference to them.
struct hparams_no_alloc {
    explicit hparams_no_alloc(const llama_hparams & hparams) : own(hparams) {
        own.no_alloc = true;
    }
    llama_hparams own;
};

// A llama_kv_cache whose context has a KV policy. Upstream's table of logical cells (positions, sequences, search for
// slots) goes on as it is; the tensors are only shapes. K and V lie in a refreekv::store, to which the operations that touch
// them are forwarded.
class cache final : private hparams_no_alloc, public llama_kv_cache {
public:
    // the arguments of llama_kv_cache; the policy is that of next_params()
    template <typename... Args>
    cache(const llama_model & model, const llama_hparams & hparams, Args &&... args) :
        hparams_no_alloc(hparams), llama_kv_cache(model, own, std::forward<Args>(args)...) {
        make_store();
    }

    // the cache with a policy of a memory, which may be a part of it; nullptr: there is none
    static cache * of(llama_memory_t mem);

    // the part of a memory that can have a policy: the cache itself, the layers without a window of an iSWA cache, the
    // attention layers of a hybrid memory; nullptr: there is none
    static llama_kv_cache * part_of(llama_memory_t mem);

    refreekv::store & get_store() const { return *store; }

    llama_memory_context_ptr init_full() override;
    llama_memory_context_ptr init_update(llama_context * lctx, bool optimize) override;
    llama_memory_context_ptr init_context(slot_info_vec_t sinfos, std::vector<llama_ubatch> ubatches) override;

    slot_info_vec_t prepare(const std::vector<llama_ubatch> & ubatches) override;

    bool get_can_shift() const override;

    void clear   (bool data) override;
    bool seq_rm  (llama_seq_id seq_id,                              llama_pos p0, llama_pos p1) override;
    void seq_cp  (llama_seq_id seq_id_src, llama_seq_id seq_id_dst, llama_pos p0, llama_pos p1) override;
    void seq_keep(llama_seq_id seq_id) override;
    void seq_add (llama_seq_id seq_id, llama_pos p0, llama_pos p1, llama_pos shift) override;
    void seq_div (llama_seq_id seq_id, llama_pos p0, llama_pos p1, int d) override;

    std::map<ggml_backend_buffer_type_t, size_t> memory_breakdown() const override;

    void state_write(llama_io_write_i & io, llama_seq_id seq_id = -1, llama_state_seq_flags flags = 0) const override;
    void state_read (llama_io_read_i  & io, llama_seq_id seq_id = -1, llama_state_seq_flags flags = 0) override;

    using llama_kv_cache::state_clear;

    // Turns the keys of cells whose positions have changed. false: it failed, and the error says why; until it works no batch is taken
    bool turn_keys(llama_context * lctx);

    // Cells for positions 0 to n - 1 of a sequence, which has none. Empty: there is no room for them
    slot_info take_cells(llama_seq_id seq_id, uint32_t n);

private:
    friend struct ::refreekv::parts;

    std::shared_ptr<refreekv::store> store; // never nullptr; shared only so that its type may be incomplete here

    void make_store();

    ggml_cgraph * build_turn(llm_graph_result * res, llama_context * lctx) const;

    void state_write_data(llama_io_write_i & io, const cell_ranges_t & cr) const override;
    bool state_read_data (llama_io_read_i & io, uint32_t strm, uint32_t cell_count, const slot_info & sinfo) override;
    void state_clear     (llama_seq_id seq_id, uint32_t strm, const slot_info & sinfo) override;
};

// What one batch, one update or one reservation sees of a cache. Its graphs take K, V, masks and indices from a
// graph_input (graph/input.h), so nothing that upstream would take from here is to be had.
class cache_context final : public llama_kv_cache_context {
public:
    explicit cache_context(cache & owner);                                                                    // reservation
    cache_context(cache & owner, llama_context * lctx, stream_copy_info sc_info);                             // update
    cache_context(cache & owner, slot_info_vec_t sinfos, std::vector<llama_ubatch> ubatches);                 // batch

    // the cache's part of the context of a memory; nullptr: it has none with a policy
    static const cache_context * of(const llama_memory_context_i * mctx);

    refreekv::store & get_store() const { return owner.get_store(); }

    // shapes of the worst case, without cells
    bool is_reservation() const { return ubatches.empty(); }

    // the cells of the current ubatch
    const llama_kv_cache::slot_info & get_slots() const { return sinfos[i_cur]; }

    bool apply() override;

    // A graph that asks for these computes attention in a way of its own: they throw, at the latest when the first graph
    // is reserved, and the context is not created.
    [[noreturn]] ggml_tensor * get_k(ggml_context * ctx, int32_t il) const override;
    [[noreturn]] ggml_tensor * get_v(ggml_context * ctx, int32_t il) const override;
    [[noreturn]] ggml_tensor * cpy_k(ggml_context * ctx, ggml_tensor * k_cur, ggml_tensor * k_idxs, int32_t il) const override;
    [[noreturn]] ggml_tensor * cpy_v(ggml_context * ctx, ggml_tensor * v_cur, ggml_tensor * v_idxs, int32_t il) const override;

    // upstream's inputs of the cache are in no graph: they keep one shape and are not filled
    uint32_t get_n_kv() const override;
    void set_input_k_idxs (ggml_tensor * dst, const llama_ubatch * ubatch) const override;
    void set_input_v_idxs (ggml_tensor * dst, const llama_ubatch * ubatch) const override;
    void set_input_kq_mask(ggml_tensor * dst, const llama_ubatch * ubatch, bool causal_attn) const override;

private:
    cache & owner;
};

} // namespace refreekv
