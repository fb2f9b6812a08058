// StreamingLLM (arXiv 2309.17453): the sinks and the most recent cells, a fixed budget. The simplest baseline; it looks
// at no attention.

#include "policies/policy.h"

#include <algorithm>

namespace refreekv {

bool policy_streaming(const refreekv_params & params, refreekv::attention & attn, const std::vector<uint8_t> & pinned, refreekv::selection & res) {
    const uint32_t n = attn.n_cells;

    const uint32_t n_head = order_head(params, n, 1, pinned).size();

    res.order = order_head(params, n, n, pinned);

    res.n_keep = cuts(params, n, std::max(n_head, budget(params, n))).front();

    return true;
}

} // namespace refreekv
