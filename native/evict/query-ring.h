#pragma once

#include "llama.h"
#include "ggml-cpp.h"

#include <cstdint>
#include <vector>

struct llama_ubatch;

namespace refreekv {

// The last n_queries queries of every sequence, after RoPE, kept by the decoding graph: what the eviction graph needs to
// know of the past. One tensor per layer, [n_embd_head*n_head, n_queries*n_seq + 1] f16; the last row is for
// queries that are not kept. The query at position p of sequence s lies in row s*n_queries + p % n_queries of every layer.
class query_ring {
public:
    query_ring(uint32_t n_queries, uint32_t n_seq);

    int64_t n_rows() const { return (int64_t) n_queries*n_seq + 1; }

    // how many queries of a ubatch the graph copies: [0, n_rows) fixed by its shape alone
    uint32_t n_copy(const llama_ubatch & ubatch) const;

    // which tokens are copied (I32) and where to (I64), both n_copy long
    void set_input(ggml_tensor * src, ggml_tensor * dst, const llama_ubatch & ubatch) const;

    // a ubatch is about to be computed
    void note(const llama_ubatch & ubatch);

    // ring rows of every step-th of the last n queries of a sequence, counted back from pos_max, oldest first; pos: their
    // positions
    void rows(llama_seq_id seq_id, llama_pos pos_max, uint32_t n, llama_pos step, std::vector<int32_t> & rows, std::vector<llama_pos> & pos) const;

    // seq_id -1: all
    void forget(llama_seq_id seq_id);

private:
    const uint32_t n_queries;
    const uint32_t n_seq;

    std::vector<llama_pos> pos_of_row; // [n_queries*n_seq], -1: none

    int64_t row(llama_seq_id seq_id, llama_pos pos) const;

    // the last tokens of each sequence that are worth a row: (token, row)
    std::vector<std::pair<uint32_t, int64_t>> wanted(const llama_ubatch & ubatch) const;
};

} // namespace refreekv
