#pragma once

#include "refreekv.h"

#include <cstdint>
#include <vector>

namespace refreekv {

// What a policy may look at: the attention of the last queries of one sequence to the cells that one layer
// holds of it. Cells are numbered in position order, rows oldest first. Computed on demand.
class attention {
public:
    virtual ~attention() = default;

    uint32_t n_cells = 0;
    uint32_t n_rows  = 0;
    uint32_t n_head  = 0;

    // among the layers that have a cache
    uint32_t i_layer = 0;
    uint32_t n_layer = 1;

    // what came to the host so far: answers to the questions below, and K where it could not be looked at where it is
    uint64_t bytes_read    = 0;
    uint64_t bytes_bounced = 0;

    enum class join { MEAN, MAX };

    // out[j]: the mean over rows of the attention to cell j, joined over heads
    virtual bool scores(join heads, std::vector<float> & out) = 0;

    // the attention itself: out[(h*n_rows + r)*n_cells + j]
    virtual bool read(float * out) = 0;

    // out[(h*n_rows + r)*n_blocks + b]: the sum over cells j with block[j] == b of the attention of row r in head h to j,
    // of its square when squared; cells with block[j] < 0 are left out
    virtual bool block_sums(const std::vector<int32_t> & block, uint32_t n_blocks, bool squared, std::vector<float> & out) = 0;
};

// What a policy answers: cells in the order of their importance, and how many of them stay.
struct selection {
    std::vector<uint32_t> order;
    uint32_t              n_keep = 0;
};

// One function per policy, one policy per file. pinned[j]: cell j has to stay (empty: none).
// false when the attention could not be computed.
//
// A rule knows no positions: cells are numbered in their order, also where some were evicted before. res.order begins with order_head()
// and has each cell once; res.n_keep is one of cuts(), and the pinned cells are among the first n_keep. attn has no rows where the policy
// does not need attention.
using policy_fn = bool (*)(const refreekv_params & params, refreekv::attention & attn, const std::vector<uint8_t> & pinned, refreekv::selection & res);

bool policy_streaming(const refreekv_params & params, refreekv::attention & attn, const std::vector<uint8_t> & pinned, refreekv::selection & res);
bool policy_refreekv (const refreekv_params & params, refreekv::attention & attn, const std::vector<uint8_t> & pinned, refreekv::selection & res);
bool policy_snapkv   (const refreekv_params & params, refreekv::attention & attn, const std::vector<uint8_t> & pinned, refreekv::selection & res);
bool policy_h2o      (const refreekv_params & params, refreekv::attention & attn, const std::vector<uint8_t> & pinned, refreekv::selection & res);
bool policy_pyramidkv(const refreekv_params & params, refreekv::attention & attn, const std::vector<uint8_t> & pinned, refreekv::selection & res);
bool policy_top_p    (const refreekv_params & params, refreekv::attention & attn, const std::vector<uint8_t> & pinned, refreekv::selection & res);

// refreekv.cpp: what stays exact where the rest is attended to by codes (params.n_hot): the sinks, the pinned cells, and the last positions
void select_hot(const refreekv_params & params, uint32_t n_cells, const std::vector<uint8_t> & pinned, refreekv::selection & res);

struct policy {
    policy_fn select;          // nullptr: it evicts nothing by itself
    bool      needs_attention; // so that the last queries have to be kept
    bool      has_budget;      // params.budget says how much it keeps
};

// the policy of a refreekv_policy_kind; nullptr: there is none
const policy * policy_find(int32_t kind);

// nullptr when valid, else what is wrong and what is valid
const char * policy_check(const refreekv_params & params);

// shared by the policies

// the first n_sink, the pinned cells, then the last n_recent backwards; the rest is left to the policy
std::vector<uint32_t> order_head(const refreekv_params & params, uint32_t n_cells, uint32_t n_recent, const std::vector<uint8_t> & pinned);

// appends the cells that are not in the order yet, by falling score; equal scores: the earlier position first
void order_rest(std::vector<uint32_t> & order, const std::vector<float> & score);

// over the n_pool cells around each; beyond the ends there is nothing (for the mean: zeros)
std::vector<float> max_pool (const std::vector<float> & in, int32_t n_pool);
std::vector<float> mean_pool(const std::vector<float> & in, int32_t n_pool);

// params.budget in cells
uint32_t budget(const refreekv_params & params, uint32_t n_cells);

// SnapKV's ranking with n_budget cells to keep: its own budget, or PyramidKV's for the layer
bool select_snapkv(const refreekv_params & params, refreekv::attention & attn, const std::vector<uint8_t> & pinned, uint32_t n_budget, refreekv::selection & res);

// the counts at which a ranking may be cut: cells leave in whole blocks, so that all layers of a sequence stay equal
// modulo the graph's padding and grow into the next block at the same token. Ascending, the last is n_cells.
std::vector<uint32_t> cuts(const refreekv_params & params, uint32_t n_cells, uint32_t n_min);

} // namespace refreekv
