#include "refreekv-store.h"

#include "refreekv-attention.h"
#include "refreekv-error.h"

#include "llama-batch.h"
#include "llama-context.h"
#include "llama-impl.h"
#include "llama-model.h"

#include <algorithm>
#include <atomic>
#include <cinttypes>
#include <cmath>
#include <numeric>
#include <stdexcept>

// process-wide

static std::atomic<uint32_t> g_hooks_ran { 0 };

uint32_t refreekv_store::hooks_ran() {
    return g_hooks_ran;
}

void refreekv_store::hook_ran(hook h) {
    if (!(g_hooks_ran.load(std::memory_order_relaxed) & h)) {
        g_hooks_ran |= h;
    }
}

static thread_local refreekv_params g_next_params;
static thread_local bool            g_has_next = false;

const refreekv_params * refreekv_store::next_params() {
    return g_has_next ? &g_next_params : nullptr;
}

void refreekv_store::set_next_params(const refreekv_params * params) {
    g_has_next = params != nullptr;
    if (params) {
        g_next_params = *params;
    }
}

// construction

std::shared_ptr<refreekv_store> refreekv_store::create(llama_kv_cache & kv, bool offload) {
    hook_ran(HOOK_CREATE);

    const auto * params = next_params();

    return params ? std::make_shared<refreekv_store>(kv, *params, offload) : nullptr;
}

ggml_backend_buffer_ptr refreekv_store::no_storage(ggml_context * ctx, ggml_backend_buffer_type_t buft) {
    ggml_backend_buffer_t buf = ggml_backend_buft_alloc_buffer(buft, 0);

    // tells the scheduler where the tensors live, as upstream does for hparams.no_alloc
    for (ggml_tensor * t = ggml_get_first_tensor(ctx); t != nullptr; t = ggml_get_next_tensor(ctx, t)) {
        t->buffer = buf;
    }

    return ggml_backend_buffer_ptr { buf };
}

refreekv_store::refreekv_store(llama_kv_cache & kv, const refreekv_params & params, bool offload) :
    kv(kv), kv_size(kv.get_size()), n_cells(kv.get_size()*kv.n_stream), params(params), ring(params.n_window, kv.n_seq_max), pruned(kv.seq_to_stream.size(), -1) {
    const auto & hparams = kv.hparams;

    std::map<ggml_backend_buffer_type_t, std::vector<uint32_t>> by_buft;

    for (const auto & layer : kv.layers) {
        if (layer.k->ne[0] == 0) {
            continue; // a layer without attention
        }

        auto * buft = offload ? ggml_backend_dev_buffer_type(kv.model.dev_layer(layer.il)) : ggml_backend_cpu_buffer_type();

        by_buft[buft].push_back(groups.size());
        il_to_group[layer.il] = groups.size();

        const refreekv_rows::shape shape = { buft, layer.k->type, layer.v->type, layer.k->ne[0], layer.v->ne[0], kv.v_trans };

        groups.push_back({ (int32_t) layer.il, 0, {}, refreekv_rows(shape, layer.il) });
        groups.back().res.reset(n_cells);
    }

    for (const auto & [buft, ids] : by_buft) {
        if (!refreekv_policy_looks(params.policy)) {
            break;
        }

        ggml_init_params ip = { ids.size()*ggml_tensor_overhead(), nullptr, true };

        ggml_context_ptr ctx { ggml_init(ip) };

        for (uint32_t i : ids) {
            const int32_t il = groups[i].il;

            groups[i].ring = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F16, (int64_t) hparams.n_embd_head_k(il)*hparams.n_head(il), ring.n_rows());
            ggml_format_name(groups[i].ring, "refreekv_ring_l%d", il);
        }

        ggml_backend_buffer_ptr buf { kv.hparams.no_alloc ? no_storage(ctx.get(), buft).release() : ggml_backend_alloc_ctx_tensors_from_buft(ctx.get(), buft) };
        if (!buf) {
            throw std::runtime_error("refreekv: failed to allocate the query rings");
        }
        ggml_backend_buffer_clear(buf.get(), 0);

        ring_bufs.emplace_back(std::move(ctx), std::move(buf));
    }

    update_layouts();

    LLAMA_LOG_INFO("refreekv: the cache starts empty and grows with its contents; the sizes logged by llama_kv_cache are those of n_ctx\n");
}

refreekv_store * refreekv_store::of(llama_memory_t mem) {
    const auto * kv = dynamic_cast<llama_kv_cache *>(mem);

    return kv ? kv->store.get() : nullptr;
}

refreekv_store * refreekv_store::of(const llama_kv_cache_context * mctx) {
    return mctx->kv ? mctx->kv->store.get() : nullptr;
}

bool refreekv_store::is_reservation(const llama_kv_cache_context * mctx) {
    return mctx->ubatches.empty();
}

const refreekv_store::slot_info & refreekv_store::current(const llama_kv_cache_context * mctx) const {
    return mctx->sinfos[mctx->i_cur];
}

// upstream's padding of n_kv (llama_kv_cache::get_n_kv)
uint32_t refreekv_store::padded(uint32_t n) const {
    return GGML_PAD(n, std::max(kv.n_pad, 256u));
}

// sequences

bool refreekv_store::valid_seq(llama_seq_id seq_id) const {
    return seq_id >= 0 && (size_t) seq_id < pruned.size();
}

llama_pos refreekv_store::pruned_pos(llama_seq_id seq_id) const {
    return pruned[seq_id];
}

// not llama_synchronize: that ends upstream's timing of a batch, which has not begun
void refreekv_store::synchronize() const {
    if (lctx) {
        ggml_backend_sched_synchronize(lctx->get_sched());
    }
}

void refreekv_store::clear() {
    synchronize();
    for (auto & g : groups) {
        g.rows.clear();
        g.res.reset(n_cells);
    }
    std::fill(pruned.begin(), pruned.end(), -1);
    ring.forget(-1);

    stale_slots   = false;
    stale_layouts = true;
    restoring     = true;
    n_generation++;
}

bool refreekv_store::on_seq_rm(llama_seq_id seq_id, llama_pos p0, llama_pos p1) {
    p0 = std::max(p0, 0);

    const llama_seq_id s0 = seq_id < 0 ? 0 : seq_id;
    const llama_seq_id s1 = seq_id < 0 ? n_seq_ids() : seq_id + 1;

    bool removes = false;

    for (llama_seq_id s = s0; s < s1; ++s) {
        const llama_pos pos_max = table_of_seq(s).seq_pos_max(s);
        if (pos_max < p0) {
            continue;
        }

        const bool whole = p0 <= table_of_seq(s).seq_pos_min(s) && (p1 < 0 || p1 > pos_max);

        if (!whole && p0 <= pruned[s] && (p1 < 0 || p1 > p0)) {
            refreekv_set_error("seq_rm: positions %d.. of sequence %d cannot be removed: the cache was pruned at position %d; "
                    "only later positions or the whole sequence can", p0, s, pruned[s]);
            return false;
        }

        removes = true;
    }

    for (llama_seq_id s = s0; removes && s < s1; ++s) {
        const llama_pos pos_max = table_of_seq(s).seq_pos_max(s);
        if (pos_max >= p0 && p0 <= table_of_seq(s).seq_pos_min(s) && (p1 < 0 || p1 > pos_max)) {
            pruned[s] = -1;
            ring.forget(s);
            idle_rows = true;
        }
    }

    stale_slots |= removes;

    return true;
}

bool refreekv_store::on_seq_cp(llama_seq_id src, llama_seq_id dst, llama_pos p0, llama_pos p1) {
    if (src == dst) {
        return true;
    }

    const bool whole = p0 <= table_of_seq(src).seq_pos_min(src) && (p1 < 0 || p1 > table_of_seq(src).seq_pos_max(src));

    if (!whole && pruned[src] >= 0) {
        refreekv_set_error("seq_cp: a part of sequence %d cannot be copied: the cache was pruned at position %d; only the whole sequence can", src, pruned[src]);
        return false;
    }
    if (pruned[dst] >= 0 && table_of_seq(dst).seq_pos_max(dst) >= 0) {
        refreekv_set_error("seq_cp: sequence %d was pruned; remove it before copying into it", dst);
        return false;
    }

    if (kv.seq_to_stream[src] != kv.seq_to_stream[dst] && !copy_stream(src, dst)) {
        return false;
    }

    pruned[dst] = pruned[src];
    ring.forget(dst);

    stale_layouts = true;

    return true;
}

// Upstream is about to give the stream of dst the cells of src, at the same indices. Their rows are copied now: by the
// next batch, when upstream copies its own, the original may be gone or pruned.
bool refreekv_store::copy_stream(llama_seq_id src, llama_seq_id dst) {
    const uint32_t first_src = kv.seq_to_stream[src]*kv_size;
    const uint32_t first_dst = kv.seq_to_stream[dst]*kv_size;

    const auto in_dst = [&](uint32_t cell) { return cell/kv_size == first_dst/kv_size; };

    synchronize();
    release_stale();

    stale_layouts = true;

    for (auto & g : groups) {
        g.res.release(in_dst);
    }

    const auto fail = [&]() {
        for (auto & g : groups) {
            g.res.release(in_dst);
        }
        kv.seq_rm(dst, -1, -1);
        refreekv_set_error("seq_cp: no room for a copy of sequence %d; sequence %d is empty now", src, dst);
        return false;
    };

    for (auto & g : groups) {
        auto slots = used_slots(g);

        const size_t n_old = slots.size();

        std::vector<uint32_t> cells;
        for (uint32_t i = 0; i < kv_size; ++i) {
            const int32_t slot = g.res.slot(first_src + i);
            if (slot >= 0 && !g.res.hidden(slot)) {
                cells.push_back(first_dst + i);
                slots.push_back(slot);
            }
        }

        const uint32_t n_need = padded(slots.size());
        if (n_need > g.rows.capacity() && !within_limit(stats().bytes + (uint64_t) (n_need - g.rows.capacity())*g.rows.row_bytes())) {
            return fail();
        }
        if (!move(g, slots, n_need)) {
            return fail();
        }

        slots.resize(n_old);
        g.res.compact(slots);
        for (uint32_t cell : cells) {
            g.res.assign(cell); // no holes are left: the slots behind, in this order
        }
    }

    return true;
}

void refreekv_store::on_seq_keep(llama_seq_id seq_id) {
    for (llama_seq_id s = 0; s < n_seq_ids(); ++s) {
        // upstream keeps to the stream of the sequence
        if (s != seq_id && kv.seq_to_stream[s] == kv.seq_to_stream[seq_id]) {
            pruned[s] = -1;
            ring.forget(s);
        }
    }
    stale_slots   = true;
    stale_layouts = true;
    idle_rows     = true;
}

bool refreekv_store::on_seq_shift(const char * op, llama_seq_id seq_id) const {
    refreekv_set_error("%s: positions of sequence %d cannot change: a context with a KV policy does not shift (llama_memory_can_shift is false)", op, seq_id);

    return false;
}

// slots of cells that upstream has emptied
void refreekv_store::release_stale() {
    if (!stale_slots) {
        return;
    }
    for (auto & g : groups) {
        stale_layouts |= g.res.release([&](uint32_t cell) { return is_empty(cell); });
    }
    stale_slots = false;
}

// layouts

// Can one mask serve both groups, now and for every token to come? Slot by slot they hold the same cell, or two cells
// that no query can tell apart any more: settled, and of the same sequences.
bool refreekv_store::same_layout(const group & a, const group & b, const std::vector<uint8_t> & settled) const {
    if (a.res.n_slots() != b.res.n_slots() || a.rows.capacity() != b.rows.capacity()) {
        return false;
    }

    for (uint32_t s = 0; s < a.res.n_slots(); ++s) {
        const int32_t ca = a.res.cell(s);
        const int32_t cb = b.res.cell(s);

        if (a.res.hidden(s) != b.res.hidden(s)) {
            return false;
        }
        if (ca != cb && (ca < 0 || cb < 0 || !settled[ca] || !settled[cb] || table_of(ca).seq_get_all(index_of(ca)) != table_of(cb).seq_get_all(index_of(cb)))) {
            return false;
        }
    }

    return true;
}

void refreekv_store::update_layouts() {
    // a cell is settled once it lies behind the position at which its sequences were pruned: every query to come sees it
    // (with ALiBi the distance still matters)
    std::vector<uint8_t> settled(n_cells, !kv.hparams.use_alibi);

    for (llama_seq_id s = 0; s < n_seq_ids(); ++s) {
        const auto &   seq_pos = table_of_seq(s).seq_pos_get(s);
        const uint32_t first   = kv.seq_to_stream[s]*kv_size;
        for (auto it = seq_pos.rbegin(); it != seq_pos.rend() && it->first > pruned[s]; ++it) {
            settled[first + it->second] = 0;
        }
    }

    layouts.clear();

    for (uint32_t i = 0; i < groups.size(); ++i) {
        uint32_t l = 0;
        while (l < layouts.size() && !same_layout(groups[layouts[l]], groups[i], settled)) {
            ++l;
        }
        if (l == layouts.size()) {
            layouts.push_back(i);
        }
        groups[i].layout = l;
    }

    stale_layouts = false;
    n_generation++;
}

uint32_t refreekv_store::layout_n_kv(uint32_t layout) const {
    return padded(std::max(1u, groups[layouts[layout]].res.n_slots()));
}

// memory

ggml_backend_t refreekv_store::backend_of(const group & g) const {
    if (!lctx) {
        return nullptr;
    }

    auto * sched = lctx->get_sched();
    auto * buft  = g.rows.get_shape().buft;
    auto * dev   = ggml_backend_buft_get_device(buft); // nullptr for plain host memory

    for (int i = 0; i < ggml_backend_sched_get_n_backends(sched); ++i) {
        auto * backend = ggml_backend_sched_get_backend(sched, i);
        auto * owner   = ggml_backend_get_device(backend);

        if (owner == dev || (!dev && ggml_backend_dev_buffer_type(owner) == buft)) {
            return backend;
        }
    }

    return nullptr;
}

bool refreekv_store::move(group & g, const std::vector<uint32_t> & slots, uint32_t capacity) {
    n_generation++;

    return g.rows.move(slots, capacity, backend_of(g), params.graph_gather);
}

bool refreekv_store::reserve(const slot_info_vec_t & sinfos) {
    hook_ran(HOOK_RESERVE);

    release_stale();

    restoring = false;

    if (grow(sinfos)) {
        return true;
    }

    give_back();

    if (grow(sinfos)) {
        return true;
    }

    give_back(); // what the other groups have got for this batch

    return false;
}

bool refreekv_store::within_limit(uint64_t bytes) const {
    if (params.memory_limit == 0 || bytes <= params.memory_limit) {
        return true;
    }
    refreekv_set_error("the KV cache would grow to %" PRIu64 " bytes; the limit is %" PRIu64, bytes, params.memory_limit);

    return false;
}

// the room that removed sequences left behind
void refreekv_store::give_back() {
    synchronize();

    for (auto & g : groups) {
        const auto slots = used_slots(g);

        if (padded(slots.size()) < g.rows.capacity() && move(g, slots, padded(slots.size()))) {
            g.res.compact(slots);
            stale_layouts = true;
        }
    }
}

bool refreekv_store::grow(const slot_info_vec_t & sinfos) {
    struct plan {
        uint32_t n_need;  // room for the batch
        uint32_t n_tight; // without the holes that removed sequences left
        bool     shrink;
    };
    std::vector<plan> plans;

    uint64_t bytes = 0;

    for (const auto & g : groups) {
        uint32_t n_new = 0;
        for (const auto & sinfo : sinfos) {
            for_cells(sinfo, [&](uint32_t cell) { n_new += g.res.slot(cell) < 0; });
        }

        plan p;
        p.n_need  = padded(g.res.n_slots_after(n_new));
        p.n_tight = padded(g.res.n_used() + n_new);
        p.shrink  = g.rows.capacity() >= 2*p.n_tight || (idle_rows && g.rows.capacity() > p.n_tight);

        plans.push_back(p);
        bytes += (uint64_t) (p.shrink ? p.n_tight : std::max(p.n_need, g.rows.capacity()))*g.rows.row_bytes();
    }

    if (!within_limit(bytes)) {
        return false;
    }

    bool synced = false;

    for (size_t i = 0; i < groups.size(); ++i) {
        auto & g = groups[i];

        const auto & p = plans[i];

        if (p.n_need <= g.rows.capacity() && !p.shrink) {
            continue;
        }
        if (!synced) {
            synchronize();
            synced = true;
        }

        const auto slots = p.shrink ? used_slots(g) : all_slots(g);

        if (!move(g, slots, p.shrink ? p.n_tight : p.n_need)) {
            if (p.n_need <= g.rows.capacity()) {
                continue; // there is room, only not less
            }
            refreekv_set_error("layer %d: no memory to change the KV cache from %u to %u cells of %zu bytes; %zu MiB are held over all layers",
                    g.il, g.rows.capacity(), p.shrink ? p.n_tight : p.n_need, g.rows.row_bytes(), (size_t) stats().bytes >> 20);
            return false;
        }
        if (p.shrink) {
            g.res.compact(slots);
        }
        stale_layouts = true;
    }

    idle_rows = false;

    return true;
}

std::vector<uint32_t> refreekv_store::all_slots(const group & g) const {
    std::vector<uint32_t> res(g.res.n_slots());
    std::iota(res.begin(), res.end(), 0);
    return res;
}

std::vector<uint32_t> refreekv_store::used_slots(const group & g) const {
    std::vector<uint32_t> res;
    for (uint32_t s = 0; s < g.res.n_slots(); ++s) {
        if (g.res.cell(s) >= 0) {
            res.push_back(s);
        }
    }
    return res;
}

void refreekv_store::apply(const slot_info & sinfo, const llama_ubatch & ubatch) {
    hook_ran(HOOK_APPLY);

    release_stale();

    for (auto & g : groups) {
        for_cells(sinfo, [&](uint32_t cell) { g.res.assign(cell); });
        GGML_ASSERT(g.res.n_slots() <= g.rows.capacity());
    }

    // equal groups that take the same cells stay equal
    if (stale_layouts) {
        update_layouts();
    }

    ring.note(ubatch);
}

std::map<ggml_backend_buffer_type_t, size_t> refreekv_store::memory_breakdown() const {
    std::map<ggml_backend_buffer_type_t, size_t> res;

    for (const auto & g : groups) {
        res[g.rows.get_shape().buft] += g.rows.bytes();
    }
    for (const auto & [_, buf] : ring_bufs) {
        res[ggml_backend_buffer_get_type(buf.get())] += ggml_backend_buffer_get_size(buf.get());
    }

    return res;
}

// graphs: the counterparts of llama_kv_cache's get_k, get_v, cpy_k, cpy_v with the group's capacity in the place of kv_size

ggml_tensor * refreekv_store::get_k(ggml_context * ctx, int32_t il, bool reservation) const {
    const auto & g = groups[group_of(il)];

    const int64_t n_head_kv   = kv.hparams.n_head_kv(il);
    const int64_t n_embd_head = kv.hparams.n_embd_head_k(il);
    const int64_t n_kv        = reservation ? worst_n_kv() : layout_n_kv(g.layout);

    ggml_tensor * k = reservation ? kv.layers[kv.map_layer_ids.at(il)].k : g.rows.k;

    return ggml_view_4d(ctx, k, n_embd_head, n_head_kv, n_kv, 1,
            ggml_row_size(k->type, n_embd_head), k->nb[1], k->nb[1]*n_kv, 0);
}

ggml_tensor * refreekv_store::get_v(ggml_context * ctx, int32_t il, bool reservation) const {
    const auto & g = groups[group_of(il)];

    const int64_t n_head_kv   = kv.hparams.n_head_kv(il);
    const int64_t n_embd_head = kv.hparams.n_embd_head_v(il);
    const int64_t n_kv        = reservation ? worst_n_kv() : layout_n_kv(g.layout);

    ggml_tensor * v = reservation ? kv.layers[kv.map_layer_ids.at(il)].v : g.rows.v;

    if (!kv.v_trans) {
        return ggml_view_4d(ctx, v, n_embd_head, n_head_kv, n_kv, 1,
                ggml_row_size(v->type, n_embd_head), v->nb[1], v->nb[1]*n_kv, 0);
    }

    const size_t line = ggml_row_size(v->type, reservation ? worst_n_kv() : g.rows.capacity());

    return ggml_view_4d(ctx, v, n_kv, n_head_kv, n_embd_head, 1, line*n_embd_head, line, line*n_embd_head*n_head_kv, 0);
}

ggml_tensor * refreekv_store::cpy_k(ggml_context * ctx, ggml_tensor * k_cur, ggml_tensor * k_idxs, int32_t il) const {
    const auto & g = groups[group_of(il)];

    k_cur = ggml_view_2d(ctx, k_cur, k_cur->ne[0]*k_cur->ne[1], k_cur->ne[2], k_cur->nb[2], 0);

    return ggml_set_rows(ctx, g.rows.k, k_cur, k_idxs);
}

ggml_tensor * refreekv_store::cpy_v(ggml_context * ctx, ggml_tensor * v_cur, ggml_tensor * v_idxs, int32_t il) const {
    const auto & g = groups[group_of(il)];

    const int64_t n_embd   = v_cur->ne[0]*v_cur->ne[1];
    const int64_t n_tokens = v_cur->ne[2];

    if (!kv.v_trans) {
        return ggml_set_rows(ctx, g.rows.v, ggml_view_2d(ctx, v_cur, n_embd, n_tokens, v_cur->nb[2], 0), v_idxs);
    }

    v_cur = ggml_row_size(v_cur->type, n_embd) == v_cur->nb[2] ? ggml_reshape_2d(ctx, v_cur, n_embd, n_tokens)
                                                               : ggml_cont_2d   (ctx, v_cur, n_embd, n_tokens);

    // [TAG_V_CACHE_VARIABLE]
    const int64_t n_embd_row = g.rows.get_shape().n_embd_v;
    if (n_embd < n_embd_row) {
        v_cur = ggml_pad(ctx, v_cur, n_embd_row - n_embd, 0, 0, 0);
    }

    // each element is a row of its own
    return ggml_set_rows(ctx,
            ggml_reshape_2d(ctx, g.rows.v, 1, ggml_nelements(g.rows.v)),
            ggml_reshape_2d(ctx, v_cur,    1, ggml_nelements(v_cur)), v_idxs);
}

int64_t refreekv_store::n_v_idxs(uint32_t n_tokens) const {
    return kv.v_trans ? (int64_t) n_tokens*groups[0].rows.get_shape().n_embd_v : n_tokens;
}

void refreekv_store::set_input_k_idxs(ggml_tensor * dst, uint32_t layout, const llama_kv_cache_context * mctx) const {
    const auto & res = groups[layouts[layout]].res;

    int64_t * data = (int64_t *) dst->data;
    for_cells(current(mctx), [&](uint32_t cell) { *data++ = res.slot(cell); });
}

void refreekv_store::set_input_v_idxs(ggml_tensor * dst, uint32_t layout, const llama_kv_cache_context * mctx) const {
    const auto & g = groups[layouts[layout]];

    const int64_t n_row    = kv.v_trans ? g.rows.get_shape().n_embd_v : 1;
    const int64_t capacity = g.rows.capacity();

    int64_t * data = (int64_t *) dst->data;
    for_cells(current(mctx), [&](uint32_t cell) {
        const int64_t slot = g.res.slot(cell);
        for (int64_t j = 0; j < n_row; ++j) {
            *data++ = j*capacity + slot;
        }
    });
}

// upstream's rules (set_input_kq_mask_impl in llama-kv-cache.cpp), slot by slot instead of cell by cell
template <typename T>
void refreekv_store::fill_mask(T * data, int64_t n_kv, const group & g, const llama_ubatch & ubatch, bool causal) const {
    const T keep = llama_cast<T>(0.0f);
    const T drop = llama_cast<T>(-INFINITY);

    const bool alibi = kv.hparams.use_alibi;

    std::map<llama_seq_id, llama_pos> pos_min;
    for (uint32_t i = 0; i < ubatch.n_tokens; ++i) {
        const auto it = pos_min.emplace(ubatch.seq_id[i][0], ubatch.pos[i]).first;
        it->second = std::min(it->second, ubatch.pos[i]);
    }

    // rows of one sequence differ only where the batch's own positions are: there causality decides
    struct base_row {
        uint32_t i;
        std::vector<std::pair<uint32_t, llama_pos>> open; // slot, position
    };
    std::map<llama_seq_id, base_row> bases;

    for (uint32_t i = 0; i < ubatch.n_tokens; ++i) {
        const llama_seq_id seq_id = ubatch.seq_id[i][0];
        const llama_pos    pos    = ubatch.pos[i];

        T * row = data + i*n_kv;

        auto it = bases.find(seq_id);
        if (it == bases.end()) {
            it = bases.emplace(seq_id, base_row { i, {} }).first;

            std::fill(row, row + n_kv, drop);

            const auto &   table = table_of_seq(seq_id);
            const uint32_t first = kv.seq_to_stream[seq_id]*kv_size;

            for (uint32_t s = 0; s < g.res.n_slots(); ++s) {
                const int64_t index = (int64_t) g.res.cell(s) - first;
                if (index < 0 || index >= kv_size || g.res.hidden(s) || !table.seq_has(index, seq_id)) {
                    continue;
                }
                const llama_pos p = table.pos_get(index);
                if (p >= pos_min[seq_id] || alibi) {
                    it->second.open.emplace_back(s, p);
                } else {
                    row[s] = keep;
                }
            }
        } else {
            std::copy_n(data + it->second.i*n_kv, n_kv, row);
        }

        for (const auto & [s, p] : it->second.open) {
            row[s] = causal && p > pos ? drop : alibi ? llama_cast<T>((float) -std::abs(p - pos)) : keep;
        }
    }
}

void refreekv_store::set_input_mask(ggml_tensor * dst, uint32_t layout, const llama_ubatch & ubatch, bool causal) const {
    GGML_ASSERT(ggml_backend_buffer_is_host(dst->buffer));

    const auto & g = groups[layouts[layout]];

    if (dst->type == GGML_TYPE_F16) {
        fill_mask((ggml_fp16_t *) dst->data, dst->ne[0], g, ubatch, causal);
    } else {
        fill_mask((float       *) dst->data, dst->ne[0], g, ubatch, causal);
    }
}

void refreekv_store::note_attention(int32_t il, float kq_scale, ggml_tensor * sinks, bool known) {
    auto & g = groups[group_of(il)];

    g.kq_scale = kq_scale;
    g.sinks    = sinks;
    g.known    = known;
}

// eviction

bool refreekv_store::begin_update(llama_context * lctx) {
    this->lctx = lctx;

    return !jobs.empty();
}

bool refreekv_store::update(llama_context * lctx) {
    hook_ran(HOOK_UPDATE);

    this->lctx = lctx;

    for (const auto & j : jobs) {
        job_result = run_job(j);
    }
    jobs.clear();

    return true;
}

int64_t refreekv_store::prune(llama_context * lctx, llama_seq_id seq_id) {
    if (!refreekv_policy_find(params.policy)) {
        return 0;
    }

    job_result = REFREEKV_ERR_STATE;
    jobs.push_back({ seq_id, -1, {} });
    lctx->memory_update(false);

    return job_result;
}

int64_t refreekv_store::keep(llama_context * lctx, llama_seq_id seq_id, int32_t il, const std::vector<llama_pos> & pos) {
    if (il_to_group.find(il) == il_to_group.end()) {
        refreekv_set_error("keep: layer %d has no KV cache", il);
        return REFREEKV_ERR_ARGUMENT;
    }

    job_result = REFREEKV_ERR_STATE;
    jobs.push_back({ seq_id, il, pos });
    lctx->memory_update(false);

    return job_result;
}

int64_t refreekv_store::run_job(const job & j) {
    const int64_t t_start = ggml_time_us();
    const size_t  before  = stats().bytes;

    synchronize();
    release_stale();

    int64_t       n_evicted = 0;
    const int32_t status    = run(j, n_evicted);

    // after an error, what was evicted before it is gone
    if (n_evicted > 0) {
        pruned[j.seq_id] = table_of_seq(j.seq_id).seq_pos_max(j.seq_id);
        stale_layouts    = true;
        n_prunes++;
        prune_us += ggml_time_us() - t_start;
    }
    if (stale_layouts) {
        update_layouts();
    }

    refreekv_pages_trim();

    const size_t after = stats().bytes;
    bytes_freed += before > after ? before - after : 0;

    return status == REFREEKV_OK ? n_evicted : status;
}

int32_t refreekv_store::run(const job & j, int64_t & n_evicted) {
    for (uint32_t i = 0; i < groups.size(); ++i) {
        auto & g = groups[i];

        const bool by_hand = j.il >= 0;

        if (by_hand ? g.il != j.il : i < (uint32_t) params.n_full_layers) {
            continue;
        }

        const auto list = held_cells(j.seq_id, g);
        if (list.empty()) {
            continue;
        }

        std::vector<uint8_t> keep(list.size(), 1);

        if (by_hand) {
            for (size_t c = 0; c < list.size(); ++c) {
                keep[c] = std::binary_search(j.pos.begin(), j.pos.end(), list[c].pos) || shared(list[c].cell);
            }
        } else if ((int32_t) list.size() < params.n_min) {
            continue;
        } else if (const int32_t status = select(g, j.seq_id, list, keep)) {
            return status;
        }

        const int64_t n_out = std::count(keep.begin(), keep.end(), 0);

        if (n_out > 0) {
            if (!evict(g, list, keep)) {
                refreekv_set_error("layer %d: no memory to move the kept cells", g.il);
                return REFREEKV_ERR_MEMORY;
            }
            n_evicted += n_out;
        }
    }

    return REFREEKV_OK;
}

// the cells of a sequence that a group holds and queries can see, in position order
std::vector<refreekv_store::held> refreekv_store::held_cells(llama_seq_id seq_id, const group & g) const {
    std::vector<held> res;

    for (const auto & [pos, index] : table_of_seq(seq_id).seq_pos_get(seq_id)) {
        const uint32_t cell = kv.seq_to_stream[seq_id]*kv_size + index;
        const int32_t  slot = g.res.slot(cell);
        if (slot >= 0 && !g.res.hidden(slot)) {
            res.push_back({ pos, cell, (uint32_t) slot });
        }
    }

    return res;
}

static void refreekv_keep_selected(const refreekv_selection & sel, std::vector<uint8_t> & keep) {
    std::fill(keep.begin(), keep.end(), 0);
    for (uint32_t r = 0; r < sel.n_keep; ++r) {
        keep[sel.order[r]] = 1;
    }
}

int32_t refreekv_store::select(const group & g, llama_seq_id seq_id, const std::vector<held> & list, std::vector<uint8_t> & keep) {
    const auto & hparams = kv.hparams;

    refreekv_selection sel;

    std::vector<uint8_t> pinned; // another sequence needs it too
    for (const auto & c : list) {
        pinned.push_back(shared(c.cell));
    }

    if (!refreekv_policy_looks(params.policy)) {
        refreekv_attention_host nothing(nullptr, 0, 0, list.size());

        refreekv_policy_find(params.policy)(params, nothing, pinned, sel);
        refreekv_keep_selected(sel, keep);

        return REFREEKV_OK;
    }

    refreekv_attention_graph::inputs in = {};

    in.backend = backend_of(g);
    if (!in.backend) {
        refreekv_set_error("layer %d: no backend of this context holds its cache", g.il);
        return REFREEKV_ERR_COMPUTE;
    }
    if (!g.known) {
        refreekv_set_error("layer %d: attention with a bias or queries of its own kind cannot be judged; kv_policy \"full\" and \"streaming\" can be used", g.il);
        return REFREEKV_ERR_STATE;
    }

    const bool one_row = params.rows == REFREEKV_ROWS_LAST && params.ranking == REFREEKV_RANKING_POSITION;

    std::vector<llama_pos> row_pos;
    ring.rows(seq_id, list.back().pos, one_row ? 1 : params.n_window, in.rows, row_pos);

    if (row_pos.empty() || row_pos.back() != list.back().pos) {
        refreekv_set_error("the last query of sequence %d is not there any more: decode a token before pruning", seq_id);
        return REFREEKV_ERR_STATE;
    }

    in.k           = g.rows.k;
    in.ring        = g.ring;
    in.n_embd_head = hparams.n_embd_head_k(g.il);
    in.n_head      = hparams.n_head(g.il);
    in.n_head_kv   = hparams.n_head_kv(g.il);
    in.n_kv        = g.res.n_slots();
    in.max_bias    = hparams.f_max_alibi_bias;
    in.soft_cap    = hparams.attn_soft_cap ? hparams.f_attn_logit_softcapping : 0.0f;
    in.pre_scale   = hparams.attn_soft_cap ? 1.0f/hparams.f_attn_logit_softcapping : 1.0f;
    in.post_scale  = g.kq_scale;

    if (g.sinks) {
        in.sinks.resize(in.n_head);
        ggml_backend_tensor_get(g.sinks, in.sinks.data(), 0, ggml_nbytes(g.sinks));
    }

    in.mask.assign(in.n_kv*in.rows.size(), -INFINITY);
    for (const auto & c : list) {
        in.slots.push_back(c.slot);

        for (size_t r = 0; r < in.rows.size(); ++r) {
            if (c.pos <= row_pos[r]) {
                in.mask[r*in.n_kv + c.slot] = hparams.use_alibi ? -std::abs(c.pos - row_pos[r]) : 0.0f;
            }
        }
    }

    refreekv_attention_graph attn(std::move(in));

    if (!refreekv_policy_find(params.policy)(params, attn, pinned, sel)) {
        refreekv_set_error("layer %d: backend %s could not compute the attention rows", g.il, ggml_backend_name(backend_of(g)));
        return REFREEKV_ERR_COMPUTE;
    }

    refreekv_keep_selected(sel, keep);

    return REFREEKV_OK;
}

bool refreekv_store::evict(group & g, const std::vector<held> & list, const std::vector<uint8_t> & keep) {
    std::vector<uint8_t> out(g.res.n_slots(), 0);
    for (size_t c = 0; c < list.size(); ++c) {
        out[list[c].slot] = !keep[c];
    }

    if (params.mask_only) {
        for (uint32_t s = 0; s < out.size(); ++s) {
            if (out[s]) {
                g.res.hide(s);
            }
        }
        return true;
    }

    std::vector<uint32_t> slots;
    for (uint32_t s = 0; s < out.size(); ++s) {
        if (!out[s] && g.res.cell(s) >= 0) {
            slots.push_back(s);
        }
    }

    if (!move(g, slots, padded(slots.size()))) {
        return false;
    }
    g.res.compact(slots);

    return true;
}

// reports

refreekv_stats refreekv_store::full_stats(llama_memory_t mem) {
    refreekv_stats res = {};

    for (const auto & [_, size] : mem->memory_breakdown()) {
        res.bytes += size;
    }

    if (const auto * kv = dynamic_cast<llama_kv_cache *>(mem)) {
        res.n_group  = kv->layers.size();
        res.n_layout = 1;

        for (const auto & cells : kv->v_cells) {
            res.n_tokens += cells.get_used();
        }
        for (uint32_t i = 0; i < kv->layers.size(); ++i) {
            res.bytes_full += (uint64_t) res.n_tokens*full_group(mem, i).row_bytes;
        }
    }

    return res;
}

refreekv_group_info refreekv_store::full_group(llama_memory_t mem, uint32_t i_group) {
    const auto * kv    = dynamic_cast<llama_kv_cache *>(mem);
    const auto & layer = kv->layers[i_group];

    refreekv_group_info res = {};

    res.il          = layer.il;
    res.n_head      = kv->hparams.n_head(layer.il);
    res.n_head_kv   = kv->hparams.n_head_kv(layer.il);
    res.n_embd_head = kv->hparams.n_embd_head_k(layer.il);
    res.n_capacity  = kv->get_size()*kv->n_stream;
    res.row_bytes   = layer.k->nb[1] + (layer.v ? layer.v->nb[1] : 0);

    for (const auto & cells : kv->v_cells) {
        res.n_kept += cells.get_used();
    }

    return res;
}

refreekv_stats refreekv_store::stats() const {
    refreekv_stats res = {};

    res.n_group     = groups.size();
    res.n_layout    = layouts.size();
    res.n_prunes    = n_prunes;
    res.prune_us    = prune_us;
    res.bytes_freed = bytes_freed;

    for (const auto & table : kv.v_cells) {
        res.n_tokens += table.get_used();
    }
    for (const auto & g : groups) {
        res.bytes      += g.rows.bytes();
        res.bytes_full += (uint64_t) res.n_tokens*g.rows.row_bytes();
    }
    for (const auto & [_, buf] : ring_bufs) {
        res.bytes_ring += ggml_backend_buffer_get_size(buf.get());
    }

    return res;
}

refreekv_group_info refreekv_store::group_info(uint32_t i_group) const {
    const auto & g = groups[i_group];

    uint32_t n_kept = 0;
    for (uint32_t s = 0; s < g.res.n_slots(); ++s) {
        n_kept += g.res.cell(s) >= 0 && !g.res.hidden(s) && !is_empty(g.res.cell(s));
    }

    refreekv_group_info res = {};

    res.il          = g.il;
    res.n_head      = kv.hparams.n_head(g.il);
    res.n_head_kv   = kv.hparams.n_head_kv(g.il);
    res.n_embd_head = kv.hparams.n_embd_head_k(g.il);
    res.n_kept      = n_kept;
    res.n_capacity  = g.rows.capacity();
    res.layout      = g.layout;
    res.row_bytes   = g.rows.row_bytes();
    res.kq_scale    = g.kq_scale;

    return res;
}

std::vector<llama_pos> refreekv_store::kept(llama_seq_id seq_id, uint32_t i_group) const {
    std::vector<llama_pos> res;
    for (const auto & c : held_cells(seq_id, groups[i_group])) {
        res.push_back(c.pos);
    }
    return res;
}

static void refreekv_read_row(const ggml_tensor * t, int64_t row, float * out) {
    std::vector<uint8_t> bytes(ggml_row_size(t->type, t->ne[0]));

    ggml_backend_tensor_get(t, bytes.data(), row*t->nb[1], bytes.size());

    if (t->type == GGML_TYPE_F32) {
        memcpy(out, bytes.data(), bytes.size());
    } else {
        ggml_get_type_traits(t->type)->to_float(bytes.data(), out, t->ne[0]);
    }
}

int32_t refreekv_store::read_queries(llama_seq_id seq_id, uint32_t i_group, float * out, llama_pos * pos, int32_t n_max) const {
    std::vector<int32_t>   rows;
    std::vector<llama_pos> row_pos;

    ring.rows(seq_id, table_of_seq(seq_id).seq_pos_max(seq_id), params.n_window, rows, row_pos);

    const auto * t = groups[i_group].ring;
    if (!t) {
        return 0;
    }
    for (int32_t i = 0; i < std::min<int32_t>(n_max, rows.size()); ++i) {
        refreekv_read_row(t, rows[i], out + i*t->ne[0]);
        pos[i] = row_pos[i];
    }

    return rows.size();
}

int32_t refreekv_store::read_keys(llama_seq_id seq_id, uint32_t i_group, float * out, llama_pos * pos, int32_t n_max) const {
    const auto & g    = groups[i_group];
    const auto   list = held_cells(seq_id, g);

    for (int32_t i = 0; i < std::min<int32_t>(n_max, list.size()); ++i) {
        refreekv_read_row(g.rows.k, list[i].slot, out + i*g.rows.k->ne[0]);
        pos[i] = list[i].pos;
    }

    return list.size();
}
