#include "cache/cache.h"

#include "api/process.h"
#include "cache/composite.h"
#include "state/io-by-value.h"

#include "api/environment.h"
#include "api/error.h"
#include "cache/store.h"

#include "llama-batch.h"
#include "llama-context.h"
#include "llama-model.h"

#include <stdexcept>

namespace refreekv {

void cache::make_store() {
    hook_ran(HOOK_CREATE);

    store = std::make_shared<refreekv::store>(*this, *next_params(), next_is_forced() && get_environment().prunes);
}

llama_kv_cache * cache::part_of(llama_memory_t mem) {
    if (auto * kv = dynamic_cast<llama_kv_cache *>(mem)) {
        return kv;
    }
    if (auto * iswa = dynamic_cast<llama_kv_cache_iswa *>(mem)) {
        return iswa->get_base();
    }
    if (auto * hybrid = dynamic_cast<llama_memory_hybrid *>(mem)) {
        return hybrid->get_mem_attn();
    }
    return nullptr;
}

cache * cache::of(llama_memory_t mem) {
    return dynamic_cast<cache *>(part_of(mem));
}

llama_memory_context_ptr cache::init_full() {
    return std::make_unique<cache_context>(*this);
}

llama_memory_context_ptr cache::init_update(llama_context * lctx, bool /*optimize*/) {
    return std::make_unique<cache_context>(*this, lctx, std::move(sc_info));
}

llama_memory_context_ptr cache::init_context(slot_info_vec_t sinfos, std::vector<llama_ubatch> ubatches) {
    return std::make_unique<cache_context>(*this, std::move(sinfos), std::move(ubatches));
}

cache::slot_info_vec_t cache::prepare(const std::vector<llama_ubatch> & ubatches) {
    if (get_has_shift() || store->update.plan_turn(ubatches)) {
        return {}; // upstream then calls init_update(), which does it, and tries again
    }
    auto res = llama_kv_cache::prepare(ubatches);

    return res.empty() || store->reserve(res) ? res : slot_info_vec_t {};
}

bool cache::get_can_shift() const {
    return llama_kv_cache::get_can_shift() && store->seqs.can_shift();
}

// sequences

// They are called from C and from Python, which nothing can be thrown through. What throws is refused, and the error says why
template <typename F>
static bool allowed(refreekv::store & store, F && f) {
    bool res = false;
    if (guard([&]() { res = f(); return (int32_t) REFREEKV_OK; }) != REFREEKV_OK) {
        store.note_failure();
        return false;
    }
    return res;
}

void cache::clear(bool data) {
    const auto publish = store->publish_later();

    allowed(*store, [&]() { store->seqs.clear(); return true; });
    llama_kv_cache::clear(data);
}

bool cache::seq_rm(llama_seq_id seq_id, llama_pos p0, llama_pos p1) {
    const auto publish = store->publish_later();

    return allowed(*store, [&]() { return store->seqs.remove(seq_id, p0, p1); }) && llama_kv_cache::seq_rm(seq_id, p0, p1);
}

void cache::seq_cp(llama_seq_id seq_id_src, llama_seq_id seq_id_dst, llama_pos p0, llama_pos p1) {
    const auto publish = store->publish_later();

    if (allowed(*store, [&]() { return store->seqs.copy(seq_id_src, seq_id_dst, p0, p1); })) {
        llama_kv_cache::seq_cp(seq_id_src, seq_id_dst, p0, p1);
    }
}

void cache::seq_keep(llama_seq_id seq_id) {
    const auto publish = store->publish_later();

    if (allowed(*store, [&]() { store->seqs.keep(seq_id); return true; })) {
        llama_kv_cache::seq_keep(seq_id);
    }
}

void cache::seq_add(llama_seq_id seq_id, llama_pos p0, llama_pos p1, llama_pos shift) {
    const auto publish = store->publish_later();

    if (allowed(*store, [&]() { return store->seqs.shift("seq_add", seq_id, p0, p1, [shift](llama_pos pos) { return pos + shift; }); })) {
        llama_kv_cache::seq_add(seq_id, p0, p1, shift);
    }
}

void cache::seq_div(llama_seq_id seq_id, llama_pos p0, llama_pos p1, int d) {
    const auto publish = store->publish_later();

    if (allowed(*store, [&]() { return store->seqs.shift("seq_div", seq_id, p0, p1, [d](llama_pos pos) { return pos / d; }); })) {
        llama_kv_cache::seq_div(seq_id, p0, p1, d);
    }
}

std::map<ggml_backend_buffer_type_t, size_t> cache::memory_breakdown() const {
    return model.hparams.no_alloc ? llama_kv_cache::memory_breakdown() : store->memory_breakdown();
}

// states

void cache::state_write(llama_io_write_i & io, llama_seq_id seq_id, llama_state_seq_flags flags) const {
    if (get_has_shift()) {
        throw std::runtime_error("positions have changed (seq_add, seq_div): decode a batch before the state is saved");
    }
    write_by_value by_value(io);

    llama_kv_cache::state_write(flags & LLAMA_STATE_SEQ_FLAGS_ON_DEVICE ? by_value : io, seq_id, flags);
}

void cache::state_read(llama_io_read_i & io, llama_seq_id seq_id, llama_state_seq_flags flags) {
    const auto publish = store->publish_later();

    read_by_value by_value(io);

    llama_kv_cache::state_read(flags & LLAMA_STATE_SEQ_FLAGS_ON_DEVICE ? by_value : io, seq_id, flags);
}

void cache::state_write_data(llama_io_write_i & io, const cell_ranges_t & cr) const {
    store->state.write(io, cr.strm, cr.data);
}

bool cache::state_read_data(llama_io_read_i & io, uint32_t /*strm*/, uint32_t cell_count, const slot_info & sinfo) {
    return store->state.read(io, cell_count, sinfo);
}

void cache::state_clear(llama_seq_id seq_id, uint32_t /*strm*/, const slot_info & sinfo) {
    if (seq_id == -1) {
        clear(true);
        return;
    }
    seq_rm(seq_id, -1, -1);
    store->state.clear_rows(sinfo);
}

// as state_read_meta() of upstream
cache::slot_info cache::take_cells(llama_seq_id seq_id, uint32_t n) {
    llama_batch_allocr balloc(hparams.n_pos_per_embd());

    llama_ubatch ubatch = balloc.ubatch_reserve(n, 1);

    ubatch.seq_id_unq[0] = seq_id;
    for (uint32_t i = 0; i < n; ++i) {
        ubatch.pos[i]      = i;
        ubatch.n_seq_id[i] = 1;
        ubatch.seq_id[i]   = &seq_id;
    }
    const auto res = n <= get_size() ? find_slot(ubatch, false) : slot_info {};
    if (!res.empty()) {
        apply_ubatch(res, ubatch);
    }
    return res;
}

// contexts

cache_context::cache_context(cache & owner) : llama_kv_cache_context(&owner), owner(owner) {}

cache_context::cache_context(cache & owner, llama_context * lctx, stream_copy_info sc_info) :
    llama_kv_cache_context(&owner, lctx, false, std::move(sc_info)), owner(owner) {
    if (owner.get_store().update.begin(lctx) || owner.get_has_shift()) {
        status = LLAMA_MEMORY_STATUS_SUCCESS;
    }
}

cache_context::cache_context(cache & owner, slot_info_vec_t sinfos, std::vector<llama_ubatch> ubatches) :
    llama_kv_cache_context(&owner, std::move(sinfos), std::move(ubatches)), owner(owner) {}

const cache_context * cache_context::of(const llama_memory_context_i * mctx) {
    if (const auto * iswa = dynamic_cast<const llama_kv_cache_iswa_context *>(mctx)) {
        mctx = iswa->get_base();
    } else if (const auto * hybrid = dynamic_cast<const llama_memory_hybrid_context *>(mctx)) {
        mctx = hybrid->get_attn();
    }
    return dynamic_cast<const cache_context *>(mctx);
}

bool cache_context::apply() {
    if (ubatches.empty()) {
        return owner.turn_keys(lctx) && owner.get_store().update.run(lctx);
    }
    if (!llama_kv_cache_context::apply()) {
        return false;
    }
    owner.get_store().apply(sinfos[i_cur], ubatches[i_cur]);

    return true;
}

[[noreturn]] static void refuse_attention() {
    set_error("this model computes attention in a way of its own, which cannot have a KV policy");
    throw std::runtime_error(last_error());
}

ggml_tensor * cache_context::get_k(ggml_context *, int32_t) const                               { refuse_attention(); }
ggml_tensor * cache_context::get_v(ggml_context *, int32_t) const                               { refuse_attention(); }
ggml_tensor * cache_context::cpy_k(ggml_context *, ggml_tensor *, ggml_tensor *, int32_t) const { refuse_attention(); }
ggml_tensor * cache_context::cpy_v(ggml_context *, ggml_tensor *, ggml_tensor *, int32_t) const { refuse_attention(); }

uint32_t cache_context::get_n_kv() const {
    return owner.get_size();
}

void cache_context::set_input_k_idxs (ggml_tensor *, const llama_ubatch *) const       {}
void cache_context::set_input_v_idxs (ggml_tensor *, const llama_ubatch *) const       {}
void cache_context::set_input_kq_mask(ggml_tensor *, const llama_ubatch *, bool) const {}

// for memories that have the cache beside another part (cache/composite.h)

bool may_seq_rm(llama_memory_t mem, llama_seq_id seq_id, llama_pos p0, llama_pos p1) {
    auto & store = cache::of(mem)->get_store();

    return allowed(store, [&]() { return store.seqs.may_remove(seq_id, p0, p1); });
}

bool refused_shift(llama_memory_t mem) {
    return cache::of(mem)->get_store().seqs.refused_to_shift();
}

bool refused_seq_cp(llama_memory_t mem) {
    return cache::of(mem)->get_store().seqs.refused_to_copy();
}

} // namespace refreekv
