// Evicting from a refreekv_store: what the policy may see of a sequence in a group, and what becomes of its answer.

#include "hooks.h"
#include "cache/store.h"

#include "kernels/kernels.h"
#include "api/error.h"
#include "cache/parallel.h"

#include "llama-context.h"
#include "llama-impl.h"
#include "llama-model.h"

#include <algorithm>
#include <cinttypes>

static const size_t REFREEKV_SCRATCH_BYTES = 128u*1024*1024; // of all threads, with one query head in each
static const size_t REFREEKV_WEIGHTS_BYTES =  16u*1024*1024; // of all threads, with more of them

bool refreekv_store::begin_update(llama_context * lctx) {
    this->lctx = lctx;

    release_stale();

    // ggml's allocator takes a graph with as many nodes and leafs as the last one for the same graph. One with other layouts
    // is not: the update reserves anew.
    const bool others = (stale_layouts && update_layouts()) || regrouped;

    regrouped = false;

    return others || !jobs.empty();
}

bool refreekv_store::update(llama_context * lctx) {
    hook_ran(HOOK_UPDATE);

    refreekv_publishing publish(this);

    this->lctx = lctx;

    synchronize();
    release_stale();

    // one that throws is not done again
    const auto todo = std::move(jobs);
    jobs.clear();

    for (const auto & job : todo) {
        job_result = job();
    }

    return true;
}

int64_t refreekv_store::run_job(llama_context * lctx, std::function<int64_t()> && job) {
    job_result = REFREEKV_ERR_STATE;
    jobs.push_back(std::move(job));
    lctx->memory_update(false);
    refreekv::publish_buffers(lctx);

    return job_result;
}

int64_t refreekv_store::prune(llama_context * lctx, llama_seq_id seq_id, const refreekv_params * by) {
    if (by && (by->policy != params.policy || by->n_window > params.n_window)) {
        refreekv_set_error("prune: other parameters have to be of the context's policy, with an n_window of %d or less", params.n_window);
        return REFREEKV_ERR_ARGUMENT;
    }
    if (!refreekv_policy_find(params.policy)) {
        return 0;
    }

    refreekv_params chosen = by ? *by : params;
    chosen.n_block = params.n_block;

    return run_job(lctx, [=]() { return run_eviction(seq_id, -1, nullptr, chosen); });
}

void refreekv_store::prune_read(llama_context * lctx) {
    const auto seq_ids = std::move(read);
    read.clear();

    for (llama_seq_id s : seq_ids) {
        if (table_of_seq(s).seq_pos_max(s) >= 0) {
            const int64_t n_evicted = prune(lctx, s); // an error is logged where it is set

            LLAMA_LOG_INFO("refreekv: sequence %d: %" PRId64 " cells evicted\n", s, std::max<int64_t>(n_evicted, 0));
        }
    }
}

int64_t refreekv_store::keep(llama_context * lctx, llama_seq_id seq_id, int32_t il, const std::vector<llama_pos> & pos) {
    if (il_to_layer.find(il) == il_to_layer.end()) {
        refreekv_set_error("keep: layer %d has no KV cache", il);
        return REFREEKV_ERR_ARGUMENT;
    }

    return run_job(lctx, [=]() { return run_eviction(seq_id, il, &pos, params); });
}

int64_t refreekv_store::run_eviction(llama_seq_id seq_id, int32_t il, const std::vector<llama_pos> * pos, const refreekv_params & by) {
    const int64_t t_start = ggml_time_us();
    const size_t  before  = stats().bytes;

    // which rows a store with a limit has room for hangs on their order
    uint32_t n_threads = params.cold_limit > 0 ? 1 : this->n_threads();

    // nor is the scratch memory to grow with them beyond a bound: a query head's weights at least (kernels/attention-cpu.cpp)
    const size_t size = (size_t) std::max(1, table_of_seq(seq_id).seq_pos_max(seq_id))*by.n_window*sizeof(float);

    n_threads = std::clamp<size_t>(REFREEKV_SCRATCH_BYTES/size, 1, n_threads);

    const auto all = all_cells(seq_id);

    std::vector<eviction_scratch> scratch(n_threads);
    for (auto & s : scratch) {
        s.attention.weights_limit = REFREEKV_WEIGHTS_BYTES/n_threads;
    }
    std::atomic<int64_t>          n_evicted { 0 };

    int32_t status = refreekv_parallel(groups.size(), n_threads, [&](uint32_t i, uint32_t thread) {
        auto & g = groups[i];

        const bool asked = pos ? g.il == il : il_to_layer.at(g.il) >= (uint32_t) by.n_full_layers;

        return asked && !g.whole ? evict_group(g, seq_id, all, pos, by, scratch[thread], n_evicted) : REFREEKV_OK;
    });

    for (auto & s : scratch) {
        const int32_t put = refreekv_guard([&]() {
            finish_put(s);
            return s.put_status;
        });
        status = status == REFREEKV_OK ? put : status;
    }

    n_expected = 0;

    if (status != REFREEKV_OK) {
        refresh_sketches(); // of what stayed after all
    }

    // after an error, what was evicted before it is gone
    if (n_evicted > 0) {
        const llama_pos last = table_of_seq(seq_id).seq_pos_max(seq_id);

        n_prunes += pruned[seq_id] != last; // by hand, a pruning is a job for each layer

        pruned[seq_id] = last;
        stale_layouts  = true;
        prune_us += ggml_time_us() - t_start;
    }
    if (stale_layouts) {
        update_layouts();
    }

    refreekv_pages_trim();

    const size_t after = stats().bytes;
    bytes_freed += before > after ? before - after : 0;

    return status == REFREEKV_OK ? n_evicted.load() : status;
}

int32_t refreekv_store::evict_group(group & g, llama_seq_id seq_id, const std::vector<held> & all, const std::vector<llama_pos> * pos, const refreekv_params & by, eviction_scratch & scratch, std::atomic<int64_t> & n_evicted) {
    const auto list = held_cells(g, all);

    std::vector<uint8_t> keep(list.size(), 1);

    if (list.empty()) {
        return REFREEKV_OK;
    } else if (pos) {
        for (size_t c = 0; c < list.size(); ++c) {
            keep[c] = std::binary_search(pos->begin(), pos->end(), list[c].pos) || list[c].stays;
        }
    } else if ((int32_t) list.size() < by.n_min) {
        return REFREEKV_OK;
    } else if (const int32_t status = select(g, seq_id, list, by, scratch.attention, keep)) {
        return status;
    }

    const int64_t n_out = std::count(keep.begin(), keep.end(), 0);

    if (n_out > 0 && !evict(g, list, keep, scratch)) {
        refreekv_set_error("layer %d: no memory to move the kept cells", g.il);
        return REFREEKV_ERR_MEMORY;
    }
    n_evicted += n_out;

    return REFREEKV_OK;
}

std::vector<refreekv_store::placed> refreekv_store::cells_of(llama_seq_id seq_id, llama_pos p0, llama_pos p1) const {
    const uint32_t first = kv.seq_to_stream[seq_id]*kv_size;

    std::vector<placed> res;
    for (const auto & [pos, index] : table_of_seq(seq_id).seq_pos_get(seq_id)) {
        if (pos < p0 || pos >= p1) {
            res.push_back({ pos, first + index });
        }
    }
    return res;
}

std::vector<refreekv_store::held> refreekv_store::all_cells(llama_seq_id seq_id) const {
    const auto & list = spans[seq_id];

    std::vector<held> res;
    for (const auto & [pos, cell] : cells_of(seq_id)) {
        const bool is_protected = std::any_of(list.begin(), list.end(), [pos = pos](const auto & span) { return pos >= span.first && pos < span.second; });

        res.push_back({ pos, cell, 0, shared(cell) || is_protected });
    }
    return res;
}

// those that it holds and queries can see
std::vector<refreekv_store::held> refreekv_store::held_cells(const group & g, std::vector<held> all) const {
    size_t n = 0;
    for (const auto & c : all) {
        const int32_t slot = g.res.slot(c.cell);
        if (slot >= 0 && !g.res.hidden(slot)) {
            all[n++] = { c.pos, c.cell, (uint32_t) slot, c.stays };
        }
    }
    all.resize(n);

    return all;
}

int32_t refreekv_store::protect(llama_seq_id seq_id, llama_pos p0, llama_pos p1) {
    auto & list = spans[seq_id];

    const auto span = std::make_pair(p0, p1);
    if (std::find(list.begin(), list.end(), span) == list.end()) {
        list.push_back(span);
    }

    return REFREEKV_OK;
}

static void refreekv_keep_selected(const refreekv_selection & sel, std::vector<uint8_t> & keep) {
    std::fill(keep.begin(), keep.end(), 0);
    for (uint32_t r = 0; r < sel.n_keep; ++r) {
        keep[sel.order[r]] = 1;
    }
}

int32_t refreekv_store::select(const group & g, llama_seq_id seq_id, const std::vector<held> & list, const refreekv_params & by, refreekv_attention_scratch & scratch, std::vector<uint8_t> & keep) {
    refreekv_selection sel;

    std::vector<uint8_t> pinned;
    for (const auto & c : list) {
        pinned.push_back(c.stays);
    }

    if (!refreekv_policy_looks(by.policy)) {
        refreekv_attention_host nothing(nullptr, 0, 0, list.size());

        refreekv_policy_find(by.policy)(by, nothing, pinned, sel);
        refreekv_keep_selected(sel, keep);

        return REFREEKV_OK;
    }

    std::unique_ptr<refreekv_attention> attn;
    if (const int32_t status = look(g, seq_id, list, by, scratch, attn)) {
        return status;
    }

    const bool ok = refreekv_policy_find(by.policy)(by, *attn, pinned, sel);

    bytes_read    += attn->bytes_read;
    bytes_bounced += attn->bytes_bounced;

    if (!ok) {
        refreekv_set_error("layer %d: backend %s could not compute the attention rows", g.il, ggml_backend_name(backend_of(g)));
        return REFREEKV_ERR_COMPUTE;
    }

    refreekv_keep_selected(sel, keep);

    return REFREEKV_OK;
}

int32_t refreekv_store::look(const group & g, llama_seq_id seq_id, const std::vector<held> & list, const refreekv_params & by, refreekv_attention_scratch & scratch, std::unique_ptr<refreekv_attention> & attn) const {
    const auto & hparams = kv.hparams;
    const auto & layer   = layer_of(g);

    refreekv_attention_inputs in = {};

    in.backend = backend_of(g);
    in.host    = host_backend();
    if (!in.backend) {
        refreekv_set_error("layer %d: no backend of this context holds its cache", g.il);
        return REFREEKV_ERR_COMPUTE;
    }
    if (!layer.known) {
        refreekv_set_error("layer %d: attention with a bias or queries of its own kind cannot be judged; kv_policy \"full\" and \"streaming\" can be used", g.il);
        return REFREEKV_ERR_STATE;
    }

    const bool one_row = by.policy == REFREEKV_POLICY_REFREEKV && by.rows == REFREEKV_ROWS_LAST && by.ranking == REFREEKV_RANKING_POSITION;

    ring.rows(seq_id, list.back().pos, one_row ? 1 : by.n_window, by.window_step, in.rows, in.row_pos);

    if (in.row_pos.empty() || in.row_pos.back() != list.back().pos) {
        refreekv_set_error("the last query of sequence %d is not there any more: decode a token before pruning", seq_id);
        return REFREEKV_ERR_STATE;
    }

    in.k           = g.rows.k();
    in.ring        = layer.ring;
    in.heads       = g.heads;
    in.n_embd_head = hparams.n_embd_head_k(g.il);
    in.n_gqa       = hparams.n_gqa(g.il);
    in.n_kv        = g.res.n_slots();
    in.use_alibi   = hparams.use_alibi;
    in.max_bias    = hparams.f_max_alibi_bias;
    in.soft_cap    = hparams.attn_soft_cap ? hparams.f_attn_logit_softcapping : 0.0f;
    in.pre_scale   = hparams.attn_soft_cap ? 1.0f/hparams.f_attn_logit_softcapping : 1.0f;
    in.post_scale  = layer.kq_scale;

    if (layer.sinks) {
        in.sinks.resize(in.heads.size()*in.n_gqa);
        for (size_t i = 0; i < in.heads.size(); ++i) {
            const size_t size = in.n_gqa*sizeof(float);
            ggml_backend_tensor_get(layer.sinks, in.sinks.data() + i*in.n_gqa, in.heads[i]*size, size);
        }
    }

    for (const auto & c : list) {
        in.slots.push_back(c.slot);
        in.pos  .push_back(c.pos);
    }

    if (const auto * kernels = refreekv_find_kernels(); kernels && !params.by_graph) {
        attn = kernels->make_attention(in, scratch);
    }
    if (!attn) {
        attn = std::make_unique<refreekv_attention_graph>(std::move(in), scratch);
    }

    attn->i_layer = il_to_layer.at(g.il);
    attn->n_layer = layers.size();

    return REFREEKV_OK;
}

bool refreekv_store::evict(group & g, const std::vector<held> & list, const std::vector<uint8_t> & keep, eviction_scratch & scratch) {
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
    std::vector<uint32_t> cells_out;
    for (uint32_t s = 0; s < out.size(); ++s) {
        if (out[s]) {
            cells_out.push_back(g.res.cell(s));
        } else if (g.res.cell(s) >= 0) {
            slots.push_back(s);
        }
    }

    stash(g, cells_out, scratch);

    if (g.evicted) {
        sketch(g, cells_out, [&](size_t i) { return (const uint8_t *) g.rows.k()->data + g.res.slot(cells_out[i])*g.rows.k()->nb[1]; });
    }

    if (!move(g, slots, padded(slots.size()))) {
        return false;
    }
    g.res.compact(slots);

    return true;
}
