#include "policy.h"

#include <algorithm>

refreekv_policy_fn refreekv_policy_find(int32_t kind) {
    switch (kind) {
        case REFREEKV_POLICY_STREAMING: return refreekv_policy_streaming;
        case REFREEKV_POLICY_REFREEKV:  return refreekv_policy_refreekv;
        default:                        return nullptr;
    }
}

bool refreekv_policy_looks(int32_t kind) {
    return kind == REFREEKV_POLICY_REFREEKV;
}

const char * refreekv_policy_check(const refreekv_params & p) {
    if (!refreekv_policy_find(p.policy) && p.policy != REFREEKV_POLICY_ELASTIC) {
        return "policy: unknown kind";
    }
    if (p.ranking < REFREEKV_RANKING_POSITION || p.ranking > REFREEKV_RANKING_SCORE) {
        return "ranking: valid are position and score";
    }
    if (p.rows < REFREEKV_ROWS_LAST || p.rows > REFREEKV_ROWS_WORST) {
        return "rows: valid are last, mean and worst";
    }
    if (p.measure < REFREEKV_MEASURE_NORM || p.measure > REFREEKV_MEASURE_MASS) {
        return "measure: valid are norm and mass";
    }
    if (p.n_window < 1 || p.n_window > 256) {
        return "n_window: valid are 1 to 256";
    }
    if (p.n_sink < 0 || p.n_recent < 0 || p.n_full_layers < 0 || p.n_min < 0) {
        return "n_sink, n_recent, n_full_layers, n_min: must not be negative";
    }
    if (p.n_pool < 1 || p.n_pool % 2 == 0) {
        return "n_pool: must be odd and positive";
    }
    if (p.n_block < 1) {
        return "n_block: must be positive";
    }
    if (!(p.threshold >= 0.0f && p.threshold <= 1.0f)) {
        return "threshold: valid are 0 to 1";
    }
    if (!(p.mass_floor >= 0.0f && p.mass_floor <= 1.0f)) {
        return "mass_floor: valid are 0 to 1";
    }
    if (p.policy == REFREEKV_POLICY_STREAMING && !(p.budget > 0.0)) {
        return "budget: valid are a fraction in (0, 1] or a count of cells > 1";
    }
    return nullptr;
}

std::vector<uint32_t> refreekv_order_head(const refreekv_params & params, uint32_t n_cells, uint32_t n_recent, const std::vector<uint8_t> & pinned) {
    std::vector<uint32_t> order;
    std::vector<uint8_t>  taken(n_cells, 0);

    const auto take = [&](uint32_t j) {
        if (!taken[j]) {
            taken[j] = 1;
            order.push_back(j);
        }
    };

    const uint32_t n_sink = std::min<uint32_t>(params.n_sink, n_cells);

    for (uint32_t j = 0; j < n_sink; ++j) {
        take(j);
    }
    for (uint32_t j = 0; j < pinned.size(); ++j) {
        if (pinned[j]) {
            take(j);
        }
    }
    for (uint32_t i = 0; i < std::min(n_recent, n_cells); ++i) {
        take(n_cells - 1 - i);
    }

    return order;
}

std::vector<uint32_t> refreekv_cuts(const refreekv_params & params, uint32_t n_cells, uint32_t n_min) {
    std::vector<uint32_t> res;

    const uint32_t n_out = (n_cells - std::min(n_cells, n_min))/params.n_block; // blocks that may leave

    for (uint32_t i = 0; i <= n_out; ++i) {
        res.push_back(n_cells - (n_out - i)*params.n_block);
    }

    return res;
}
