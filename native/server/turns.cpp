#include "server/turns.h"

#include "server/figures.h"
#include "server/library.h"
#include "server/options.h"
#include "server/server.h"

#include "log.h"

namespace refreekv::server {

void protect(llama_context * ctx, llama_seq_id seq_id) {
    for (const auto & [start, end] : get_options().protect) {
        refreekv_protect(ctx, seq_id, start, end);
    }
}

// whether a prompt needs back what was evicted: not where the cache goes on attending to it by codes
static bool restores(llama_context * ctx) {
    refreekv_stats stats = {};
    refreekv_get_stats(ctx, &stats, nullptr, 0);

    return get_options().when_evicted == evicted::RESTORE || (get_options().when_evicted == evicted::KEEP && stats.bytes_codes == 0);
}

int32_t begin_prompt(llama_context * ctx, llama_seq_id seq_id, int32_t n_past, llama_pos p_past, const std::vector<llama_token> & prompt, bool in_parts, bool may_open) {
    if (!has_policy(ctx)) {
        return n_past;
    }
    const int32_t n_prompt = prompt.size();

    const int32_t n_opened = may_open ? open_from_library(ctx, seq_id, n_past, prompt) : n_past;
    if (n_opened != n_past) {
        n_past = p_past = n_opened;
    }
    auto *     mem    = llama_get_memory(ctx);
    const bool pruned = refreekv_pruned_pos(ctx, seq_id) >= 0;

    if (pruned && get_options().when_evicted == evicted::RECOMPUTE) {
        n_past = p_past = 0;
    }
    if (!pruned || get_options().when_evicted != evicted::DROP) {
        const int32_t n_usable = refreekv_usable_prefix(ctx, seq_id, n_past, n_prompt);
        if (n_usable >= 0 && n_usable < n_past) {
            // a memory that has lost the beginning, such as layers with a window, cannot go back
            n_past = p_past = in_parts && llama_memory_seq_pos_min(mem, seq_id) == 0 ? n_usable : 0;
        }
    }
    if (!llama_memory_seq_rm(mem, seq_id, p_past, -1) || (pruned && n_past > 0 && restores(ctx) && refreekv_restore(ctx, seq_id) < 0)) {
        LOG_INF("slot %d: what was evicted cannot be had back, the prompt is read from its start\n", seq_id);
        llama_memory_seq_rm(mem, seq_id, -1, -1);
        n_past = 0;
    }

    protect(ctx, seq_id);
    refreekv_prompt(ctx, seq_id, n_prompt - n_past);
    forget_figures(ctx, seq_id);

    return n_past;
}

void end_turn(llama_context * ctx, llama_seq_id seq_id, const std::vector<llama_token> & tokens) {
    if (!has_policy(ctx)) {
        return;
    }
    if (refreekv_is_due(ctx, seq_id) > 0 && get_options().params.policy != REFREEKV_POLICY_ELASTIC) {
        refreekv_prune(ctx, seq_id);
    }
    refreekv_prompt(ctx, seq_id, -1); // one that was given up
    keep_in_library(ctx, seq_id, tokens);
    note_decoded(ctx);
}

bool make_room(llama_context * ctx) {
    if (!has_policy(ctx) || get_options().params.memory_limit == 0 || get_options().params.policy == REFREEKV_POLICY_ELASTIC) {
        return false;
    }
    bool res = false;
    for (llama_seq_id s = 0; s < (llama_seq_id) llama_n_seq_max(ctx); ++s) {
        if (llama_memory_seq_pos_max(llama_get_memory(ctx), s) > refreekv_pruned_pos(ctx, s)) {
            res |= refreekv_prune(ctx, s) > 0;
        }
    }
    return res;
}

} // namespace refreekv::server
