// The C API by lists of calls, four bytes each: which call, and its arguments, in and out of range. Allocations and writes may be made to fail.

#include "target.h"

static llama_context *                       contexts[2]; // one cache for all sequences; one each
static bytes                                 saved[4];
static std::vector<std::vector<llama_token>> texts;

static const int N_CTX = 512;

std::vector<bytes> setup() {
    const std::string library = folder() + "/library";
    const std::string file    = required("REFREEKV_FUZZ_MODEL");
    const char *      files[] = { file.c_str() };

    for (bool unified : { true, false }) {
        auto *& ctx = contexts[!unified];
        ctx = make_context(unified ? N_CTX : 4*N_CTX, 4, unified);
        refreekv_library_use(ctx, library.c_str(), 1 << 20, files, 1, "", "");
    }
    for (int i = 0; i < 3; ++i) {
        texts.push_back(text_of(i, 400));
    }
    std::vector<bytes> res;
    for (size_t n : { 4, 16, 64 }) {
        std::minstd_rand rng(n);
        res.emplace_back(4*n);
        std::generate(res.back().begin(), res.back().end(), [&]() { return rng() >> 8; });
    }
    return res;
}

static void call(llama_context * ctx, int what, int a, int b, int c) {
    auto * const memory = llama_get_memory(ctx);

    const llama_seq_id seq = a % 4;
    const llama_seq_id any = a - 8;
    const llama_pos    p0  = b*2 - 8;
    const llama_pos    p1  = c*2 - 8;

    std::vector<llama_pos> positions(512);
    std::vector<float>     numbers(1 << 16);

    switch (what) {
        case 0: case 1: case 2: {
            std::vector<llama_token> tokens(std::min(b + 1, N_CTX - 8 - n_tokens(ctx, seq)) > 0 ? std::min(b + 1, N_CTX - 8 - n_tokens(ctx, seq)) : 0);
            for (size_t i = 0; i < tokens.size(); ++i) {
                tokens[i] = 3 + (c + i) % 256;
            }
            if (!tokens.empty()) {
                decode(ctx, seq, tokens);
            }
            break;
        }
        case 3: refreekv_prune(ctx, any); break;
        case 4: refreekv_restore(ctx, any); break;
        case 5:
            for (int i = 0; i < b; ++i) {
                positions[i] = i;
            }
            refreekv_keep(ctx, any, c % 6 - 1, positions.data(), b);
            break;
        case 6: llama_memory_seq_rm(memory, c % 3 ? seq : -1, p0, p1); break;
        case 7: llama_memory_seq_cp(memory, seq, b % 4, c % 2 ? -1 : p0, c % 2 ? -1 : p1); break;
        case 8: llama_memory_seq_keep(memory, seq); break;
        case 9:
            if (llama_memory_can_shift(memory)) {
                llama_memory_seq_add(memory, seq, b, -1, -(c % 8));
            }
            break;
        case 10: saved[seq] = save(ctx, seq); break;
        case 11: llama_state_seq_set_data(ctx, saved[b % 4].data(), saved[b % 4].size(), seq); break;
        case 12: refreekv_protect(ctx, any, p0, p1); break;
        case 13: refreekv_expect(ctx, p0); break;
        case 14: refreekv_prompt(ctx, any, p0); break;
        case 15: refreekv_usable_prefix(ctx, any, b, c); break;
        case 16: {
            const int32_t      at[]    = { c };
            const void * const data[]  = { "state" };
            const size_t       sizes[] = { 5 };
            refreekv_library_keep(ctx, any, texts[b % 3].data(), std::min<int>(c*4, texts[b % 3].size()), at, data, sizes, 1, b % 2);
            break;
        }
        case 17:
            refreekv_library_find(ctx, any, texts[b % 3].data(), texts[b % 3].size(), c, b > 200);
            refreekv_library_open(ctx, seq);
            break;
        case 18: refreekv_get_kept(ctx, any, c % 6 - 1, positions.data(), positions.size()); break;
        case 19: refreekv_read_queries(ctx, any, c % 6 - 1, numbers.data(), positions.data(), 16); break;
        case 20: refreekv_read_keys(ctx, any, c % 6 - 1, numbers.data(), positions.data(), 16); break;
        case 21: refreekv_fail_allocation(c % 5); break;
        case 22: refreekv_fail_cold(c % 5); break;
        case 23: llama_memory_clear(memory, c % 2); break;
        case 24: {
            refreekv_stats      stats;
            refreekv_layer_info layers[4];
            refreekv_get_stats(ctx, &stats, layers, b % 5);
            refreekv_pruned_pos(ctx, any);
            refreekv_is_due(ctx, any);
            break;
        }
        case 25: {
            int32_t shape[3];
            refreekv_read_attention(ctx, any, c % 6 - 1, numbers.data(), numbers.size(), shape);
            break;
        }
        case 26: refreekv_library_key(ctx, any, b % 2); break;
        case 27: {
            char text[64];
            snprintf(text, sizeof(text), "%s/library/%d", folder().c_str(), b);
            refreekv_library_check(text, c % 2);
            break;
        }
    }
}

void run(const uint8_t * data, size_t size) {
    for (size_t i = 0; i + 4 <= size && i < 4*64; i += 4) {
        call(contexts[data[i] >> 7], data[i] % 28, data[i + 1], data[i + 2], data[i + 3]);
    }
    refreekv_fail_allocation(0);
    refreekv_fail_cold(0);
    for (auto * ctx : contexts) { // the next input finds what the first one found, and a text can be read
        llama_memory_clear(llama_get_memory(ctx), true);
        for (llama_seq_id seq = 0; seq < 4; ++seq) {
            refreekv_prompt(ctx, seq, -1);
        }
        if (decode(ctx, 0, { 1, 5 }) != 0) {
            fail("an empty context refuses a batch");
        }
        llama_memory_clear(llama_get_memory(ctx), true);
    }
}

size_t mend(uint8_t *, size_t size) { return size; }
