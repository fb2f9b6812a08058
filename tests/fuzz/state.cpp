// llama_state_seq_set_data(): the state of one sequence. What is accepted is decoded with, and no other sequence may change.

#include "target.h"

static llama_context * ctx;
static witness *       other;

std::vector<bytes> setup() {
    ctx   = make_context(512, 2);
    other = new witness(ctx, 1);

    std::vector<bytes> res;
    decode(ctx, 0, text_of(0, 200));
    res.push_back(save(ctx, 0));
    refreekv_prune(ctx, 0);
    res.push_back(save(ctx, 0));
    decode(ctx, 0, text_of(1, 20));
    res.push_back(save(ctx, 0));
    return res;
}

void run(const uint8_t * data, size_t size) {
    static size_t n = 0;
    if (llama_state_seq_set_data(ctx, data, size, 0) > 0 && n_tokens(ctx, 0) > 0) {
        decode(ctx, 0, { 5 });
    }
    llama_memory_seq_rm(llama_get_memory(ctx), 0, -1, -1);
    refreekv_stats stats;
    refreekv_get_stats(ctx, &stats, nullptr, 0);
    if (stats.n_tokens != 0) {
        fail(std::to_string(stats.n_tokens) + " cells are left");
    }
    if (++n % N_HISTORY == 0) {
        other->check();
    }
}

size_t mend(uint8_t *, size_t size) { return size; }
