#pragma once

// What the fuzz targets share: contexts on a tiny model, the valid inputs that they begin with, and changes that know
// where the interesting numbers are. tests/fuzz/libfuzzer.py builds and runs them.
//
// A target defines setup(), which returns its valid inputs, and run(), which takes one input.

#include "refreekv.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <random>
#include <string>
#include <vector>

extern "C" size_t LLVMFuzzerMutate(uint8_t * data, size_t size, size_t max_size);

using bytes = std::vector<uint8_t>;

std::vector<bytes> setup();
void               run(const uint8_t * data, size_t size);

// A target may mend an input after a change, so that it passes a check that a random change would not pass.
size_t mend(uint8_t * data, size_t size);

inline std::string required(const char * variable) {
    const char * res = getenv(variable);
    if (!res) {
        fprintf(stderr, "%s is not set: run this program by tests/fuzz/libfuzzer.py\n", variable);
        exit(2);
    }
    return res;
}

// The folder of a target's own files.
inline std::string folder() { return required("REFREEKV_FUZZ_FOLDER"); }

inline void write(const std::string & path, const uint8_t * data, size_t size) {
    FILE * const file = fopen(path.c_str(), "wb");
    if (!file || fwrite(data, 1, size, file) != size || fclose(file) != 0) {
        fprintf(stderr, "%s: cannot be written\n", path.c_str());
        exit(2);
    }
}

// The last inputs. A target keeps its context, so what one of them has done may be seen after another one.
inline std::deque<bytes> & history() {
    static std::deque<bytes> res;
    return res;
}

static const size_t N_HISTORY = 64; // every so many inputs a target looks whether a context is still what it was

// Something is wrong. The last inputs are written, in their order: they can be given to the program as they are.
[[noreturn]] inline void fail(const std::string & what) {
    fprintf(stderr, "%s; the last error: %s\n", what.c_str(), refreekv_last_error());
    for (size_t i = 0; i < history().size(); ++i) {
        write(folder() + "/history/" + std::to_string(1000 + i), history()[i].data(), history()[i].size());
    }
    abort();
}

// -- contexts

// The tiny model, which is loaded once.
inline llama_model * model() {
    static llama_model * const res = []() {
        llama_log_set([](ggml_log_level, const char *, void *) {}, nullptr);
        llama_backend_init();
        return llama_model_load_from_file(required("REFREEKV_FUZZ_MODEL").c_str(), llama_model_default_params());
    }();
    return res;
}

// A context whose decoding attends to codes of what was evicted, with a cold store in memory.
inline llama_context * make_context(uint32_t n_ctx, uint32_t n_seq, bool unified = true) {
    auto policy = refreekv_params_default();
    policy.n_min = 0;
    policy.theta = 0.003f;
    policy.cold  = REFREEKV_COLD_MEMORY;
    refreekv_next_context(&policy);

    auto params = llama_context_default_params();
    params.n_ctx           = n_ctx;
    params.n_batch         = 256;
    params.n_ubatch        = 256;
    params.n_seq_max       = n_seq;
    params.n_threads       = 1;
    params.n_threads_batch = 1;
    params.kv_unified      = unified;
    params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_DISABLED;

    auto * const res = llama_init_from_model(model(), params);
    refreekv_forget_next_context();
    if (!res) {
        fprintf(stderr, "no context: %s\n", refreekv_last_error());
        exit(2);
    }
    return res;
}

// Tokens of a text; the same number has the same text.
inline std::vector<llama_token> text_of(int number, size_t n) {
    std::minstd_rand         rng(number + 1);
    std::vector<llama_token> res(n, 1);
    for (size_t i = 1; i < n; ++i) {
        res[i] = 3 + rng() % 256;
    }
    return res;
}

inline int n_tokens(llama_context * ctx, llama_seq_id seq) {
    return llama_memory_seq_pos_max(llama_get_memory(ctx), seq) + 1;
}

// Decode tokens at the end of a sequence, with the logits of the last one. Returns what llama_decode() does.
inline int decode(llama_context * ctx, llama_seq_id seq, const std::vector<llama_token> & tokens) {
    const int   first = n_tokens(ctx, seq);
    llama_batch batch = llama_batch_init(tokens.size(), 0, 1);
    batch.n_tokens    = tokens.size();
    for (size_t i = 0; i < tokens.size(); ++i) {
        batch.token[i]     = tokens[i];
        batch.pos[i]       = first + i;
        batch.n_seq_id[i]  = 1;
        batch.seq_id[i][0] = seq;
        batch.logits[i]    = i + 1 == tokens.size();
    }
    const int res = llama_decode(ctx, batch);
    llama_batch_free(batch);
    return res;
}

inline bytes save(llama_context * ctx, llama_seq_id seq) {
    bytes res(llama_state_seq_get_size(ctx, seq));
    res.resize(llama_state_seq_get_data(ctx, res.data(), res.size(), seq));
    return res;
}

// Another sequence of the context, which no input may change. Its logits are compared with those from before the first input.
class witness {
public:
    witness(llama_context * ctx, llama_seq_id seq) : ctx(ctx), seq(seq) {
        decode(ctx, seq, text_of(7, 150));
        refreekv_prune(ctx, seq);
        state    = save(ctx, seq);
        expected = look();
    }

    // to the rounding of sums, whose order may change with the places of cells
    void check() {
        const auto  found = look();
        const float room  = 1e-3f*std::abs(*std::max_element(expected.begin(), expected.end()));
        for (size_t i = 0; i < found.size(); ++i) {
            if (!(std::abs(found[i] - expected[i]) <= room)) {
                fail("another sequence has changed: logit " + std::to_string(i) + " is " + std::to_string(found[i]) + ", and was " + std::to_string(expected[i]));
            }
        }
    }

private:
    std::vector<float> look() {
        auto * const memory = llama_get_memory(ctx);
        // Rows are cleared, too: a state may have any numbers, and NaN of a cell that was removed counts even with weight 0 until the cell
        // is written anew (as in llama.cpp)
        llama_memory_clear(memory, true);
        refreekv_forget_last_error();
        if (llama_state_seq_set_data(ctx, state.data(), state.size(), seq) != state.size()) {
            fail("a valid state is refused");
        }
        if (const int status = decode(ctx, seq, { 5 })) {
            fail("a batch is refused with " + std::to_string(status));
        }
        const float *      logits = llama_get_logits_ith(ctx, -1);
        std::vector<float> res(logits, logits + llama_vocab_n_tokens(llama_model_get_vocab(model())));
        llama_memory_seq_rm(memory, seq, -1, -1);
        return res;
    }

    llama_context *    ctx;
    llama_seq_id       seq;
    bytes              state;
    std::vector<float> expected;
};

// -- libFuzzer

// GCC inserts a call at each edge, for which libFuzzer has no use any more; it wants counters. An edge has that of its address.
extern "C" void __sanitizer_cov_8bit_counters_init(uint8_t * begin, uint8_t * end);

static uint8_t counters[1 << 16];

extern "C" __attribute__((no_sanitize_coverage)) void __sanitizer_cov_trace_pc() {
    const auto at = (uintptr_t) __builtin_return_address(0);
    ++counters[(at ^ at >> 16) % sizeof(counters)];
}
extern "C" void __sanitizer_cov_trace_cmpf(float, float) {}
extern "C" void __sanitizer_cov_trace_cmpd(double, double) {}

extern "C" int LLVMFuzzerInitialize(int *, char ***) {
    __sanitizer_cov_8bit_counters_init(counters, counters + sizeof(counters));
    const auto seeds = setup();
    for (size_t i = 0; i < seeds.size(); ++i) {
        run(seeds[i].data(), seeds[i].size());
        write(folder() + "/seeds/" + std::to_string(i), seeds[i].data(), seeds[i].size());
    }
    return 0;
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t * data, size_t size) {
    history().emplace_back(data, data + size);
    if (history().size() > N_HISTORY) {
        history().pop_front();
    }
    run(data, size);
    return 0;
}

// Most changes lie near the heads of sections ("RFKV", "RFVV", "RFKC", "RFKW", "RFKB"); the rest is data, of which any is valid.
extern "C" size_t LLVMFuzzerCustomMutator(uint8_t * data, size_t size, size_t max_size, unsigned seed) {
    static const uint64_t NUMBERS[] = { 0, 1, 2, 63, 64, 65, 255, 256, 1 << 15, 1 << 16, INT32_MAX, 1ull << 31, UINT32_MAX, 1ull << 32, INT64_MAX, 1ull << 63, UINT64_MAX };

    std::minstd_rand rng(seed);
    if (size < 16 || rng() % 4 == 0) {
        return mend(data, LLVMFuzzerMutate(data, size, max_size));
    }
    std::vector<size_t> heads = { 0 };
    for (size_t i = 0; i + 4 < size; ++i) {
        if (data[i] == 'R' && data[i + 1] == 'F' && (data[i + 2] == 'K' || data[i + 2] == 'V')) {
            heads.push_back(i);
        }
    }
    for (int left = 1 + (rng() % 4 == 0)*(rng() % 4); left > 0; --left) {
        const size_t at = std::min(heads[rng() % heads.size()] + rng() % 200, size - 8);
        const size_t n  = 1 << rng() % 4; // bytes of the number
        if (rng() % 3 > 0) {
            memcpy(data + at, &NUMBERS[rng() % (sizeof(NUMBERS)/sizeof(NUMBERS[0]))], n);
        } else { // a little more or less
            uint64_t value = 0;
            memcpy(&value, data + at, n);
            value += (int) (rng() % 9) - 4;
            memcpy(data + at, &value, n);
        }
    }
    return mend(data, size);
}
