#include "cache/updates.h"

#include "hooks.h"

#include "api/error.h"
#include "api/process.h"
#include "policies/policy.h"

#include "llama-context.h"
#include "llama-impl.h"

#include <algorithm>
#include <cinttypes>

namespace refreekv {

bool updates::begin(llama_context * lctx) {
    p.mover.set_context(lctx);

    p.release_stale();

    // ggml's allocator takes a graph with as many nodes and leafs as the last one for the same graph. One with other layouts
    // is not: the update reserves anew.
    const bool others = p.layouts.is_stale() && p.update_layouts();

    if (jobs.empty()) {
        p.turn.begin_batch();
    }

    return others || !jobs.empty();
}

bool updates::run(llama_context * lctx) {
    hook_ran(HOOK_UPDATE);

    publishing publish(p);

    p.mover.set_context(lctx);

    p.mover.synchronize();
    p.release_stale();

    // one that throws is not done again
    const auto todo = std::move(jobs);
    jobs.clear();

    for (const auto & job : todo) {
        job_result = job();
    }

    return true;
}

int64_t updates::run_job(llama_context * lctx, std::function<int64_t()> && job) {
    job_result = REFREEKV_ERR_STATE;
    jobs.push_back(std::move(job));
    try {
        lctx->memory_update(false);
    } catch (...) {
        jobs.clear(); // it may not have begun, and what it refers to is gone later
        throw;
    }
    publish_buffers(lctx);

    return job_result;
}

bool updates::plan_turn(const std::vector<llama_ubatch> & ubatches) {
    if (jobs.empty()) {
        const auto plan = p.turn.plan(ubatches, p.n_expected > 0);
        try {
            for (const auto & todo : plan) {
                jobs.push_back([this, todo]() { return run_step(todo); });
            }
        } catch (...) {
            p.n_turns_failed += plan.size();
            throw;
        }
    }
    return !jobs.empty();
}

// called from llama_decode(), which nothing may be thrown through
int64_t updates::run_step(const refreekv::turn::todo & todo) {
    const bool    restores = todo.what == refreekv::turn::step::RESTORE;
    const int64_t res      = guard([&]() { return restores ? restore.run(todo.seq_id, -1, -1, todo.n_tokens) : evict.run(todo.seq_id, -1, nullptr); });

    if (p.layouts.is_stale()) {
        p.update_layouts();
    }
    if (res < 0 && p.n_turns_failed++ == 0) {
        LLAMA_LOG_WARN("refreekv: sequence %d was not %s and goes on from what is in the cache; this is said once, and counted (n_turns_failed)\n",
                todo.seq_id, restores ? "restored" : "pruned");
    }
    return res;
}

void updates::prune_read(llama_context * lctx) {
    const auto seq_ids = std::move(read);
    read.clear();

    for (llama_seq_id s : seq_ids) {
        if (p.logical.table_of_seq(s).seq_pos_max(s) >= 0) {
            const int64_t n_evicted = prune(lctx, s); // an error is logged where it is set

            LLAMA_LOG_INFO("refreekv: sequence %d: %" PRId64 " cells evicted\n", s, std::max<int64_t>(n_evicted, 0));
        }
    }
}

int64_t updates::prune(llama_context * lctx, llama_seq_id seq_id) {
    if (!policy_find(p.params.policy)->select) {
        return 0;
    }

    return run_job(lctx, [=]() { return evict.run(seq_id, -1, nullptr); });
}

int64_t updates::keep(llama_context * lctx, llama_seq_id seq_id, int32_t il, const std::vector<llama_pos> & pos) {
    if (std::none_of(p.layers.begin(), p.layers.end(), [il](const layer & l) { return l.il == il; })) {
        set_error("keep: layer %d has no KV cache", il);
        return REFREEKV_ERR_ARGUMENT;
    }

    return run_job(lctx, [=]() { return evict.run(seq_id, il, &pos); });
}

int64_t updates::restore_seq(llama_context * lctx, llama_seq_id seq_id) {
    return run_job(lctx, [this, seq_id]() {
        const int64_t res = restore.run(seq_id);
        if (p.layouts.is_stale()) {
            p.update_layouts();
        }
        return res;
    });
}

} // namespace refreekv
