#include "cache/store.h"

#include "tiers/cold-store.h"
#include "api/error.h"

#include "policies/policy.h"

#include "llama-batch.h"
#include "llama-context.h"
#include "llama-impl.h"
#include "llama-model.h"

#include <algorithm>
#include <atomic>
#include <limits>
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

// construction

// marks the backend that the tensors are on, as upstream does for hparams.no_alloc
static ggml_backend_buffer_ptr refreekv_no_storage(ggml_context * ctx, ggml_backend_buffer_type_t buft) {
    ggml_backend_buffer_t buf = ggml_backend_buft_alloc_buffer(buft, 0);

    for (ggml_tensor * t = ggml_get_first_tensor(ctx); t != nullptr; t = ggml_get_next_tensor(ctx, t)) {
        t->buffer = buf;
    }

    return ggml_backend_buffer_ptr { buf };
}

refreekv_store::refreekv_store(refreekv::cache & kv, const refreekv_params & params, bool prunes_read) :
    kv(kv), kv_size(kv.get_size()), n_cells(kv.get_size()*kv.n_stream), params(params), prunes_read(prunes_read), ring(params.n_window + 1, kv.n_seq_max), pruned(kv.seq_to_stream.size(), -1), spans(kv.seq_to_stream.size()) {
    const auto & hparams = kv.hparams;

    std::map<ggml_backend_buffer_type_t, std::vector<uint32_t>> by_buft;

    for (const auto & layer : kv.layers) {
        if (layer.k->ne[0] == 0) {
            continue; // a layer without attention
        }

        auto * buft = ggml_backend_buffer_get_type(layer.k->buffer);

        by_buft[buft].push_back(layers.size());
        il_to_layer[layer.il] = layers.size();

        if (!layer.v) {
            throw std::runtime_error("refreekv: a cache of keys without values cannot have a KV policy");
        }
        layers.push_back({ (int32_t) layer.il, { buft, layer.k->type, layer.v->type, layer.k->ne[0], layer.v->ne[0], kv.v_trans, padded(n_cells) }, {} });
    }

    fault_mass = check_faults();
    make_cold();
    make_groups({});

    for (const auto & [buft, ids] : by_buft) {
        if (!refreekv_policy_looks(params.policy)) {
            break;
        }

        ggml_init_params ip = { ids.size()*ggml_tensor_overhead(), nullptr, true };

        ggml_context_ptr ctx { ggml_init(ip) };

        for (uint32_t i : ids) {
            const int32_t il = layers[i].il;

            layers[i].ring = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F16, (int64_t) hparams.n_embd_head_k(il)*hparams.n_head(il), ring.n_rows());
            ggml_format_name(layers[i].ring, "refreekv_ring_l%d", il);
        }

        ggml_backend_buffer_ptr buf { kv.model.hparams.no_alloc ? refreekv_no_storage(ctx.get(), buft).release() : ggml_backend_alloc_ctx_tensors_from_buft(ctx.get(), buft) };
        if (!buf) {
            throw std::runtime_error("refreekv: failed to allocate the query rings");
        }
        ggml_backend_buffer_clear(buf.get(), 0);

        ring_bufs.emplace_back(std::move(ctx), std::move(buf));
    }

    update_layouts();
    publish();

    LLAMA_LOG_INFO("refreekv: the cache starts empty and grows with its contents; the sizes logged by llama_kv_cache are those of n_ctx\n");
}

refreekv_store * refreekv_store::of(llama_memory_t mem) {
    auto * cache = refreekv::cache::of(mem);

    return cache ? &cache->get_store() : nullptr;
}

// the heads of a layer that policies may evict from, and those that are kept whole; either may be missing
std::vector<refreekv_store::part> refreekv_store::divide(const layer & layer, const heads_list & whole) const {
    std::vector<part> res { { {}, false }, { {}, true } };
    for (uint32_t h = 0; h < kv.hparams.n_head_kv(layer.il); ++h) {
        res[std::find(whole.begin(), whole.end(), std::make_pair(layer.il, h)) != whole.end()].heads.push_back(h);
    }

    // where heads cannot be separated (the slope of ALiBi depends on their number; they may be no whole number of blocks
    // of the cache's type), the layer stays whole
    const bool separable = !kv.hparams.use_alibi &&
                           kv.hparams.n_embd_head_k(layer.il) % ggml_blck_size(layer.shape.type_k) == 0 &&
                           kv.hparams.n_embd_head_v(layer.il) % ggml_blck_size(layer.shape.type_v) == 0;
    if (!separable && !res[1].heads.empty()) {
        res[0].heads.clear();
        res[1].heads.resize(kv.hparams.n_head_kv(layer.il));
        std::iota(res[1].heads.begin(), res[1].heads.end(), 0);
    }

    res.erase(std::remove_if(res.begin(), res.end(), [](const part & p) { return p.heads.empty(); }), res.end());

    return res;
}

refreekv_rows::shape refreekv_store::shape_of(const layer & layer, const std::vector<uint32_t> & heads) const {
    refreekv_rows::shape res = layer.shape;
    if (heads.size() < kv.hparams.n_head_kv(layer.il)) {
        res.n_embd_k = heads.size()*kv.hparams.n_embd_head_k(layer.il);
        res.n_embd_v = heads.size()*kv.hparams.n_embd_head_v(layer.il);
    }
    return res;
}

// drops what the groups hold
void refreekv_store::make_groups(const heads_list & whole) {
    groups.clear();
    worst.clear();

    for (auto & layer : layers) {
        layer.groups.clear();

        for (auto & p : divide(layer, whole)) {
            const auto shape = shape_of(layer, p.heads);

            layer.groups.push_back(groups.size());
            groups.push_back({ layer.il, std::move(p.heads), p.whole, 0, {}, refreekv_rows(shape, layer.il), 0, {}, nullptr });
            groups.back().res.reset(n_cells);
            make_faults(groups.size() - 1);
        }
    }
    place_cold();

    stale_layouts = true;
    regrouped     = true;
    n_generation++;
}

uint32_t refreekv_store::n_heads_kv() const {
    uint32_t res = 0;
    for (const auto & layer : layers) {
        res += kv.hparams.n_head_kv(layer.il);
    }
    return res;
}

bool refreekv_store::holds_nothing() const {
    return std::all_of(groups.begin(), groups.end(), [](const group & g) { return g.res.n_used() == 0; });
}

bool refreekv_store::valid_heads(const heads_list & heads) const {
    for (const auto & [il, h] : heads) {
        if (il_to_layer.find(il) == il_to_layer.end() || h >= kv.hparams.n_head_kv(il)) {
            refreekv_set_error("whole heads: layer %d has no KV head %u", il, h);
            return false;
        }
    }
    return true;
}

refreekv_store::heads_list refreekv_store::whole_heads() const {
    heads_list res;
    for (const auto & g : groups) {
        for (uint32_t h : g.heads) {
            if (g.whole) {
                res.emplace_back(g.il, h);
            }
        }
    }
    return res;
}

int64_t refreekv_store::set_whole_heads(llama_context * lctx, const heads_list & heads) {
    if (!valid_heads(heads)) {
        return REFREEKV_ERR_ARGUMENT;
    }
    return run_job(lctx, [this, heads]() -> int64_t {
        if (!holds_nothing()) {
            refreekv_set_error("whole heads: only an empty cache can be divided; clear it first");
            return REFREEKV_ERR_STATE;
        }
        make_groups(heads);
        update_layouts();

        return REFREEKV_OK;
    });
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

// a sequence that has no cells any more
void refreekv_store::forget_seq(llama_seq_id seq_id) {
    pruned[seq_id] = -1;
    spans[seq_id].clear();
    ring.forget(seq_id);
}

void refreekv_store::clear() {
    synchronize();
    for (auto & g : groups) {
        g.rows.clear();
        g.res.reset(n_cells);
        if (g.evicted) {
            g.evicted->sketch.reset(n_embd(g, false));
        }
    }
    place_cold();
    for (llama_seq_id s = 0; s < n_seq_ids(); ++s) {
        forget_seq(s);
    }

    n_expected    = 0;
    stale_slots   = false;
    stale_layouts = true;
    restoring     = true;
    n_generation++;
}

// f(sequence, whether all of it) for the sequences that positions p0.. are about to be removed from; stops at false
template <typename F>
bool refreekv_store::for_removed(llama_seq_id seq_id, llama_pos p0, llama_pos p1, F && f) const {
    if (seq_id >= n_seq_ids()) {
        return true; // upstream's to refuse
    }
    p0 = std::max(p0, 0);

    const llama_seq_id s0 = seq_id < 0 ? 0 : seq_id;
    const llama_seq_id s1 = seq_id < 0 ? n_seq_ids() : seq_id + 1;

    for (llama_seq_id s = s0; s < s1; ++s) {
        const llama_pos pos_max = table_of_seq(s).seq_pos_max(s);

        if (pos_max >= p0 && (p1 < 0 || p1 > p0) && !f(s, p0 <= table_of_seq(s).seq_pos_min(s) && (p1 < 0 || p1 > pos_max))) {
            return false;
        }
    }

    return true;
}

bool refreekv_store::may_seq_rm(llama_seq_id seq_id, llama_pos p0, llama_pos p1) {
    // all of it: the other part of the memory may still refuse
    return for_removed(seq_id, p0, p1, [&](llama_seq_id s, bool whole) {
        return whole || std::max(p0, 0) > pruned[s] || can_remove(s, p0, -1, -1);
    });
}

// part of a pruned sequence, from p0 on. gone0, gone1: what need not come back of it, because it goes
bool refreekv_store::can_remove(llama_seq_id seq_id, llama_pos p0, llama_pos gone0, llama_pos gone1) {
    const llama_pos pos = pruned[seq_id];

    if (restore_now(seq_id, gone0, gone1) >= 0) {
        return true;
    }
    const std::string why = refreekv_last_error();
    refreekv_set_error("seq_rm: positions %d.. of sequence %d cannot be removed: the cache was pruned at position %d; "
            "only later positions or the whole sequence can (%s)", p0, seq_id, pos, why.c_str());

    return false;
}

bool refreekv_store::on_seq_rm(llama_seq_id seq_id, llama_pos p0, llama_pos p1) {
    p0 = std::max(p0, 0);

    const bool allowed = for_removed(seq_id, p0, p1, [&](llama_seq_id s, bool whole) {
        if (seq_id < 0) {
            return whole || p0 > pruned[s] || can_remove(s, p0, -1, -1); // another sequence may still refuse
        }
        return whole || p0 > pruned[s] || can_remove(s, p0, p0, p1 < 0 ? std::numeric_limits<llama_pos>::max() : p1);
    });
    if (!allowed) {
        return false;
    }

    for_removed(seq_id, p0, p1, [&](llama_seq_id s, bool whole) {
        if (whole) {
            forget_seq(s);
            idle_rows = true;
        } else if (p1 < 0) {
            for (auto & [start, end] : spans[s]) {
                end = std::min(end, std::max(start, p0)); // what comes there next is something else
            }
        }
        stale_slots = true;
        return true;
    });

    return true;
}

bool refreekv_store::may_seq_cp(llama_seq_id src, llama_seq_id dst, llama_pos p0, llama_pos p1) {
    const bool whole = p0 <= table_of_seq(src).seq_pos_min(src) && (p1 < 0 || p1 > table_of_seq(src).seq_pos_max(src));

    if (pruned[dst] >= 0 && table_of_seq(dst).seq_pos_max(dst) >= 0) {
        refreekv_set_error("seq_cp: sequence %d was pruned; remove it before copying into it", dst);
        return false;
    }
    if (kv.seq_to_stream[src] != kv.seq_to_stream[dst] && (p0 > 0 || p1 >= 0)) { // upstream would abort
        refreekv_set_error("seq_cp: between streams only whole sequences can be copied (p0 = -1, p1 = -1)");
        return false;
    }
    if (!whole && pruned[src] >= 0 && restore_now(src) < 0) {
        const std::string why = refreekv_last_error();
        refreekv_set_error("seq_cp: a part of sequence %d cannot be copied: the cache was pruned at position %d; only the whole sequence can (%s)", src, pruned[src], why.c_str());
        return false;
    }

    return true;
}

bool refreekv_store::on_seq_cp(llama_seq_id src, llama_seq_id dst, llama_pos p0, llama_pos p1) {
    refused_copy = false;

    if (src == dst || !valid_seq(src) || !valid_seq(dst)) {
        return true; // nothing to do, or upstream's to refuse
    }

    const bool streams = kv.seq_to_stream[src] != kv.seq_to_stream[dst];

    if (!may_seq_cp(src, dst, p0, p1) || (streams && !copy_stream(src, dst))) {
        refused_copy = true;
        return false;
    }

    pruned[dst] = pruned[src];
    if (streams) {
        spans[dst].clear(); // nothing of it is left
    }
    spans[dst].insert(spans[dst].end(), spans[src].begin(), spans[src].end());
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

    std::vector<uint32_t> cells_dst(kv_size);
    std::iota(cells_dst.begin(), cells_dst.end(), first_dst);

    for (auto & g : groups) {
        g.res.release(in_dst);
        forget_cold(g, cells_dst);
    }
    refresh_sketches();

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
        if (n_need > g.rows.capacity() && !within_limit(stats().bytes + g.rows.bytes_for(n_need) - g.rows.bytes())) {
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
    copy_cold(first_src, first_dst);

    return true;
}

void refreekv_store::on_seq_keep(llama_seq_id seq_id) {
    if (!valid_seq(seq_id)) {
        return; // upstream's to refuse
    }
    for (llama_seq_id s = 0; s < n_seq_ids(); ++s) {
        // upstream keeps to the stream of the sequence
        if (s != seq_id && kv.seq_to_stream[s] == kv.seq_to_stream[seq_id]) {
            forget_seq(s);
        }
    }
    stale_slots   = true;
    stale_layouts = true;
    idle_rows     = true;
}

void refreekv_store::refuse_shift(const char * op, llama_seq_id seq_id) const {
    refreekv_set_error("%s: positions of sequence %d cannot change: a context with a KV policy does not shift (llama_memory_can_shift is false)", op, seq_id);
}

// slots of cells that upstream has emptied
void refreekv_store::release_stale() {
    if (!stale_slots) {
        return;
    }
    for (auto & g : groups) {
        stale_layouts |= g.res.release([&](uint32_t cell) { return is_empty(cell); });
    }
    if (bytes_cold > 0) {
        std::vector<uint32_t> empty;
        for (uint32_t cell = 0; cell < n_cells; ++cell) {
            if (is_empty(cell)) {
                empty.push_back(cell);
            }
        }
        for (auto & g : groups) {
            forget_cold(g, empty);
        }
        refresh_sketches();
    }
    stale_slots = false;
}

// layouts

// Can the mask of a serve b, from slot n on, now and for every token to come? Slot by slot they hold the same cell, or two cells
// that no query can tell apart any more: settled, and of the same sequences. And new cells take the slots that correspond.
bool refreekv_store::same_from(const group & a, uint32_t n, const group & b, const std::vector<uint8_t> & settled) const {
    if (a.res.n_slots() != b.res.n_slots() + n) {
        return false;
    }

    for (uint32_t s = 0; s < n; ++s) {
        if (a.res.cell(s) < 0) {
            return false; // one would go there
        }
    }

    for (uint32_t s = 0; s < b.res.n_slots(); ++s) {
        const int32_t ca = a.res.cell(n + s);
        const int32_t cb = b.res.cell(s);

        if (a.res.hidden(n + s) != b.res.hidden(s)) {
            return false;
        }
        if (ca != cb && (ca < 0 || cb < 0 || !settled[ca] || !settled[cb] || table_of(ca).seq_get_all(index_of(ca)) != table_of(cb).seq_get_all(index_of(cb)))) {
            return false;
        }
    }

    return true;
}

// true when groups share masks in another way than before
bool refreekv_store::update_layouts() {
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

    bool others = false;

    for (uint32_t i = 0; i < groups.size(); ++i) {
        uint32_t l = 0;
        while (l < layouts.size() && !(groups[layouts[l]].rows.capacity() == groups[i].rows.capacity() && same_from(groups[layouts[l]], 0, groups[i], settled))) {
            ++l;
        }
        if (l == layouts.size()) {
            layouts.push_back(i);
        }
        others |= groups[i].layout != l;

        groups[i].layout = l;
    }

    const auto n_slots = [&](uint32_t l) { return groups[layouts[l]].res.n_slots(); };

    longest = 0;
    for (uint32_t l = 1; l < layouts.size(); ++l) {
        longest = n_slots(l) > n_slots(longest) ? l : longest;
    }

    tails.assign(layouts.size(), -1);
    shortest = longest;
    for (uint32_t l = 0; l < layouts.size(); ++l) {
        const uint32_t n = n_slots(longest) - n_slots(l);

        // the padding behind them is to be the same
        if (layout_n_kv(longest) - layout_n_kv(l) == n && same_from(groups[layouts[longest]], n, groups[layouts[l]], settled)) {
            tails[l] = n;
            shortest = n_slots(l) < n_slots(shortest) ? l : shortest;
        }
    }

    stale_layouts = false;
    n_generation++;

    return others;
}

uint32_t refreekv_store::layout_n_kv(uint32_t layout) const {
    return padded(std::max(1u, groups[layouts[layout]].res.n_slots()));
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

    n_expected -= std::min(n_expected, ubatch.n_tokens);

    if (prunes_read && ubatch.n_tokens > 1) {
        read.insert(ubatch.seq_id_unq, ubatch.seq_id_unq + ubatch.n_seqs_unq);
    }
}

refreekv_store::~refreekv_store() = default;

std::map<ggml_backend_buffer_type_t, size_t> refreekv_store::memory_breakdown() const {
    std::map<ggml_backend_buffer_type_t, size_t> res;

    for (const auto & g : groups) {
        res[g.rows.get_shape().buft] += g.rows.bytes();
    }
    for (const auto & [buft, size] : ring_breakdown()) {
        res[buft] += size;
    }

    return res;
}

std::map<ggml_backend_buffer_type_t, size_t> refreekv_store::ring_breakdown() const {
    std::map<ggml_backend_buffer_type_t, size_t> res;

    for (const auto & [ctx, buf] : ring_bufs) {
        auto * buft = ggml_backend_buffer_get_type(buf.get());
        res[buft] += kv.model.hparams.no_alloc ? ggml_backend_alloc_ctx_tensors_from_buft_size(ctx.get(), buft) : ggml_backend_buffer_get_size(buf.get());
    }

    return res;
}
