#pragma once

#include "cache/parts.h"
#include "library/block-io.h"
#include "library/folder.h"

#include <memory>
#include <string>
#include <vector>

namespace refreekv {

// Texts that were read before, in a folder: what the cache has of a sequence is kept there, and opened in place of reading the same tokens.
class library {
public:
    explicit library(parts & p) : p(p), blocks(p) {}

    struct source {
        std::string              folder;
        uint64_t                 limit;       // bytes of all files
        std::vector<std::string> files;       // of the model, and adapters: the numbers in the cache depend on their contents
        std::string              reads_with;  // what these depend on besides, but for what the context knows
        std::string              evicts_with; // what blocks that are not exact depend on besides the policy's parameters
    };

    // throws std::runtime_error: a file cannot be read, or the folder not be made
    void use(const source & from);

    // nullptr: this cache can be written and opened, else why it cannot
    const char * refusal() const { return blocks.refusal(); }

    // How many of these tokens, from the first on, open() would have the sequence hold; 0: no more than reading is worth, where n_have of
    // them are there already. with_state: only what has a state behind it
    uint32_t find(llama_seq_id seq_id, const std::vector<llama_token> & tokens, uint32_t n_have, bool with_state);

    // The state behind what was found
    const std::string & state() const { return found.state; }

    // The sequence becomes what was found for it. A refreekv_status; after an error, the sequence is empty
    int32_t open(llama_seq_id seq_id);

    struct state_of {
        uint32_t     n_tokens;
        const void * data;
        size_t       size;
    };

    // Writes the sequence, whose tokens these are, and states behind some of them. Returns how many tokens the library has of it now, or a
    // refreekv_status; then it is what it was. States take the place of those that were written of this sequence when it was shorter, unless
    // `stays`
    int32_t keep(llama_seq_id seq_id, const std::vector<llama_token> & tokens, const std::vector<state_of> & states, bool stays);

    // of the last block that keep() has written or found of a sequence; replaced: of the one that was removed for it. "": none
    const char * key_of(llama_seq_id seq_id, bool replaced) const;

private:
    parts &  p;
    block_io blocks;

    std::unique_ptr<folder> dir;

    std::string start; // the key of all texts of this model, with these options
    std::string salt;  // what blocks that are not exact depend on besides

    // what find() has found
    struct {
        llama_seq_id            seq_id   = -1;
        uint32_t                n_tokens = 0;
        std::vector<text_block> chain;
        std::string             state;
    } found;

    // what keep() has written of a sequence
    struct written_text {
        std::string key;      // of the last block
        std::string replaced; // of the block in whose place that came
        text_block  tail; // the last block, if more tokens are to be in it; without tokens: there is none
        std::vector<std::pair<std::vector<llama_token>, std::string>> states; // the tokens before each, and its file
    };
    std::map<llama_seq_id, written_text> kept;

    using chain = std::vector<text_block>;

    uint32_t whole(uint32_t first) const; // tokens in a whole block

    chain find_chain(const std::vector<llama_token> & tokens, uint32_t & n_tokens) const;
    bool  find_state(const chain & blocks, uint32_t & n_tokens);
    chain blocks_of(const std::vector<llama_token> & tokens, uint32_t n_exact) const;

    void write(llama_seq_id seq_id, const text_block & block);

    // whether any was written
    bool keep_states(llama_seq_id seq_id, const std::vector<llama_token> & tokens, const std::vector<state_of> & states, bool stays);
    void replace_tail(written_text & text, const chain & blocks) const;
};

} // namespace refreekv
