#include "library/library.h"

#include "api/error.h"
#include "api/process.h"
#include "cache/parallel.h"

#include <algorithm>
#include <stdexcept>

namespace refreekv {

static const uint32_t N_MIN      = 64; // tokens; a shorter text is read as quickly as it is opened
static const uint32_t WORTHWHILE = 32; // one part in so many of a prefix has to be new, else the cache goes on from what it has

static const std::string KEY_VERSION = "3";

static bool begins_with(const std::vector<llama_token> & tokens, const std::vector<llama_token> & beginning) {
    return tokens.size() >= beginning.size() && std::equal(beginning.begin(), beginning.end(), tokens.begin());
}

static uint32_t n_common(const std::vector<llama_token> & tokens, size_t first, const text_block & block) {
    uint32_t n = 0;
    while (n < block.tokens.size() && first + n < tokens.size() && tokens[first + n] == block.tokens[n]) {
        ++n;
    }
    return n;
}

// what answers depend on, besides the tokens
static std::string policy_text(const refreekv_params & params) {
    return text_of({
            (double) params.policy, (double) params.ranking, (double) params.rows, (double) params.measure, (double) params.pooling,
            (double) params.sinks_in_measure, (double) params.n_window, (double) params.window_step, (double) params.n_sink,
            (double) params.n_recent, (double) params.n_hot, (double) params.n_full_layers, (double) params.n_pool, (double) params.n_block,
            (double) params.n_min, (double) params.beta, (double) params.threshold, (double) params.mass_floor, (double) params.top_p,
            params.budget, (double) params.memory_limit, (double) params.cold_limit, (double) params.theta, (double) params.max_error });
}

void library::use(const source & from) {
    std::string text = KEY_VERSION + " " + std::to_string(p.params.n_sink) + " " + std::to_string(p.params.cold_type) + " " + from.reads_with;
    for (const auto & layer : p.layers) {
        text += " " + std::to_string(layer.type(false)) + " " + std::to_string(layer.type(true));
    }
    for (const auto & path : from.files) {
        text += " " + file_identity(path);
    }
    dir   = std::make_unique<folder>(from.folder, from.limit);
    start = hash_of(text);
    salt  = hash_of(policy_text(p.params) + from.evicts_with);
}

uint32_t library::whole(uint32_t first) const {
    return REFREEKV_BLOCK_TOKENS + (first == 0 ? p.params.n_sink : 0);
}

// the blocks that have the longest prefix of these tokens, which are not checked yet. Of the last one, a part may be of no use
library::chain library::find_chain(const std::vector<llama_token> & tokens, uint32_t & n_tokens) const {
    const auto children = dir->children();

    const auto length = [](const chain & blocks) { return blocks.empty() ? 0 : blocks.back().end(); };

    const auto is_there = [&](const text_block & block) {
        const auto it = children.find(block.parent);
        return it != children.end() && std::find(it->second.begin(), it->second.end(), block.key) != it->second.end();
    };
    // the whole blocks that follow
    const auto follow = [&](chain blocks, const std::string & kind) {
        for (uint32_t n = length(blocks); n + whole(n) <= tokens.size(); n = length(blocks)) {
            auto block = make_block(blocks.empty() ? start : blocks.back().key, kind, n, { tokens.begin() + n, tokens.begin() + n + whole(n) });
            if (!is_there(block)) {
                break;
            }
            blocks.push_back(std::move(block));
        }
        return blocks;
    };

    chain res;
    n_tokens = 0;

    // ... and the one behind them that has most of the tokens that come next
    const auto consider = [&](const chain & blocks) {
        const uint32_t n  = length(blocks);
        const auto     it = children.find(blocks.empty() ? start : blocks.back().key);

        if (n > n_tokens) {
            res      = blocks;
            n_tokens = n;
        }
        for (const auto & key : it == children.end() ? std::vector<std::string>() : it->second) {
            text_block block;
            if (!dir->read_block(it->first, key, n, salt, block)) {
                continue;
            }
            const uint32_t n_more = n_common(tokens, n, block);
            if (n_more > 0 && n + n_more > n_tokens) {
                res = blocks;
                res.push_back(std::move(block));
                n_tokens = n + n_more;
            }
        }
    };
    const chain exact = follow({}, "");
    consider(exact);
    for (size_t n = exact.size() + 1; n-- > 0;) {
        const chain others = follow({ exact.begin(), exact.begin() + n }, salt);
        if (others.size() > n) {
            consider(others);
        }
    }
    return res;
}

// n_tokens: where the last state is that can be read, n_tokens or before
bool library::find_state(const chain & blocks, uint32_t & n_tokens) {
    const auto there = dir->states();

    for (auto block = blocks.rbegin(); block != blocks.rend(); ++block) {
        const auto it = there.find(block->parent);
        if (it == there.end()) {
            continue;
        }
        const uint32_t end = std::min(n_tokens, block->end());

        for (auto n = it->second.rbegin(); n != it->second.rend(); ++n) {
            if (*n <= block->first || *n > end) {
                continue;
            }
            for (const auto & kind : { std::string(), salt }) {
                const auto part = make_block(block->parent, kind, block->first, { block->tokens.begin(), block->tokens.begin() + (*n - block->first) });
                if (dir->has(dir->path_of_state(part)) && dir->read_state(part, found.state)) {
                    n_tokens = *n;
                    return true;
                }
            }
        }
    }
    return false;
}

uint32_t library::find(llama_seq_id seq_id, const std::vector<llama_token> & tokens, uint32_t n_have, bool with_state) {
    found = {};

    const auto is_worthwhile = [&](uint32_t n) { return n >= N_MIN && n > n_have && n - n_have > n/WORTHWHILE; };

    if (!dir || !is_worthwhile(tokens.size())) {
        return 0;
    }
    uint32_t n = 0;
    chain blocks = find_chain(tokens, n);

    if (!is_worthwhile(n) || (with_state && !find_state(blocks, n)) || !is_worthwhile(n)) {
        return 0;
    }
    while (blocks.back().first >= n) {
        blocks.pop_back();
    }

    std::vector<uint8_t>     good(blocks.size());
    std::vector<std::string> why (blocks.size());
    run_parallel(blocks.size(), p.mover.n_threads(), [&](uint32_t i, uint32_t) {
        good[i] = check_or_remove(dir->path_of(blocks[i]), &blocks[i], why[i]);
        return REFREEKV_OK;
    });
    const size_t n_good = std::find(good.begin(), good.end(), 0) - good.begin();
    if (n_good < blocks.size()) {
        set_error("%s", why[n_good].c_str());
        n = n_good == 0 ? 0 : blocks[n_good - 1].end();
        blocks.resize(n_good);
    }
    if (!is_worthwhile(n) || (with_state && n_good < good.size())) {
        return 0;
    }
    found.seq_id   = seq_id;
    found.n_tokens = n;
    found.chain    = std::move(blocks);

    return n;
}

int32_t library::open(llama_seq_id seq_id) {
    const auto from = std::move(found);
    found = {};

    if (!dir || from.seq_id != seq_id || from.n_tokens == 0) {
        set_error("library: nothing was found for sequence %d", seq_id);
        return REFREEKV_ERR_ARGUMENT;
    }
    std::vector<std::string> paths;
    for (const auto & block : from.chain) {
        paths.push_back(dir->path_of(block));
    }
    const int32_t status = blocks.open(seq_id, paths, from.n_tokens);
    if (status != REFREEKV_OK) {
        p.kv.seq_rm(seq_id, -1, -1); // it may be what it was
        return status;
    }
    uint32_t n_exact = 0;
    for (size_t i = 0; i < from.chain.size(); ++i) {
        n_exact = from.chain[i].exact ? std::min(from.n_tokens, from.chain[i].end()) : n_exact;
    }
    dir->touch(paths);
    p.exact[seq_id] = p.keeps_exact_rows() ? n_exact : 0; // what is read next is read behind rows that were rounded
    kept[seq_id].tail = {};

    return REFREEKV_OK;
}

library::chain library::blocks_of(const std::vector<llama_token> & tokens, uint32_t n_exact) const {
    chain res;

    bool exact = true;
    for (uint32_t n = 0; n < tokens.size();) {
        const uint32_t    end    = std::min<uint32_t>(n + whole(n), tokens.size());
        const std::string parent = res.empty() ? start : res.back().key;

        const auto block_with = [&](const std::string & kind) { return make_block(parent, kind, n, { tokens.begin() + n, tokens.begin() + end }); };

        auto block = block_with("");

        exact = exact && (end <= n_exact || dir->has(dir->path_of(block))); // what was read exactly before is the better one
        res.push_back(exact ? std::move(block) : block_with(salt));
        n = end;
    }
    return res;
}

void library::write(llama_seq_id seq_id, const text_block & block) {
    const auto     temporary = dir->temporary();
    const uint32_t n_before  = block.first == 0 ? std::min<uint32_t>(p.params.n_sink, block.tokens.size()) : 0;

    try {
        if (blocks.write(seq_id, block.first, block.tokens.size(), n_before, block.label(), temporary) != REFREEKV_OK) {
            throw std::runtime_error(last_error());
        }
        dir->rename(temporary, dir->path_of(block));
    } catch (...) {
        remove_file(temporary);
        throw;
    }
}

int32_t library::keep(llama_seq_id seq_id, const std::vector<llama_token> & read, const std::vector<state_of> & states, bool stays) {
    const uint32_t n_there = std::max(0, p.logical.table_of_seq(seq_id).seq_pos_max(seq_id) + 1);

    const std::vector<llama_token> tokens(read.begin(), read.begin() + std::min<size_t>(read.size(), n_there));

    auto & text = kept[seq_id];
    text.replaced.clear();
    text.key.clear();

    // a state may be of another model, which its bytes do not say
    if (!dir || tokens.size() < N_MIN || p.loaded[seq_id]) {
        return 0;
    }
    chain blocks = blocks_of(tokens, p.exact[seq_id]);
    chain written;
    try {
        uint64_t n_bytes = 0; // of this text
        for (size_t i = 0; i < blocks.size(); ++i) {
            const auto its = dir->path_of(blocks[i]);

            const bool is_new = !dir->has(its);
            // a block that was opened and is gone now may have been damaged: it is not written again with what was read from it
            if (is_new && this->blocks.came_from_blocks(seq_id, blocks[i].first, blocks[i].tokens.size())) {
                blocks.resize(i);
                break;
            }
            if (is_new) {
                write(seq_id, blocks[i]);
                written.push_back(blocks[i]);
            }
            n_bytes += dir->size(its);
            if (n_bytes > dir->get_limit()) {
                if (is_new) {
                    remove_file(its);
                    written.pop_back();
                }
                blocks.resize(i);
            }
        }
        if (blocks.empty() && n_bytes == 0) {
            return 0;
        }
        if (blocks.empty()) {
            throw std::runtime_error("there is no room for one block within its limit of " + std::to_string(dir->get_limit()) + " bytes");
        }
        std::vector<std::string> paths;
        for (const auto & block : blocks) {
            paths.push_back(dir->path_of(block));
        }
        dir->touch(paths);
        const bool has_states = keep_states(seq_id, { tokens.begin(), tokens.begin() + blocks.back().end() }, states, stays);
        if (!written.empty()) {
            replace_tail(text, blocks);
        }
        if (!written.empty() || has_states) {
            dir->trim();
        }
        text.key = blocks.back().key;
    } catch (const std::exception & err) {
        for (const auto & block : written) { // a full disk needs the room
            remove_file(dir->path_of(block));
        }
        set_error("library: %s", std::string(err.what()).c_str());
        return REFREEKV_ERR_STATE;
    }
    return blocks.back().end();
}

const char * library::key_of(llama_seq_id seq_id, bool replaced) const {
    const auto it = kept.find(seq_id);

    return it == kept.end() ? "" : (replaced ? it->second.replaced : it->second.key).c_str();
}

bool library::keep_states(llama_seq_id seq_id, const std::vector<llama_token> & tokens, const std::vector<state_of> & states, bool stays) {
    auto & before = kept[seq_id].states;

    bool res = false;

    std::vector<std::pair<std::vector<llama_token>, std::string>> now;
    for (const auto & s : states) {
        if (s.n_tokens < N_MIN || s.n_tokens > tokens.size()) {
            continue;
        }
        const std::vector<llama_token> its(tokens.begin(), tokens.begin() + s.n_tokens);

        const auto block = blocks_of(its, std::min<uint32_t>(p.exact[seq_id], s.n_tokens)).back();
        const auto path  = dir->path_of_state(block);
        if (!dir->has(path)) {
            dir->write_state(block, s.data, s.size);
            res = true;
        } else {
            dir->touch({ path });
            if (std::find(before.begin(), before.end(), std::make_pair(its, path)) == before.end()) {
                continue; // others may want it to stay
            }
        }
        now.emplace_back(its, path);
    }
    for (const auto & s : before) {
        if (!begins_with(tokens, s.first)) {
            now.push_back(s);
        } else if (std::find(now.begin(), now.end(), s) == now.end()) {
            remove_file(s.second);
        }
    }
    before = std::move(now);
    if (stays) {
        before.clear();
    }
    return res;
}

// the last block that was written is of no use once one with more tokens has its place
void library::replace_tail(written_text & text, const chain & blocks) const {
    const auto & tail = text.tail;

    const bool is_replaced = !tail.tokens.empty() && std::any_of(blocks.begin(), blocks.end(), [&](const text_block & block) {
        return block.parent == tail.parent && block.key != tail.key && begins_with(block.tokens, tail.tokens);
    });
    if (is_replaced) {
        remove_file(dir->path_of(tail));
        text.replaced = tail.key;
    }
    const auto & last = blocks.back();
    text.tail = last.tokens.size() == whole(last.first) ? text_block {} : last;
}

} // namespace refreekv
