#pragma once

#include "refreekv.h"

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace refreekv::server {

// what becomes of evicted rows before the next prompt, as kv_evicted of Llama
enum class evicted { KEEP, RESTORE, RECOMPUTE, DROP };

// what set_policy() was given
struct options {
    refreekv_params params = {};
    std::string     cold_dir; // which params points to
    evicted         when_evicted = evicted::DROP;

    std::vector<std::pair<llama_pos, llama_pos>> protect; // from start to before end

    struct {
        std::string folder; // "": there is none
        uint64_t    limit = 0;
        std::string evicts_with;
    } library;
};

const options & get_options();

// whether a context has a policy, that of set_policy() or one that the environment gave it
bool has_policy(llama_context * ctx);

} // namespace refreekv::server
