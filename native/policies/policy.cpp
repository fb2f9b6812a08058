#include "policies/policy.h"

#include <algorithm>
#include <cmath>
#include <map>

namespace refreekv {

const policy * policy_find(int32_t kind) {
    static const std::map<int32_t, policy> table = {
        //                             select            needs_attention  has_budget
        { REFREEKV_POLICY_ELASTIC,   { nullptr,          false,           false } },
        { REFREEKV_POLICY_STREAMING, { policy_streaming, false,           true  } },
        { REFREEKV_POLICY_REFREEKV,  { policy_refreekv,  true,            false } },
        { REFREEKV_POLICY_SNAPKV,    { policy_snapkv,    true,            true  } },
        { REFREEKV_POLICY_H2O,       { policy_h2o,       true,            true  } },
        { REFREEKV_POLICY_PYRAMIDKV, { policy_pyramidkv, true,            true  } },
        { REFREEKV_POLICY_TOP_P,     { policy_top_p,     true,            false } },
        { REFREEKV_POLICY_CALLER,    { nullptr,          true,            false } },
    };
    const auto it = table.find(kind);

    return it == table.end() ? nullptr : &it->second;
}

const char * policy_check(const refreekv_params & p) {
    const auto * policy = policy_find(p.policy);

    if (!policy) {
        return "policy: must be one of enum refreekv_policy_kind";
    }
    if (p.turns < REFREEKV_TURNS_NONE || p.turns > REFREEKV_TURNS_RESTORE) {
        return "turns: must be none, drop or restore";
    }
    if (p.turns != REFREEKV_TURNS_NONE && !policy->select) {
        return "turns: must be none for this policy, which evicts nothing by itself";
    }
    if (p.cold < REFREEKV_COLD_NONE || p.cold > REFREEKV_COLD_FILE) {
        return "cold: must be none, auto, memory or file";
    }
    if (p.cold_type != -1 && p.cold_type != GGML_TYPE_Q8_0) {
        return "cold_type: must be -1 (the cache's) or GGML_TYPE_Q8_0";
    }
    if (p.ranking < REFREEKV_RANKING_POSITION || p.ranking > REFREEKV_RANKING_SCORE) {
        return "ranking: must be position or score";
    }
    if (p.rows < REFREEKV_ROWS_LAST || p.rows > REFREEKV_ROWS_WORST) {
        return "rows: must be last, mean or worst";
    }
    if (p.measure < REFREEKV_MEASURE_NORM || p.measure > REFREEKV_MEASURE_MASS) {
        return "measure: must be norm or mass";
    }
    if (p.pooling < REFREEKV_POOLING_MEAN || p.pooling > REFREEKV_POOLING_MAX) {
        return "pooling: must be mean or max";
    }
    if (p.n_window < 1 || p.n_window > 256) {
        return "n_window: must be 1 to 256";
    }
    if (p.window_step < 1 || p.window_step > p.n_window) {
        return "window_step: must be 1 to n_window";
    }
    if (p.n_sink < 0 || p.n_recent < 0 || p.n_hot < 0 || p.n_full_layers < 0 || p.n_min < 0) {
        return "n_sink, n_recent, n_hot, n_full_layers, n_min: must not be negative";
    }
    if (p.n_pool < 1 || p.n_pool % 2 == 0) {
        return "n_pool: must be odd and positive";
    }
    if (p.n_block < 1) {
        return "n_block: must be positive";
    }
    if (!(p.threshold >= 0.0f && p.threshold <= 1.0f)) {
        return "threshold: must be 0 to 1";
    }
    if (!(p.mass_floor >= 0.0f && p.mass_floor <= 1.0f)) {
        return "mass_floor: must be 0 to 1";
    }
    if (p.beta < 1) {
        return "beta: must be 1 or more";
    }
    if (!(p.theta >= 0.0f && p.theta < 1.0f)) {
        return "theta: must be 0 or more, and below 1";
    }
    if (!(p.max_error >= 0.0f && p.max_error < 1.0f) || (p.max_error > 0.0f && p.theta == 0.0f)) {
        return "max_error: must be 0 or more, and below 1, and needs theta";
    }
    if (!(p.top_p > 0.0f && p.top_p <= 1.0f)) {
        return "top_p: must be above 0 and at most 1";
    }
    if (policy->has_budget && !(p.budget > 0.0)) {
        return "budget: must be a fraction in (0, 1] or a count of cells > 1";
    }
    return nullptr;
}

std::vector<uint32_t> order_head(const refreekv_params & params, uint32_t n_cells, uint32_t n_recent, const std::vector<uint8_t> & pinned) {
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

void order_rest(std::vector<uint32_t> & order, const std::vector<float> & score) {
    std::vector<uint8_t> taken(score.size(), 0);
    for (uint32_t j : order) {
        taken[j] = 1;
    }

    const size_t n_head = order.size();
    for (uint32_t j = 0; j < score.size(); ++j) {
        if (!taken[j]) {
            order.push_back(j);
        }
    }

    std::stable_sort(order.begin() + n_head, order.end(), [&](uint32_t a, uint32_t b) { return score[a] > score[b]; });
}

// out[j] = max of in[j - n/2 .. j + n/2], in O(n_cells)
std::vector<float> max_pool(const std::vector<float> & in, int32_t n_pool) {
    const int32_t n = in.size();
    const int32_t h = n_pool/2;

    std::vector<float>   out(n);
    std::vector<int32_t> queue; // indices of falling values
    size_t head = 0;

    for (int32_t i = 0; i < n + h; ++i) {
        if (i < n) {
            while (queue.size() > head && in[queue.back()] <= in[i]) {
                queue.pop_back();
            }
            queue.push_back(i);
        }
        const int32_t j = i - h;
        if (j >= 0) {
            while (queue[head] < j - h) {
                ++head;
            }
            out[j] = in[queue[head]];
        }
    }

    return out;
}

std::vector<float> mean_pool(const std::vector<float> & in, int32_t n_pool) {
    const int32_t n = in.size();
    const int32_t h = n_pool/2;

    std::vector<double> sum(n + 1, 0.0);
    for (int32_t j = 0; j < n; ++j) {
        sum[j + 1] = sum[j] + in[j];
    }

    std::vector<float> out(n);
    for (int32_t j = 0; j < n; ++j) {
        out[j] = (sum[std::min<int64_t>(n, (int64_t) j + h + 1)] - sum[std::max(0, j - h)])/n_pool;
    }

    return out;
}

uint32_t budget(const refreekv_params & params, uint32_t n_cells) {
    const double n = params.budget <= 1.0 ? std::ceil(params.budget*n_cells - 1e-6) : params.budget; // 0.07 of 100 is 7

    return std::min<double>(n_cells, n);
}

std::vector<uint32_t> cuts(const refreekv_params & params, uint32_t n_cells, uint32_t n_min) {
    std::vector<uint32_t> res;

    const uint32_t n_out = (n_cells - std::min(n_cells, n_min))/params.n_block; // blocks that may leave

    for (uint32_t i = 0; i <= n_out; ++i) {
        res.push_back(n_cells - (n_out - i)*params.n_block);
    }

    return res;
}

} // namespace refreekv
