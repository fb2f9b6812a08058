#pragma once

#include "cache/parts.h"

namespace refreekv {

// What a sequence has lost comes back from the cold store.
class restoration {
public:
    explicit restoration(parts & p) : p(p) {}

    // Restores a sequence, except positions p0 to p1 - 1, which the caller is about to remove. n_more: tokens that the limit has to have room for afterwards. Cells, or a
    // refreekv_status; throws nothing, since upstream's functions call it
    int64_t run(llama_seq_id seq_id, llama_pos p0 = -1, llama_pos p1 = -1, uint32_t n_more = 0);

private:
    parts & p;

    int32_t restore_rows(const std::vector<std::vector<uint32_t>> & cells); // of each layer; a refreekv_status
    int64_t restore_rows(llama_seq_id seq_id, llama_pos p0, llama_pos p1, uint32_t n_more);
};

} // namespace refreekv
