#include "cache/turn.h"

#include "evict/evictor.h"
#include "graph/layouts.h"
#include "tiers/cold-rows.h"

#include "llama-batch.h"

#include <algorithm>
#include <map>

namespace refreekv {

static const uint32_t MAX_ANSWER = 32; // tokens of a sequence in one batch of an answer that is generated with drafts

turn::turn(const refreekv_params & params, const logical_cells & logical, const std::vector<layer> & layers, const layouts & lay,
        const cold_rows & cold, const evictor & ev, const std::vector<llama_pos> & pruned) :
    params(params), logical(logical), layers(layers), lay(lay), cold(cold), ev(ev), pruned(pruned), seqs(logical.n_seq_ids()) {}

void turn::announce(llama_seq_id seq_id, int32_t n_tokens) {
    auto & s = seqs[seq_id];

    s.n_announced = std::max(0, n_tokens);

    if (n_tokens < 0) {
        s.due = false;
    } else if (n_tokens == 0) { // it was there before, and may have been pruned
        s.due = logical.table_of_seq(seq_id).seq_pos_max(seq_id) > pruned[seq_id];
    }
}

uint32_t turn::n_announced() const {
    uint32_t res = 0;
    for (const auto & s : seqs) {
        res += s.n_announced;
    }
    return res;
}

std::vector<turn::todo> turn::plan(const std::vector<llama_ubatch> & ubatches, bool expecting) {
    if (planned) {
        return {};
    }

    uint32_t n_batch = 0;

    std::map<llama_seq_id, uint32_t> n_tokens;
    for (const auto & ubatch : ubatches) {
        n_batch += ubatch.n_tokens;
        for (uint32_t i = 0; i < ubatch.n_tokens; ++i) {
            for (int32_t j = 0; j < ubatch.n_seq_id[i]; ++j) {
                n_tokens[ubatch.seq_id[i][j]]++;
            }
        }
    }

    std::vector<todo> res;

    for (const auto & [seq_id, n] : n_tokens) {
        auto & s = seqs[seq_id];

        s.in_prompt = s.n_announced > 0 || (acts() && n > MAX_ANSWER);

        if (s.in_prompt) {
            if (params.turns == REFREEKV_TURNS_RESTORE && !s.restored && pruned[seq_id] >= 0 && cold.exists()) {
                res.push_back({ seq_id, step::RESTORE, n_batch });
            }
            s.restored = true;
            continue;
        }
        s.restored = false;

        const llama_pos last = logical.table_of_seq(seq_id).seq_pos_max(seq_id);

        if (last >= 0 && s.pruned_at != last && must_prune(seq_id, (n <= MAX_ANSWER || (!acts() && pruned[seq_id] >= 0)) && !expecting)) {
            res.push_back({ seq_id, step::PRUNE, n_batch });
            s.pruned_at = last;
        }
        s.due = s.due && !acts();
    }

    planned = !res.empty();

    return res;
}

// before a batch that belongs to no prompt
bool turn::must_prune(llama_seq_id seq_id, bool generating) const {
    const bool due = acts() && seqs[seq_id].due;

    if (layers.empty() || (!due && (params.n_hot == 0 || !generating))) {
        return false;
    }
    const uint32_t n_min = std::max(0, params.n_min);

    if (due) {
        return logical.of_seq(seq_id).size() >= n_min;
    }

    if (params.n_full_layers >= (int32_t) layers.size()) {
        return false;
    }
    const auto &   layer = layers.back(); // all layers that cells are evicted from hold the same cells
    const uint32_t n_due = 2*lay.padded(params.n_sink + params.n_hot);

    if (layer.res.n_used() < n_due) {
        return false;
    }
    uint32_t n_held = 0; // that may leave
    for (const auto & c : ev.cells_of(seq_id)) {
        n_held += !c.stays && !layer.lacks(c.cell);
    }
    return n_held >= (pruned[seq_id] >= 0 ? n_due : std::max(n_due, n_min));
}

void turn::apply(const llama_ubatch & ubatch) {
    for (uint32_t i = 0; i < ubatch.n_tokens; ++i) {
        for (int32_t j = 0; j < ubatch.n_seq_id[i]; ++j) {
            auto & s = seqs[ubatch.seq_id[i][j]];

            if (s.n_announced > 0) {
                s.n_announced--;
            }
            if (s.in_prompt) {
                s.due       = s.n_announced == 0;
                s.pruned_at = -1;
            }
        }
    }
}

void turn::copy(llama_seq_id src, llama_seq_id dst) {
    seqs[dst]     = {};
    seqs[dst].due = seqs[src].due;
}

} // namespace refreekv
