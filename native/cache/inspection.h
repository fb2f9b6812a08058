#pragma once

#include "cache/parts.h"

namespace refreekv {

// What tests and research may look at: kept cells, queries, keys, attention (refreekv.h).
class inspection {
public:
    explicit inspection(parts & p) : p(p) {}

    std::vector<llama_pos> kept(llama_seq_id seq_id, uint32_t i_layer) const;

    int32_t read_queries(llama_seq_id seq_id, uint32_t i_layer, float * out, llama_pos * pos, int32_t n_max) const;
    int32_t read_keys   (llama_seq_id seq_id, uint32_t i_layer, float * out, llama_pos * pos, int32_t n_max) const;

    // a refreekv_status
    int32_t read_attention(llama_context * lctx, llama_seq_id seq_id, uint32_t i_layer, float * out, uint64_t n_max, int32_t * shape);

private:
    parts & p;
};

} // namespace refreekv
