#pragma once

#include "llama.h"

#include <cstdint>
#include <string>
#include <vector>

namespace refreekv {

// A text is a chain of blocks. The key of a block is a hash of all that its contents depend on: the key of the block before it and its tokens,
// for the first block the `start` of all texts (a hash of the model and of the options that it reads with). So a prefix that several texts
// share is stored once, and a block never changes.
//
// An *exact* block was read while nothing before it was evicted: it depends on nothing else. The others, of answers and of what follows them,
// were computed with codes in the place of what was evicted. Their keys depend on the options of the policy, too: the `salt`.
//
// Keys are cryptographic hashes, because one library may have the texts of several users. Whoever opens a block compares its tokens with those
// that it wants, too.

static const uint32_t REFREEKV_BLOCK_TOKENS = 256; // in a whole block, which has the sinks besides where it is the first
static const size_t   REFREEKV_KEY_DIGITS   = 40;

struct text_block {
    std::string              key;    // hexadecimal digits
    std::string              parent; // the key of the block before it, or the start
    uint32_t                 first;  // position of its first token
    std::vector<llama_token> tokens;
    bool                     exact;

    uint32_t end() const { return first + tokens.size(); }

    // what its file says of it: key, parent, tokens
    std::string label() const;
};

// the first 160 bits of SHA-256, in hexadecimal digits
std::string hash_of(const std::string & bytes);

// of several numbers, for a hash: equal texts are equal numbers
std::string text_of(const std::vector<double> & numbers);

text_block make_block(const std::string & parent, const std::string & salt, uint32_t first, std::vector<llama_token> tokens);

// of a label; throws std::runtime_error: it is none
text_block read_label(const std::string & label, uint32_t first);

// Tells one model's file from another: a hash of its size, its beginning, and samples of the rest. Throws std::runtime_error: it cannot be read
std::string file_identity(const std::string & path);

} // namespace refreekv
