// SnapKV (arXiv 2404.14469): the window, and before it the cells with the most attention of the window's queries, pooled
// over positions so that neighbours stay together; a fixed budget. There every head chooses for itself; here the heads of
// a layer share their cells, and what is pooled and ranked is their mean.

#include "policies/policy.h"

#include <algorithm>

bool refreekv_select_snapkv(const refreekv_params & params, refreekv_attention & attn, const std::vector<uint8_t> & pinned, uint32_t n_budget, refreekv_selection & res) {
    const uint32_t n = attn.n_cells;

    res.order  = refreekv_order_head(params, n, params.n_window, pinned);
    res.n_keep = refreekv_cuts(params, n, std::max<uint32_t>(res.order.size(), n_budget)).front();

    std::vector<float> score;
    if (!attn.scores(refreekv_attention::join::MEAN, score)) {
        return false;
    }

    // what the window's queries say of each other is not pooled into the cells before it
    score.resize(n - std::min<uint32_t>(n, params.n_window));
    score = params.pooling == REFREEKV_POOLING_MAX ? refreekv_max_pool(score, params.n_pool) : refreekv_mean_pool(score, params.n_pool);
    score.resize(n, 0.0f);

    refreekv_order_rest(res.order, score);

    return true;
}

bool refreekv_policy_snapkv(const refreekv_params & params, refreekv_attention & attn, const std::vector<uint8_t> & pinned, refreekv_selection & res) {
    return refreekv_select_snapkv(params, attn, pinned, refreekv_budget(params, attn.n_cells), res);
}
