// The nucleus of the attention, as Twilight (arXiv 2502.02770) takes it: the window, and before it the fewest cells with
// which top_p of the attention is there, on the mean of the window's rows and the layer's heads. No fixed budget. There
// each decoding step looks for its own cells in a cache that stays whole; here the choice is made once.

#include "policies/policy.h"

namespace refreekv {

bool policy_top_p(const refreekv_params & params, refreekv::attention & attn, const std::vector<uint8_t> & pinned, refreekv::selection & res) {
    const uint32_t n = attn.n_cells;

    std::vector<float> score;
    if (!attn.scores(attention::join::MEAN, score)) {
        return false;
    }

    res.order = order_head(params, n, params.n_window, pinned);

    const auto cuts = refreekv::cuts(params, n, res.order.size());

    order_rest(res.order, score);

    // less than 1 where the model has attention sinks of its own
    double all = 0.0;
    for (uint32_t j : res.order) {
        all += score[j];
    }

    double   mass = 0.0;
    uint32_t r    = 0;
    for (uint32_t cut : cuts) {
        for (; r < cut; ++r) {
            mass += score[res.order[r]];
        }
        res.n_keep = cut;
        if (mass >= params.top_p*all) {
            break;
        }
    }

    return true;
}

} // namespace refreekv
