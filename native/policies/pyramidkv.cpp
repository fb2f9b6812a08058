// PyramidKV (arXiv 2406.02069): SnapKV whose budgets fall linearly over the layers, with the given one as their mean.
// Beside the window the last layer keeps 1/beta of the mean, and the first as much more; where that is more than there
// is, the first layer is whole and the slope is less.

#include "policies/policy.h"

#include <algorithm>

namespace refreekv {

static uint32_t budget_of_layer(const refreekv_params & params, const refreekv::attention & attn) {
    const uint32_t n_window = std::min<uint32_t>(attn.n_cells, params.n_window);
    const uint32_t n_budget = std::max(n_window, budget(params, attn.n_cells));

    if (attn.n_layer == 1) {
        return n_budget;
    }

    const int64_t n    = attn.n_cells - n_window; // all without the window
    const int64_t mean = n_budget     - n_window;

    // the ends of the slope, in units of 1/unit cells
    int64_t unit  = params.beta;
    int64_t first = mean*(2*unit - 1);
    int64_t last  = mean;

    if (first > n*unit) {
        unit  = 1;
        first = n;
        last  = 2*mean - n;
    }

    const int64_t n_step = attn.n_layer - 1;

    return n_window + (first*n_step - (first - last)*attn.i_layer + unit*n_step - 1)/(unit*n_step); // rounded up
}

bool policy_pyramidkv(const refreekv_params & params, refreekv::attention & attn, const std::vector<uint8_t> & pinned, refreekv::selection & res) {
    return select_snapkv(params, attn, pinned, budget_of_layer(params, attn), res);
}

} // namespace refreekv
