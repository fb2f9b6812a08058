// H2O (arXiv 2306.14048): half of the budget for the most recent cells, half for the heavy hitters, which have
// accumulated the most attention. There the attention of every query since the first is accumulated, head by head; here
// it is that of the queries in the ring, and the mean of the heads that share their cells.

#include "policies/policy.h"

#include <algorithm>

namespace refreekv {

bool policy_h2o(const refreekv_params & params, refreekv::attention & attn, const std::vector<uint8_t> & pinned, refreekv::selection & res) {
    const uint32_t n        = attn.n_cells;
    const uint32_t n_budget = budget(params, n);

    res.order  = order_head(params, n, std::max(1u, n_budget/2), pinned);
    res.n_keep = cuts(params, n, std::max<uint32_t>(res.order.size(), n_budget)).front();

    std::vector<float> score; // the mean over rows sorts as the sum does
    if (!attn.scores(attention::join::MEAN, score)) {
        return false;
    }
    order_rest(res.order, score);

    return true;
}

} // namespace refreekv
