#include "api/environment.h"

#include "hooks.h"
#include "cache/store.h"

#include "llama-context.h"

#include <cstdlib>
#include <filesystem>
#include <map>
#include <stdexcept>
#include <string>

namespace refreekv {

static std::string variable(const char * name) {
    const char * value = std::getenv(name);

    return value ? value : "";
}

static refreekv::environment read_environment() {
    const std::map<std::string, refreekv_policy_kind> kinds = {
        { "elastic",   REFREEKV_POLICY_ELASTIC   },
        { "streaming", REFREEKV_POLICY_STREAMING },
        { "refreekv",  REFREEKV_POLICY_REFREEKV  },
    };

    const std::string policy = variable("REFREEKV_NATIVE_POLICY");
    const std::string prune  = variable("REFREEKV_NATIVE_PRUNE");

    if (!prune.empty() && prune != "auto" && prune != "tests") {
        throw std::runtime_error("REFREEKV_NATIVE_PRUNE=" + prune + ": must be auto or tests");
    }

    refreekv::environment res;

    if (policy.empty()) {
        return res;
    }

    const auto it = kinds.find(policy);
    if (it == kinds.end()) {
        throw std::runtime_error("REFREEKV_NATIVE_POLICY=" + policy + ": must be elastic, streaming or refreekv");
    }

    res.has_policy    = true;
    res.prunes        = prune == "tests";
    res.params        = refreekv_params_default();
    res.params.policy = it->second;
    res.params.budget = 0.5;

    if (prune == "auto" && res.params.policy != REFREEKV_POLICY_ELASTIC) {
        static const std::string dir = std::filesystem::temp_directory_path().string();

        res.params.turns    = REFREEKV_TURNS_RESTORE;
        res.params.cold     = REFREEKV_COLD_AUTO;
        res.params.cold_dir = dir.c_str();
        res.params.theta    = res.params.policy == REFREEKV_POLICY_REFREEKV ? 0.003f : 0.0f;
    }
    if (res.prunes) {
        // the prompts of tests are shorter than a block
        res.params.n_min    = 0;
        res.params.n_recent = 8;
        res.params.n_block  = 1;
    }

    return res;
}

const refreekv::environment & get_environment() {
    static const refreekv::environment res = read_environment();

    return res;
}

void after_decode(llama_context * lctx) {
    if (auto * store = store::of(lctx->get_memory())) {
        const auto publish = store->publish_later();

        store->check_memory();

        store->update.prune_read(lctx);
    }
    publish_buffers(lctx);
}

} // namespace refreekv
