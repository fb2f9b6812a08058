#include "server/library.h"

#include "server/options.h"
#include "server/server.h"
#include "server/turns.h"

#include "common.h"
#include "log.h"

#include <algorithm>

namespace refreekv::server {

static bool g_is_used = false;

// nullptr: a context can have one
static const char * library_refusal(llama_context * ctx, const common_params & params, bool has_draft) {
    const auto * model = llama_get_model(ctx);

    if (llama_model_is_recurrent(model) || llama_model_is_hybrid(model) || llama_model_n_swa(model) > 0) {
        return "the server keeps no states of recurrent layers and of layers with a window";
    }
    if (get_options().when_evicted == evicted::RECOMPUTE) {
        return "evicted is recompute: each prompt is read";
    }
    if (has_draft) {
        return "a draft model reads its prompts itself";
    }
    if (!params.lora_adapters.empty() || !params.control_vectors.empty() || !params.kv_overrides.empty()) {
        return "adapters, control vectors and other metadata change what is read";
    }
    return refreekv_library_refusal(ctx);
}

// of a model that may be divided into several
static std::vector<std::string> files_of(const llama_model * model, const std::string & path) {
    char text[4096] = "";
    llama_model_meta_val_str(model, "split.count", text, sizeof(text));

    const int32_t n = atoi(text);
    if (n < 2 || llama_split_prefix(text, sizeof(text), path.c_str(), 0, n) <= 0) {
        return { path };
    }
    const std::string prefix = text;

    std::vector<std::string> res;
    for (int32_t i = 0; i < n; ++i) {
        llama_split_path(text, sizeof(text), prefix.c_str(), i, n);
        res.push_back(text);
    }
    return res;
}

bool use_library(llama_context * ctx, const common_params & params, bool has_draft) {
    const auto & library = get_options().library;

    g_is_used = false;
    if (library.folder.empty()) {
        return false;
    }
    const char * why = library_refusal(ctx, params, has_draft);
    if (!why) {
        const auto files = files_of(llama_get_model(ctx), params.model.path);

        std::vector<const char *> paths;
        for (const auto & file : files) {
            paths.push_back(file.c_str());
        }
        if (refreekv_library_use(ctx, library.folder.c_str(), library.limit, paths.data(), paths.size(), "", library.evicts_with.c_str()) != REFREEKV_OK) {
            why = refreekv_last_error();
        }
    }
    if (why) {
        LOG_INF("what is read is not kept in the library: %s\n", why);
        return false;
    }
    LOG_INF("what is read is kept in %s (--no-library: it is not), and not in memory (--cache-ram)\n", library.folder.c_str());
    g_is_used = true;
    return true;
}

// without images
static bool is_text(const std::vector<llama_token> & tokens) {
    return std::find(tokens.begin(), tokens.end(), LLAMA_TOKEN_NULL) == tokens.end();
}

int32_t open_from_library(llama_context * ctx, llama_seq_id seq_id, int32_t n_past, const std::vector<llama_token> & prompt) {
    if (!g_is_used || prompt.empty() || !is_text(prompt)) {
        return n_past;
    }
    const int32_t n = refreekv_library_find(ctx, seq_id, prompt.data(), prompt.size() - 1, n_past, false);
    if (n <= 0) {
        return n_past;
    }
    llama_memory_seq_rm(llama_get_memory(ctx), seq_id, -1, -1);
    protect(ctx, seq_id);
    if (refreekv_library_open(ctx, seq_id) != REFREEKV_OK) {
        LOG_INF("slot %d: %s; the prompt is read from its start\n", seq_id, refreekv_last_error());
        return 0;
    }
    return n;
}

void keep_in_library(llama_context * ctx, llama_seq_id seq_id, const std::vector<llama_token> & tokens) {
    if (g_is_used && is_text(tokens)) {
        refreekv_library_keep(ctx, seq_id, tokens.data(), tokens.size(), nullptr, nullptr, nullptr, 0, false); // which logs what is wrong
    }
}

} // namespace refreekv::server
