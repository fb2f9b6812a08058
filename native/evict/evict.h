#pragma once

#include "cache/parts.h"

namespace refreekv {

// An eviction over all layers, and what comes of it.
class eviction {
public:
    explicit eviction(parts & p) : p(p) {}

    // pos: what to keep of layer il; nullptr: the policy decides, in every layer. Cells evicted, or a refreekv_status
    int64_t run(llama_seq_id seq_id, int32_t il, const std::vector<llama_pos> * pos);

private:
    parts & p;

    int64_t evict(llama_seq_id seq_id, int32_t il, const std::vector<llama_pos> * pos);
};

} // namespace refreekv
