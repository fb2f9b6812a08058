#include "api/model.h"

#include "hooks.h"
#include "api/error.h"
#include "api/process.h"
#include "cache/cache.h"

#include "llama-arch.h"
#include "llama-cparams.h"
#include "llama-impl.h"
#include "llama-memory.h"
#include "llama-model.h"

#include <stdexcept>

namespace refreekv {

static bool has_full_attention(const llama_model & model) {
    const auto & hparams = model.hparams;

    for (uint32_t il = 0; il < hparams.n_layer(); ++il) {
        if (hparams.n_head_kv(il) > 0 && !hparams.is_swa(il)) {
            return true;
        }
    }
    return false;
}

static bool is_draft_model(const llama_model & model) {
    return model.arch == LLM_ARCH_GEMMA4_ASSISTANT || model.arch == LLM_ARCH_EAGLE3 || model.arch == LLM_ARCH_DFLASH;
}

// Names what cannot have a policy before a context is created. Other memories than those of composite.h are refused in any case
// (create_memory below), as are graphs with an attention of their own (cache_context).
std::string why_not(const llama_model & model) {
    const auto & hparams = model.hparams;

    const std::string name = llm_arch_name(model.arch);

    static const char * sparse = ": trained sparse attention: an index of its own chooses the cells that each token attends to, and must find all of them";

    switch (model.arch) {
        case LLM_ARCH_HY_V4:
            if (hparams.indexer_top_k > 0) {
                return name + sparse;
            }
            break;
        case LLM_ARCH_DEEPSEEK4:
        case LLM_ARCH_DOTS3NOTE:
        case LLM_ARCH_GLM5_NEXT:
        case LLM_ARCH_QWEN4EXP:
        case LLM_ARCH_MINIMAX_M3:
        case LLM_ARCH_GLM_DSA:
        case LLM_ARCH_DEEPSEEK32:
            return name + sparse;
        case LLM_ARCH_DREAM:
        case LLM_ARCH_LLADA:
        case LLM_ARCH_LLADA_MOE:
        case LLM_ARCH_RND1:
            return name + ": diffusion model, it has no KV cache";
        case LLM_ARCH_T5:
        case LLM_ARCH_T5ENCODER:
            return name + ": encoder-decoder models, whose attention has a bias by relative positions, are not supported";
        case LLM_ARCH_LLAMA_EMBED:
        case LLM_ARCH_WAVTOKENIZER_DEC:
            return name + ": its attention uses no KV cache";
        default:
            break;
    }
    if (is_draft_model(model)) {
        return name + ": a draft model, whose own cache is small and has no policy; the model that it drafts for can have one";
    }

    if (llm_arch_is_recurrent(model.arch)) {
        return name + ": recurrent memory, there is no KV cache to prune";
    }
    if (!has_full_attention(model)) {
        return name + ": every attention layer has a sliding window, there is nothing to prune";
    }
    if (!hparams.causal_attn) {
        return name + ": attention is not causal, there is no prompt to prune after";
    }

    if (hparams.router_layer >= 0) {
        return name + ": attention to control tokens selects its adapters, none of it may be evicted";
    }

    return "";
}

// A draft head (MTP) has K and V of its own few layers. It and most draft models are given hidden states of the context that they draft for,
// and none of its cells
static bool is_draft(const llama_model & model, const llama_memory_params & params) {
    return params.ctx_type == LLAMA_CONTEXT_TYPE_MTP || is_draft_model(model);
}

[[noreturn]] static void refuse(const std::string & why) {
    set_error("%s", why.c_str());
    throw std::runtime_error(why);
}

// why the context that is created cannot have a policy; empty when it can
static std::string why_not(const llama_model & model, const llama_memory_params & params) {
    if (is_draft(model, params)) {
        return "it drafts for another one, which can have a policy";
    }
    const std::string why = why_not(model);

    if (why.empty() && model.split_mode() == LLAMA_SPLIT_MODE_TENSOR) {
        return "split_mode tensor divides each row of the cache between devices; with a KV policy split_mode must be one of none (0), layer (1) and row (2)";
    }
    return why;
}

llama_memory_i * create_memory(const llama_model & model, const llama_memory_params & params, const llama_cparams & cparams) {
    // of a draft model that has no K and V of its own
    if (model.arch == LLM_ARCH_GEMMA4_ASSISTANT && cache::of(params.mem_other)) {
        refuse(std::string(llm_arch_name(model.arch)) + ": a draft model that reads another context's cache; the other context must not have a KV policy");
    }

    if (!next_params()) {
        return model.create_memory(params, cparams);
    }

    std::string why = why_not(model, params);

    if (why.empty()) {
        llama_memory_ptr res { model.create_memory(params, cparams) };

        if (cache::of(res.get())) {
            return res.release();
        }
        why = std::string(llm_arch_name(model.arch)) + ": this kind of memory cannot have a KV policy";
    }

    if (!next_is_forced() && !is_draft(model, params)) {
        refuse(why);
    }
    LLAMA_LOG_WARN("refreekv: %s does not apply to this context: %s\n", next_is_forced() ? "REFREEKV_NATIVE_POLICY" : "the KV policy", why.c_str());

    const without_policy without;

    return model.create_memory(params, cparams);
}

} // namespace refreekv
