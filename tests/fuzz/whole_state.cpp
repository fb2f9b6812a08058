// llama_state_set_data(): the state of a context, with all of its sequences. After each input a valid state has to be accepted.

#include "target.h"

static llama_context * ctx;
static bytes           valid;

static bytes save_all() {
    bytes res(llama_state_get_size(ctx));
    res.resize(llama_state_get_data(ctx, res.data(), res.size()));
    return res;
}

std::vector<bytes> setup() {
    ctx = make_context(512, 2);

    std::vector<bytes> res;
    for (llama_seq_id seq : { 0, 1 }) {
        decode(ctx, seq, text_of(seq, seq == 0 ? 200 : 90));
        res.push_back(save_all());
        refreekv_prune(ctx, seq);
        res.push_back(save_all());
    }
    valid = res.back();
    return res;
}

void run(const uint8_t * data, size_t size) {
    static size_t n = 0;
    llama_state_set_data(ctx, data, size);
    for (llama_seq_id seq : { 0, 1 }) {
        if (n_tokens(ctx, seq) > 0) {
            decode(ctx, seq, { 5 });
        }
    }
    if (++n % N_HISTORY == 0 && (llama_state_set_data(ctx, valid.data(), valid.size()) != valid.size() || decode(ctx, 1, { 5 }) != 0)) {
        fail("a valid state is refused, or a batch behind it");
    }
}

size_t mend(uint8_t *, size_t size) { return size; }
