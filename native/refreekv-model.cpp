#include "refreekv-model.h"

#include "refreekv-error.h"
#include "refreekv-store.h"

#include "llama-arch.h"
#include "llama-cparams.h"
#include "llama-memory.h"
#include "llama-model.h"

#include <stdexcept>

// kept in step with the switch of llama_model::create_memory (llama-model.cpp): what is not a plain llama_kv_cache there
// is named here
std::string refreekv_why_not(const llama_model & model) {
    const auto & hparams = model.hparams;

    const std::string name = llm_arch_name(model.arch);

    if (llm_arch_is_recurrent(model.arch)) {
        return name + ": recurrent memory, there is no KV cache to prune";
    }
    if (llm_arch_is_hybrid(model.arch)) {
        return name + ": hybrid memory (attention and recurrent layers) is not supported yet";
    }
    if (hparams.swa_type != LLAMA_SWA_TYPE_NONE) {
        return name + ": sliding-window attention is not supported yet";
    }
    if (hparams.is_mla()) {
        return name + ": multi-head latent attention (MLA) is not supported yet";
    }
    if (hparams.n_pos_per_embd() > 1) {
        return name + ": multi-dimensional positions (M-RoPE) are not supported yet";
    }
    if (!hparams.causal_attn) {
        return name + ": attention is not causal, there is no prompt to prune after";
    }

    if (hparams.router_layer >= 0) {
        return name + ": attention to control tokens selects its adapters, none of it may be evicted";
    }

    switch (model.arch) {
        case LLM_ARCH_DREAM:
        case LLM_ARCH_LLADA:
        case LLM_ARCH_LLADA_MOE:
        case LLM_ARCH_RND1:
            return name + ": diffusion model, it has no KV cache";
        case LLM_ARCH_T5:
        case LLM_ARCH_T5ENCODER:
            return name + ": encoder-decoder models and relative position bias are not supported";
        case LLM_ARCH_WAVTOKENIZER_DEC:
            return name + ": it has no KV cache";
        case LLM_ARCH_MINIMAX_M3:
        case LLM_ARCH_GLM_DSA:
        case LLM_ARCH_DEEPSEEK32:
        case LLM_ARCH_HY_V4:
        case LLM_ARCH_DFLASH:
            return name + ": sparse attention with an index of its own is not supported";
        case LLM_ARCH_GROK:
            return name + ": attention logits with a scaling of their own are not supported yet";
        default:
            return "";
    }
}

void refreekv_check_model(const llama_model & model, const llama_memory_params & params, const llama_cparams & /*cparams*/) {
    if (!refreekv_store::next_params()) {
        return;
    }

    std::string why = refreekv_why_not(model);

    if (why.empty() && params.ctx_type != LLAMA_CONTEXT_TYPE_DEFAULT) {
        why = "contexts of draft heads (MTP) cannot have a KV policy";
    }
    if (why.empty() && model.split_mode() == LLAMA_SPLIT_MODE_TENSOR) {
        why = "split_mode tensor splits the rows of the cache, which cannot have a KV policy yet; valid are layer, row and none";
    }

    if (!why.empty()) {
        refreekv_set_error("%s", why.c_str());
        throw std::runtime_error(why);
    }
}
