// Batches are decoded by functions that are called from C and from Python, which nothing can be thrown through: it would end the process.

#include "hooks.h"

#include "api/error.h"
#include "cache/full-cache.h"
#include "cache/store.h"

#include "llama-context.h"

#include <cstdio>

namespace refreekv {

int32_t decode(llama_context * lctx, const std::function<int32_t()> & decode) {
    auto * mem   = lctx->get_memory();
    auto * store = store::of(mem);
    if (!store) {
        const full_cache::change now(full_cache::of(mem));
        return decode(); // as upstream
    }
    llama_pos last[LLAMA_MAX_SEQ]; // that each sequence has now
    for (llama_seq_id s = 0; s < LLAMA_MAX_SEQ && store->valid_seq(s); ++s) {
        last[s] = mem->seq_pos_max(s);
    }

    store->watch_memory();

    int32_t res = -2;
    if (guard([&]() { res = decode(); return (int32_t) REFREEKV_OK; }) == REFREEKV_OK) {
        return res;
    }

    char why[512];
    snprintf(why, sizeof(why), "%s", last_error());

    store->update.forget_jobs();
    for (llama_seq_id s = 0; s < LLAMA_MAX_SEQ && store->valid_seq(s); ++s) {
        // a recurrent state that has gone on cannot go back
        if (!mem->seq_rm(s, last[s] + 1, -1)) {
            mem->seq_rm(s, -1, -1);
        }
    }
    take_error(why); // removing may have left another one

    return -2;
}

} // namespace refreekv
