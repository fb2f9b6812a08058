#pragma once

#include "api/process.h"
#include "cache/cache.h"
#include "cache/full-cache.h"

#include <memory>
#include <utility>

namespace refreekv {

// Where a cache with a policy comes to be. Only the memories that llama_model::create_memory() makes by new_memory() can have
// one: the plain cache, the iSWA cache and the hybrid memory. Without it they have a full_cache in its place. Every other memory, and
// every other cache in these, is upstream's.

// hook of the constructors of llama_kv_cache_iswa and llama_memory_hybrid: the part that can have a policy
template <typename... Args>
std::unique_ptr<llama_kv_cache> make_part(const llama_model & model, const llama_hparams & hparams, Args &&... args) {
    if (open_place::take()) {
        return std::make_unique<cache>(model, hparams, std::forward<Args>(args)...);
    }
    return std::make_unique<full_cache>(model, hparams, std::forward<Args>(args)...);
}

} // namespace refreekv
