#include "refreekv.h"

#include "hooks.h"
#include "api/checks.h"
#include "api/error.h"
#include "api/model.h"
#include "api/process.h"
#include "cache/figures.h"
#include "cache/store.h"
#include "evict/attention-host.h"

#include "llama-context.h"
#include "llama-ext.h"
#include "llama-impl.h"
#include "llama-model.h"

#include <algorithm>
#include <cstring>
#include <string>

static const int32_t REFREEKV_ABI_VERSION = 15;

int32_t refreekv_abi_version(void) {
    return REFREEKV_ABI_VERSION;
}

const char * refreekv_last_error(void) {
    return refreekv::last_error();
}

void refreekv_forget_last_error(void) {
    refreekv::clear_error();
}

uint32_t refreekv_hooks_ran(void) {
    return refreekv::hooks_ran();
}

// the `refreekv` preset, see docs/reference/policies.md
struct refreekv_params refreekv_params_default(void) {
    refreekv_params res = {};

    res.policy           = REFREEKV_POLICY_REFREEKV;
    res.ranking          = REFREEKV_RANKING_SCORE;
    res.rows             = REFREEKV_ROWS_WORST;
    res.measure          = REFREEKV_MEASURE_MASS;
    res.pooling          = REFREEKV_POOLING_MEAN;
    res.sinks_in_measure = false;
    res.n_window         = 64;
    res.window_step      = 1;
    res.n_sink           = 4;
    res.n_recent         = 32;
    res.n_hot            = 64;
    res.n_full_layers    = 0;
    res.n_pool           = 7;
    res.n_block          = 256;
    res.n_min            = 512;
    res.beta             = 20;
    res.threshold        = 0.35f;
    res.mass_floor       = 0.05f;
    res.top_p            = 0.9f;
    res.budget           = 1.0;
    res.memory_limit     = 0;
    res.cold             = REFREEKV_COLD_NONE;
    res.cold_limit       = 0;
    res.cold_dir         = nullptr;
    res.cold_type        = -1;
    res.cold_state       = true;
    res.turns            = REFREEKV_TURNS_NONE;
    res.theta            = 0.0f;
    res.max_error        = 0.0f;
    res.mask_only        = false;
    res.by_graph     = false;

    return res;
}

int32_t refreekv_next_context(const struct refreekv_params * params) {
    refreekv::clear_error();

    return refreekv::guard([&]() -> int32_t {
        if (const char * why = params ? refreekv::policy_check(*params) : nullptr) {
            refreekv::set_error("%s", why);
            return REFREEKV_ERR_ARGUMENT;
        }
        refreekv::set_next_params(params);

        return REFREEKV_OK;
    });
}

void refreekv_forget_next_context(void) {
    refreekv::forget_next_params();
}

const char * refreekv_model_refusal(const struct llama_model * model) {
    static thread_local std::string why;

    if (refreekv::guard([&]() { why = refreekv::why_not(*model); return (int32_t) REFREEKV_OK; }) != REFREEKV_OK) {
        return refreekv::last_error();
    }
    return why.empty() ? nullptr : why.c_str();
}

int64_t refreekv_prune(struct llama_context * ctx, llama_seq_id seq_id) {
    auto * store = refreekv::get_store(ctx);
    if (!store) {
        return REFREEKV_ERR_NO_POLICY;
    }
    if (!refreekv::check_seq(*store, seq_id, ctx)) {
        return REFREEKV_ERR_ARGUMENT;
    }
    return refreekv::guard([&]() { return store->update.prune(ctx, seq_id); });
}

int64_t refreekv_keep(struct llama_context * ctx, llama_seq_id seq_id, int32_t il, const llama_pos * pos, int32_t n_pos) {
    auto * store = refreekv::get_store(ctx);
    if (!store) {
        return REFREEKV_ERR_NO_POLICY;
    }
    if (!refreekv::check_seq(*store, seq_id, ctx)) {
        return REFREEKV_ERR_ARGUMENT;
    }
    if (n_pos < 0) {
        refreekv::set_error("keep: n_pos must not be negative");
        return REFREEKV_ERR_ARGUMENT;
    }

    return refreekv::guard([&]() {
        std::vector<llama_pos> list(pos, pos + n_pos);
        std::sort(list.begin(), list.end());

        return store->update.keep(ctx, seq_id, il, list);
    });
}

int32_t refreekv_expect(struct llama_context * ctx, int32_t n_tokens) {
    auto * store = refreekv::get_store(ctx);
    if (!store) {
        return REFREEKV_ERR_NO_POLICY;
    }
    if (n_tokens < 0) {
        refreekv::set_error("expect: %d tokens; must not be negative", n_tokens);
        return REFREEKV_ERR_ARGUMENT;
    }
    store->expect(n_tokens);

    return REFREEKV_OK;
}

int32_t refreekv_prompt(struct llama_context * ctx, llama_seq_id seq_id, int32_t n_tokens) {
    auto * store = refreekv::get_store(ctx);
    if (!store) {
        return REFREEKV_ERR_NO_POLICY;
    }
    if (!store->valid_seq(seq_id) || n_tokens < -1) {
        refreekv::set_error("prompt: sequence %d, %d tokens: must be a sequence of this context, and -1 or more", seq_id, n_tokens);
        return REFREEKV_ERR_ARGUMENT;
    }
    store->announce(seq_id, n_tokens);

    return REFREEKV_OK;
}

int32_t refreekv_is_due(struct llama_context * ctx, llama_seq_id seq_id) {
    auto * store = refreekv::get_store(ctx);
    if (!store) {
        return REFREEKV_ERR_NO_POLICY;
    }
    if (!store->valid_seq(seq_id)) {
        refreekv::set_error("is_due: sequence %d: must be a sequence of this context", seq_id);
        return REFREEKV_ERR_ARGUMENT;
    }
    return store->get_turn().is_due(seq_id);
}

int32_t refreekv_usable_prefix(struct llama_context * ctx, llama_seq_id seq_id, int32_t n_prefix, int32_t n_prompt) {
    auto * store = refreekv::get_store(ctx);
    if (!store) {
        return REFREEKV_ERR_NO_POLICY;
    }
    if (!store->valid_seq(seq_id) || n_prefix < 0 || n_prompt < n_prefix) {
        refreekv::set_error("usable_prefix: sequence %d, %d of %d tokens: must be a sequence of this context, and 0 <= n_prefix <= n_prompt", seq_id, n_prefix, n_prompt);
        return REFREEKV_ERR_ARGUMENT;
    }
    return refreekv::guard([&]() { return store->usable_prefix(seq_id, n_prefix, n_prompt); });
}

int32_t refreekv_protect(struct llama_context * ctx, llama_seq_id seq_id, llama_pos p0, llama_pos p1) {
    auto * store = refreekv::get_store(ctx);
    if (!store) {
        return REFREEKV_ERR_NO_POLICY;
    }
    if (!store->valid_seq(seq_id) || p0 < 0 || p1 < p0) {
        refreekv::set_error("protect: sequence %d, positions %d to %d: must be a sequence of this context, and 0 <= p0 <= p1", seq_id, p0, p1);
        return REFREEKV_ERR_ARGUMENT;
    }
    return refreekv::guard([&]() { return store->protect(seq_id, p0, p1); });
}

int64_t refreekv_restore(struct llama_context * ctx, llama_seq_id seq_id) {
    auto * store = refreekv::get_store(ctx);
    if (!store) {
        return REFREEKV_ERR_NO_POLICY;
    }
    if (!refreekv::check_seq(*store, seq_id, ctx)) {
        return REFREEKV_ERR_ARGUMENT;
    }
    return refreekv::guard([&]() { return store->update.restore_seq(ctx, seq_id); });
}

const char * refreekv_library_refusal(struct llama_context * ctx) {
    auto * store = refreekv::get_store(ctx);
    if (!store) {
        return "this context has no KV policy";
    }
    return store->books.refusal();
}

// nullptr after setting the error
static refreekv::store * get_library(llama_context * ctx, llama_seq_id seq_id) {
    const char * why = refreekv_library_refusal(ctx);
    if (why) {
        refreekv::set_error("library: %s", why);
        return nullptr;
    }
    auto * store = refreekv::get_store(ctx);
    if (!store->valid_seq(seq_id)) {
        refreekv::set_error("library: there is no sequence %d in this context", seq_id);
        return nullptr;
    }
    return store;
}

// what the numbers in a cache depend on, of what the context knows
static std::string reads_with(const llama_context & ctx) {
    const auto & c = ctx.get_cparams();

    const auto & model = ctx.get_model();

    // some models have other frequencies for long contexts
    const bool is_long = c.n_ctx_seq > model.hparams.n_ctx_orig_yarn &&
        std::any_of(model.layers.begin(), model.layers.end(), [](const llama_layer & layer) { return layer.rope_long != nullptr; });

    return refreekv::text_of({
            (double) c.flash_attn, (double) c.rope_freq_base, (double) c.rope_freq_scale, (double) c.n_ctx_orig_yarn, (double) c.yarn_ext_factor,
            (double) c.yarn_attn_factor, (double) c.yarn_beta_fast, (double) c.yarn_beta_slow, (double) is_long });
}

int32_t refreekv_library_use(struct llama_context * ctx, const char * folder, uint64_t limit, const char * const * files, int32_t n_files, const char * reads, const char * evicts) {
    auto * store = get_library(ctx, 0);
    if (!store) {
        return REFREEKV_ERR_STATE;
    }
    return refreekv::guard([&]() {
        store->books.use({ folder, limit, { files, files + std::max(0, n_files) }, reads_with(*ctx) + reads, evicts });
        return (int32_t) REFREEKV_OK;
    });
}

int32_t refreekv_library_find(struct llama_context * ctx, llama_seq_id seq_id, const llama_token * tokens, int32_t n_tokens, int32_t n_have, bool with_state) {
    auto * store = get_library(ctx, seq_id);
    if (!store) {
        return REFREEKV_ERR_STATE;
    }
    return refreekv::guard([&]() {
        return (int32_t) store->books.find(seq_id, { tokens, tokens + std::max(0, n_tokens) }, std::max(0, n_have), with_state);
    });
}

int32_t refreekv_library_open(struct llama_context * ctx, llama_seq_id seq_id) {
    auto * store = get_library(ctx, seq_id);
    if (!store) {
        return REFREEKV_ERR_STATE;
    }
    return refreekv::guard([&]() {
        return (int32_t) store->update.run_job(ctx, [&]() -> int64_t { return refreekv::guard([&]() { return store->books.open(seq_id); }); });
    });
}

int64_t refreekv_library_state(struct llama_context * ctx, void * data, int64_t n_max) {
    auto * store = get_library(ctx, 0);
    if (!store) {
        return REFREEKV_ERR_STATE;
    }
    const auto & state = store->books.state();
    if (data && (int64_t) state.size() <= n_max) {
        memcpy(data, state.data(), state.size());
    }
    return state.size();
}

int32_t refreekv_library_keep(struct llama_context * ctx, llama_seq_id seq_id, const llama_token * tokens, int32_t n_tokens,
        const int32_t * state_tokens, const void * const * states, const size_t * state_sizes, int32_t n_states, bool states_stay) {
    auto * store = get_library(ctx, seq_id);
    if (!store) {
        return REFREEKV_ERR_STATE;
    }
    return refreekv::guard([&]() {
        std::vector<refreekv::library::state_of> list;
        for (int32_t i = 0; i < n_states; ++i) {
            list.push_back({ (uint32_t) state_tokens[i], states[i], state_sizes[i] });
        }
        return store->books.keep(seq_id, { tokens, tokens + std::max(0, n_tokens) }, list, states_stay);
    });
}

const char * refreekv_library_key(struct llama_context * ctx, llama_seq_id seq_id, bool replaced) {
    auto * store = get_library(ctx, seq_id);

    return store ? store->books.key_of(seq_id, replaced) : "";
}

int32_t refreekv_library_check(const char * path, bool may_remove) {
    refreekv::clear_error();

    return refreekv::guard([&]() {
        std::string why;
        if (!may_remove) {
            refreekv::check_file(path);
        } else if (!refreekv::check_or_remove(path, nullptr, why)) {
            throw std::runtime_error(why);
        }
        return (int32_t) REFREEKV_OK;
    });
}

int32_t refreekv_library_tidy(const char * path, uint64_t limit) {
    refreekv::clear_error();

    return refreekv::guard([&]() {
        refreekv::folder(path, limit).trim();
        return (int32_t) REFREEKV_OK;
    });
}

void refreekv_fail_cold(int32_t n) {
    refreekv::cold_failure.from(n);
}

void refreekv_fail_allocation(int32_t n) {
    refreekv::allocation_failure.from(n);
}

llama_pos refreekv_pruned_pos(struct llama_context * ctx, llama_seq_id seq_id) {
    auto * store = refreekv::get_store(ctx);
    if (!store || !store->valid_seq(seq_id)) {
        return REFREEKV_ERR_NO_POLICY;
    }
    return store->pruned_pos(seq_id);
}
