#pragma once

#include "../refreekv.h"

#include <cstdint>
#include <vector>

// What a policy may look at: the attention of the last queries of one sequence to the cells that one group of KV heads
// holds of it. Cells are numbered in position order, rows oldest first. Computed on demand.
class refreekv_attention {
public:
    virtual ~refreekv_attention() = default;

    uint32_t n_cells = 0;
    uint32_t n_rows  = 0;
    uint32_t n_head  = 0;

    // out[j]: the maximum over heads of the mean over rows of the attention to cell j
    virtual bool scores(std::vector<float> & out) = 0;

    // out[(h*n_rows + r)*n_blocks + b]: the sum over cells j with block[j] == b of the attention of row r in head h to j,
    // of its square when squared; cells with block[j] < 0 are left out
    virtual bool block_sums(const std::vector<int32_t> & block, uint32_t n_blocks, bool squared, std::vector<float> & out) = 0;
};

// What a policy answers: cells in the order of their importance, and how many of them stay.
struct refreekv_selection {
    std::vector<uint32_t> order;
    uint32_t              n_keep = 0;
};

// One function per policy, one policy per file. pinned[j]: cell j has to stay (empty: none).
// false when the attention could not be computed.
using refreekv_policy_fn = bool (*)(const refreekv_params & params, refreekv_attention & attn, const std::vector<uint8_t> & pinned, refreekv_selection & res);

bool refreekv_policy_streaming(const refreekv_params & params, refreekv_attention & attn, const std::vector<uint8_t> & pinned, refreekv_selection & res);
bool refreekv_policy_refreekv (const refreekv_params & params, refreekv_attention & attn, const std::vector<uint8_t> & pinned, refreekv_selection & res);

// the registry; nullptr: no such policy, or one that evicts nothing
refreekv_policy_fn refreekv_policy_find(int32_t kind);

// whether it looks at attention, and so needs the last queries to be kept
bool refreekv_policy_looks(int32_t kind);

// nullptr when valid, else what is wrong and what is valid
const char * refreekv_policy_check(const refreekv_params & params);

// shared by the policies

// the first n_sink, the pinned cells, then the last n_recent backwards; the rest is left to the policy
std::vector<uint32_t> refreekv_order_head(const refreekv_params & params, uint32_t n_cells, uint32_t n_recent, const std::vector<uint8_t> & pinned);

// the counts at which a ranking may be cut: cells leave in whole blocks, so that all groups of a sequence stay equal
// modulo the graph's padding and grow into the next block at the same token. Ascending, the last is n_cells.
std::vector<uint32_t> refreekv_cuts(const refreekv_params & params, uint32_t n_cells, uint32_t n_min);
