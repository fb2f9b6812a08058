#pragma once

#include "api/error.h"
#include "cache/store.h"

#include "llama-context.h"

namespace refreekv {

// What the functions of the C API ask of their arguments before they do anything. Each sets the error where it is not so.

// nullptr after setting the error
static inline refreekv::store * get_store(llama_context * ctx) {
    clear_error();

    auto * store = ctx ? store::of(ctx->get_memory()) : nullptr;
    if (!store) {
        set_error("this context has no KV policy");
    }

    return store;
}

static inline bool check_seq(const refreekv::store & store, llama_seq_id seq_id, llama_context * ctx) {
    if (!store.valid_seq(seq_id) || llama_memory_seq_pos_max(ctx->get_memory(), seq_id) < 0) {
        set_error("sequence %d has no tokens", seq_id);
        return false;
    }
    return true;
}

static inline bool check_layer(uint32_t n_layers, int32_t i_layer) {
    if (i_layer < 0 || (uint32_t) i_layer >= n_layers) {
        set_error("i_layer = %d: must be 0 to %u", i_layer, n_layers - 1);
        return false;
    }
    return true;
}

// a context may have no memory at all (embedding models)
static inline llama_memory_t get_memory(llama_context * ctx) {
    clear_error();

    auto * mem = ctx ? ctx->get_memory() : nullptr;
    if (!mem) {
        set_error("this context has no KV cache");
    }

    return mem;
}

} // namespace refreekv
