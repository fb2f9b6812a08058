// SnapKV (arXiv 2404.14469): the window, and before it the cells with the most attention of the window's queries, pooled
// over positions so that neighbours stay together; a fixed budget. There every head chooses for itself; here the heads of
// a layer share their cells, and what is pooled and ranked is their mean.

#include "policies/policy.h"

#include <algorithm>

namespace refreekv {

bool select_snapkv(const refreekv_params & params, refreekv::attention & attn, const std::vector<uint8_t> & pinned, uint32_t n_budget, refreekv::selection & res) {
    const uint32_t n = attn.n_cells;

    res.order  = order_head(params, n, params.n_window, pinned);
    res.n_keep = cuts(params, n, std::max<uint32_t>(res.order.size(), n_budget)).front();

    std::vector<float> score;
    if (!attn.scores(attention::join::MEAN, score)) {
        return false;
    }

    // what the window's queries say of each other is not pooled into the cells before it
    score.resize(n - std::min<uint32_t>(n, params.n_window));
    score = params.pooling == REFREEKV_POOLING_MAX ? max_pool(score, params.n_pool) : mean_pool(score, params.n_pool);
    score.resize(n, 0.0f);

    order_rest(res.order, score);

    return true;
}

bool policy_snapkv(const refreekv_params & params, refreekv::attention & attn, const std::vector<uint8_t> & pinned, refreekv::selection & res) {
    return select_snapkv(params, attn, pinned, budget(params, attn.n_cells), res);
}

} // namespace refreekv
