#pragma once

#include "cache/parts.h"
#include "tiers/restore.h"

#include <functional>

namespace refreekv {

// What upstream's operations on sequences do to a cache with a policy. Where one is refused (false), refreekv_last_error() says why.
class sequences {
public:
    sequences(parts & p, restoration & restore) : p(p), restore(restore) {}

    void clear();
    bool remove(llama_seq_id seq_id, llama_pos p0, llama_pos p1);
    bool copy  (llama_seq_id src, llama_seq_id dst, llama_pos p0, llama_pos p1);
    void keep  (llama_seq_id seq_id);

    // Positions p0 to p1 - 1 of a sequence are about to become to(position). What was evicted of it comes back before: codes and rows of the cold
    // store have their positions in them
    using position_fn = std::function<llama_pos(llama_pos)>;
    bool can_shift() const;
    bool shift(const char * op, llama_seq_id seq_id, llama_pos p0, llama_pos p1, const position_fn & to);

    // whether the last shift() was refused
    bool refused_to_shift() const { return refused_shift; }

    // whether remove() would not refuse, asked before another part of the memory removes the same
    bool may_remove(llama_seq_id seq_id, llama_pos p0, llama_pos p1);

    // the last copy()
    bool refused_to_copy() const { return refused_copy; }

private:
    parts &       p;
    restoration & restore;

    bool refused_copy  = false;
    bool refused_shift = false;

    template <typename F>
    bool for_removed(llama_seq_id seq_id, llama_pos p0, llama_pos p1, F && f) const;
    bool can_remove (llama_seq_id seq_id, llama_pos p0, llama_pos gone0, llama_pos gone1);
    bool may_shift  (const char * op, llama_seq_id seq_id);
    bool may_copy   (llama_seq_id src, llama_seq_id dst, llama_pos p0, llama_pos p1);
    bool copy_stream(llama_seq_id src, llama_seq_id dst); // false: no room, and the error says what for
    void empty_stream(llama_seq_id seq_id);
    bool attends_to_all() const;
};

} // namespace refreekv
