// StreamingLLM (arXiv 2309.17453): the sinks and the most recent cells, a fixed budget. The simplest baseline; it looks
// at no attention.

#include "policies/policy.h"

#include <algorithm>

bool refreekv_policy_streaming(const refreekv_params & params, refreekv_attention & attn, const std::vector<uint8_t> & pinned, refreekv_selection & res) {
    const uint32_t n = attn.n_cells;

    const uint32_t n_head = refreekv_order_head(params, n, 1, pinned).size();

    res.order = refreekv_order_head(params, n, n, pinned);

    res.n_keep = refreekv_cuts(params, n, std::max(n_head, refreekv_budget(params, n))).front();

    return true;
}

void refreekv_select_hot(const refreekv_params & params, uint32_t n_cells, const std::vector<uint8_t> & pinned, refreekv_selection & res) {
    const uint32_t n_min = refreekv_order_head(params, n_cells, params.n_hot, pinned).size();

    res.order  = refreekv_order_head(params, n_cells, n_cells, pinned);
    res.n_keep = refreekv_cuts(params, n_cells, n_min).front();
}
