// H2O (arXiv 2306.14048): half of the budget for the most recent cells, half for the heavy hitters, which have
// accumulated the most attention. There the attention of every query since the first is accumulated, head by head; here
// it is that of the queries in the ring, and the mean of the heads that share their cells.

#include "policies/policy.h"

#include <algorithm>

bool refreekv_policy_h2o(const refreekv_params & params, refreekv_attention & attn, const std::vector<uint8_t> & pinned, refreekv_selection & res) {
    const uint32_t n        = attn.n_cells;
    const uint32_t n_budget = refreekv_budget(params, n);

    res.order  = refreekv_order_head(params, n, std::max(1u, n_budget/2), pinned);
    res.n_keep = refreekv_cuts(params, n, std::max<uint32_t>(res.order.size(), n_budget)).front();

    std::vector<float> score; // the mean over rows sorts as the sum does
    if (!attn.scores(refreekv_attention::join::MEAN, score)) {
        return false;
    }
    refreekv_order_rest(res.order, score);

    return true;
}
