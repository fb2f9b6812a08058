// Evicting from a refreekv::store: what the policy may see of a sequence in a layer, and what becomes of its answer.

#include "hooks.h"
#include "cache/store.h"

#include "api/error.h"
#include "api/process.h"
#include "cache/parallel.h"
#include "kernels/kernels.h"

#include "llama-context.h"
#include "llama-impl.h"
#include "llama-model.h"

#include <algorithm>
#include <cinttypes>

namespace refreekv {

static const size_t REFREEKV_SCRATCH_BYTES = 128u*1024*1024; // of all threads, with one query head in each
static const size_t REFREEKV_WEIGHTS_BYTES =  16u*1024*1024; // of all threads, with more of them

bool store::begin_update(llama_context * lctx) {
    mover.set_context(lctx);

    release_stale();

    // ggml's allocator takes a graph with as many nodes and leafs as the last one for the same graph. One with other layouts
    // is not: the update reserves anew.
    const bool others = layouts.is_stale() && update_layouts();

    if (jobs.empty()) {
        turn.begin_batch();
    }

    return others || !jobs.empty();
}

bool store::update(llama_context * lctx) {
    hook_ran(HOOK_UPDATE);

    publishing publish(this);

    mover.set_context(lctx);

    mover.synchronize();
    release_stale();

    // one that throws is not done again
    const auto todo = std::move(jobs);
    jobs.clear();

    for (const auto & job : todo) {
        job_result = job();
    }

    return true;
}

int64_t store::run_job(llama_context * lctx, std::function<int64_t()> && job) {
    job_result = REFREEKV_ERR_STATE;
    jobs.push_back(std::move(job));
    lctx->memory_update(false);
    publish_buffers(lctx);

    return job_result;
}

int64_t store::prune(llama_context * lctx, llama_seq_id seq_id) {
    if (!policy_find(params.policy)) {
        return 0;
    }

    return run_job(lctx, [=]() { return run_eviction(seq_id, -1, nullptr); });
}

void store::announce(llama_seq_id seq_id, int32_t n_tokens) {
    turn.announce(seq_id, n_tokens);
    expect(turn.n_announced());
}

bool store::plan_turn(const std::vector<llama_ubatch> & ubatches) {
    if (jobs.empty()) {
        for (const auto & todo : turn.plan(ubatches, n_expected > 0)) {
            jobs.push_back([this, todo]() { return run_step(todo); });
        }
    }
    return !jobs.empty();
}

// called from llama_decode(), which nothing may be thrown through
int64_t store::run_step(const refreekv::turn::todo & todo) {
    const bool    restores = todo.what == refreekv::turn::step::RESTORE;
    const int64_t res      = guard([&]() { return restores ? restore_now(todo.seq_id, -1, -1, todo.n_tokens) : run_eviction(todo.seq_id, -1, nullptr); });

    if (layouts.is_stale()) {
        update_layouts();
    }
    if (res < 0 && n_turns_failed++ == 0) {
        LLAMA_LOG_WARN("refreekv: sequence %d was not %s and goes on from what is in the cache; this is said once, and counted (n_turns_failed)\n",
                todo.seq_id, restores ? "restored" : "pruned");
    }
    return res;
}

int32_t store::usable_prefix(llama_seq_id seq_id, int32_t n_prefix, int32_t n_prompt) const {
    const int32_t n_needed = n_prefix - std::max(0, n_prompt - params.n_window);

    // where positions have several dimensions, tokens of an image share one: there is no counting back, and what is there is looked at
    if (!has_rings() || n_needed <= 0 || kv.hparams.n_pos_per_embd() > 1) {
        return n_prefix;
    }
    std::vector<int32_t>   rows;
    std::vector<llama_pos> pos;
    ring.rows(seq_id, n_prefix - 1, n_needed, 1, rows, pos);

    return (int32_t) pos.size() == n_needed ? n_prefix : n_prefix - n_needed;
}

void store::prune_read(llama_context * lctx) {
    const auto seq_ids = std::move(read);
    read.clear();

    for (llama_seq_id s : seq_ids) {
        if (logical.table_of_seq(s).seq_pos_max(s) >= 0) {
            const int64_t n_evicted = prune(lctx, s); // an error is logged where it is set

            LLAMA_LOG_INFO("refreekv: sequence %d: %" PRId64 " cells evicted\n", s, std::max<int64_t>(n_evicted, 0));
        }
    }
}

int64_t store::keep(llama_context * lctx, llama_seq_id seq_id, int32_t il, const std::vector<llama_pos> & pos) {
    if (il_to_layer.find(il) == il_to_layer.end()) {
        set_error("keep: layer %d has no KV cache", il);
        return REFREEKV_ERR_ARGUMENT;
    }

    return run_job(lctx, [=]() { return run_eviction(seq_id, il, &pos); });
}

int64_t store::run_eviction(llama_seq_id seq_id, int32_t il, const std::vector<llama_pos> * pos) {
    const int64_t t_start = ggml_time_us();
    const size_t  before  = stats().bytes;

    // which rows a store with a limit has room for hangs on their order
    uint32_t n_threads = params.cold_limit > 0 ? 1 : mover.n_threads();

    // nor is the scratch memory to grow with them beyond a bound: a query head's weights at least (kernels/attention-cpu.cpp)
    const size_t size = (size_t) std::max(1, logical.table_of_seq(seq_id).seq_pos_max(seq_id))*params.n_window*sizeof(float);

    n_threads = std::clamp<size_t>(REFREEKV_SCRATCH_BYTES/size, 1, n_threads);

    const auto all = evictor.cells_of(seq_id);

    std::vector<evictor::scratch> scratch(n_threads);
    for (auto & s : scratch) {
        s.attention.weights_limit = REFREEKV_WEIGHTS_BYTES/n_threads;
    }
    std::atomic<int64_t>          n_evicted { 0 };

    int32_t status = run_parallel(layers.size(), n_threads, [&](uint32_t i, uint32_t thread) {
        auto & layer = layers[i];

        const bool asked = pos ? layer.il == il : i >= (uint32_t) params.n_full_layers;

        return asked ? evictor.evict(layer, seq_id, all, pos, scratch[thread], n_evicted) : REFREEKV_OK;
    });

    for (auto & s : scratch) {
        const int32_t put = guard([&]() {
            cold_transfer::finish(s.lane);
            return s.lane.put_status;
        });
        status = status == REFREEKV_OK ? put : status;
    }

    n_expected = 0;
    turn.note_pruned(seq_id);

    if (status != REFREEKV_OK) {
        warm.refresh(layers); // some of what was coded stayed after all
    }

    // after an error, what was evicted before it is gone
    if (n_evicted > 0) {
        const llama_pos last = logical.table_of_seq(seq_id).seq_pos_max(seq_id);

        n_prunes += pruned[seq_id] != last; // by hand, a pruning is a job for each layer

        pruned[seq_id] = last;
        layouts.make_stale();
        prune_us += ggml_time_us() - t_start;
    }
    if (layouts.is_stale()) {
        update_layouts();
    }

    pages_trim();

    const size_t after = stats().bytes;
    bytes_freed += before > after ? before - after : 0;

    return status == REFREEKV_OK ? n_evicted.load() : status;
}

int32_t store::protect(llama_seq_id seq_id, llama_pos p0, llama_pos p1) {
    auto & list = spans[seq_id];

    const auto span = std::make_pair(p0, p1);
    if (std::find(list.begin(), list.end(), span) == list.end()) {
        list.push_back(span);
    }

    return REFREEKV_OK;
}

} // namespace refreekv
