#pragma once

#include "refreekv.h"
#include "cache/layer.h"
#include "cache/logical-cells.h"

#include <vector>

struct llama_ubatch;

namespace refreekv {

class cold_rows;
class evictor;
class layouts;

// The turns of a conversation, for each sequence by itself: a prompt is read, its answer is generated, the next prompt follows.
// It is asked before each batch what has to be done first.
//
// - A batch belongs to a prompt of a sequence while tokens of it are to come that announce() spoke of. With a mode other than
//   REFREEKV_TURNS_NONE, one with more than 32 tokens of the sequence does, too. Any other belongs to its answer, drafts included.
// - Once such a batch, or the last token that was announced, was read, a pruning is due. The first batch of the answer comes after it, so that the first token
//   of an answer, whose logits are those of the prompt's last token, does not wait. Any pruning of the sequence settles that.
// - The first batch of a prompt comes after what was evicted of the sequence has been restored (REFREEKV_TURNS_RESTORE). A
//   restore is tried once per prompt. Whether or not it works, the prompt is pruned afterwards.
// - While an answer goes on, and decoding attends to codes of what is evicted, cells are evicted a few blocks at a time.
//
// A step that fails is not tried again for the same prompt: the sequence goes on from what the cache holds (updates::run_step).
class turn {
public:
    enum class step { PRUNE, RESTORE };

    struct todo {
        llama_seq_id seq_id;
        step         what;
        uint32_t     n_tokens; // of the batch, which a restore has to leave room for
    };

    // all of them belong to the parts. pruned: see parts::pruned
    turn(const refreekv_params & params, const logical_cells & logical, const std::vector<layer> & layers, const layouts & lay,
         const cold_rows & cold, const evictor & ev, const std::vector<llama_pos> & pruned);

    // the next n_tokens tokens of a sequence are the rest of a prompt. -1: there is none, and no pruning is due
    void announce(llama_seq_id seq_id, int32_t n_tokens);

    uint32_t n_announced() const; // over all sequences

    // a prompt was read, and nothing of the sequence has been pruned since
    bool is_due(llama_seq_id seq_id) const { return seqs[seq_id].due; }

    // What has to be done before this batch. expecting: tokens are to come that belong to no answer. The caller does
    // these steps. Asked again for the same batch, plan() returns nothing: begin_batch() is called before each new batch
    std::vector<todo> plan(const std::vector<llama_ubatch> & ubatches, bool expecting);
    void begin_batch() { planned = false; }

    // tokens are in the cache now
    void apply(const llama_ubatch & ubatch);

    void note_pruned(llama_seq_id seq_id) { seqs[seq_id].due = false; }
    void forget     (llama_seq_id seq_id) { seqs[seq_id] = {}; }
    void shift      (llama_seq_id seq_id) { seqs[seq_id].pruned_at = -1; }
    void copy       (llama_seq_id src, llama_seq_id dst);

private:
    struct sequence {
        uint32_t  n_announced = 0;
        bool      in_prompt   = false; // the batch that was planned last belongs to a prompt of it
        bool      due         = false;
        bool      restored    = false; // for this prompt, or that was tried
        llama_pos pruned_at   = -1;    // its last position when a pruning was planned last: once for each, also where that fails
    };

    const refreekv_params &        params;
    const logical_cells &          logical;
    const std::vector<layer> &     layers;
    const layouts &                lay;
    const cold_rows &              cold;
    const evictor &                ev;
    const std::vector<llama_pos> & pruned;

    std::vector<sequence> seqs; // [LLAMA_MAX_SEQ]
    bool planned = false;       // for this batch

    bool acts() const { return params.turns != REFREEKV_TURNS_NONE; }
    bool must_prune(llama_seq_id seq_id, bool generating) const;
};

} // namespace refreekv
