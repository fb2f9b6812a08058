#pragma once

#include "refreekv.h"

#include "json.h"

#include <algorithm>
#include <string>
#include <vector>

// What the patched sources of llama-server call (patches/0012-server.patch). It is part of that program, not of the library, and knows the
// cache by its C API alone. All of it belongs to the one context that the server generates with.
//
// But for the receipts, which are snapshots that any thread may read, the thread of the server's main loop calls it, and never while a
// batch is being decoded.

struct common_params;

namespace refreekv::server {

// The policy of the context that is created next, from the text of --kv-policy: a JSON object with fields of refreekv_params by their
// names, and three of the server's own:
//
//   evicted: "keep", "restore", "recompute" or "drop", as kv_evicted of Llama
//   protect: a list of [start, end] positions
//   library: an object of the arguments `folder`, `limit` and `evicts_with` of refreekv_library_use()
//
// "": none is set, which leaves it to the environment. False after logging what is wrong
bool set_policy(const std::string & text);

// Opens the library, if set_policy() was given one and the model can have it, and logs where it is, or why there is none. has_draft: there is a draft model, too.
// Whether there is one
bool use_library(llama_context * ctx, const common_params & params, bool has_draft);

// Whether cells are evicted: then the server must not move or cut what is in the cache by itself (cache reuse, context shift), since upstream ends
// the process where that is refused
bool evicts(llama_context * ctx);

// of upstream's server_tokens, with LLAMA_TOKEN_NULL in the places of an image
template <typename T>
std::vector<llama_token> all_tokens(const T & tokens) {
    std::vector<llama_token> res;
    for (size_t i = 0; i < tokens.size(); ++i) {
        res.push_back(tokens[i]);
    }
    return res;
}

// The tokens of a slot, of which the first n_shared are those of a prompt, become the first n of the prompt
template <typename T>
void follow(T & tokens, const T & prompt, int n_shared, int n) {
    tokens.keep_first(std::min(n_shared, n));
    for (int i = n_shared; i < n; ++i) {
        tokens.push_back(prompt[i]);
    }
}

// A prompt is about to be read into a sequence, whose first n_past tokens, up to position p_past, it shares. Removes what lies behind, or
// opens more of it from the library (may_open); brings back what was evicted of the rest where the next prompt needs it, and announces the
// prompt. Returns how many tokens of the prompt the sequence has now. in_parts: tokens and positions are the same, so that it can be any
// number of them
int32_t begin_prompt(llama_context * ctx, llama_seq_id seq_id, int32_t n_past, llama_pos p_past, const std::vector<llama_token> & prompt, bool in_parts, bool may_open);

// The slot is done with its request, or was told to stop: a pruning that is due is done now, and the library keeps what was read. tokens: of
// the sequence; the last ones may not have been read
void end_turn(llama_context * ctx, llama_seq_id seq_id, const std::vector<llama_token> & tokens);

// A batch found no room. With a memory_limit, sequences are pruned as far as they were read. Whether that gave back any
bool make_room(llama_context * ctx);

// after each batch: takes the snapshot
void note_decoded(llama_context * ctx);

// of one request
struct receipt {
    int32_t  n_tokens   = -1; // of the slot's sequence; -1: the context has no policy
    int32_t  cells_kept =  0; // of it in the cache, the mean of the layers
    uint64_t bytes_kept =  0; // what they take
    uint64_t bytes_full =  0; // what all of them would take
    double   prune_ms   =  0.0;

    // to the numbers in `timings`, each with kv_ before its name. There is no object in them, since clients take all of them for numbers
    void add_to(common_json & timings) const;
};

receipt get_receipt(llama_seq_id seq_id);

// the same and what each layer holds, for /slots
void add_to_slot(common_json & json, llama_seq_id seq_id);

// native/server/cache.html: draws what /slots and /metrics say
std::string page();

// the whole cache, for /metrics
struct metric {
    std::string name;
    std::string description;
    double      value;
};
std::vector<metric> get_counters();
std::vector<metric> get_gauges();

} // namespace refreekv::server
