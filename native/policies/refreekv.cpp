// ReFreeKV (arXiv 2502.16886, section 3) and the parts its variants are made of:
//
//   ranking   position: sinks, then from the last position backwards (the paper's)
//             score:    sinks, recent, then max over heads of the mean attention of the window, max-pooled over positions
//   stop at the shortest prefix of the ranking that loses at most `threshold` of the measure
//   measure   norm: L2 norm of the attention row (the paper's);  mass: its sum;  with or without the sinks
//   rows      last: of the last query, averaged over heads (the paper's)
//             mean: averaged over the window and heads;  worst: every row in every head has to satisfy it
//
// Norm and mass grow with the prefix, so looking only at the allowed cuts finds the shortest prefix rounded up to a cut.

#include "policies/policy.h"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace refreekv {

static bool rank(const refreekv_params & params, refreekv::attention & attn, const std::vector<uint8_t> & pinned, std::vector<uint32_t> & order) {
    const uint32_t n = attn.n_cells;

    if (params.ranking == REFREEKV_RANKING_POSITION) {
        order = order_head(params, n, n, pinned);
        return true;
    }

    std::vector<float> score;
    if (!attn.scores(attention::join::MAX, score)) {
        return false;
    }
    score = max_pool(score, params.n_pool);

    order = order_head(params, n, params.n_recent, pinned);
    order_rest(order, score);

    return true;
}

// the number of blocks to keep; sums: [n_head][n_rows][n_blocks]
static uint32_t stop(const refreekv_params & params, const std::vector<float> & block_sums, uint32_t n_rows, uint32_t n_blocks) {
    // a line is one row in one head
    std::vector<float> sums;
    for (size_t l = 0; l < block_sums.size()/n_blocks; ++l) {
        if (params.rows != REFREEKV_ROWS_LAST || l % n_rows == n_rows - 1) {
            sums.insert(sums.end(), block_sums.begin() + l*n_blocks, block_sums.begin() + (l + 1)*n_blocks);
        }
    }
    const size_t n_lines = sums.size()/n_blocks;

    const bool norm  = params.measure == REFREEKV_MEASURE_NORM;
    const bool worst = params.rows    == REFREEKV_ROWS_WORST;

    const auto measure = [&](double sum) { return norm ? std::sqrt(sum) : sum; };

    std::vector<double> all(n_lines, 0.0);
    double all_mean = 0.0;
    for (size_t l = 0; l < n_lines; ++l) {
        for (uint32_t b = 0; b < n_blocks; ++b) {
            all[l] += sums[l*n_blocks + b];
        }
        all_mean += measure(all[l]);
    }

    // a row whose mass lies in the sinks has next to nothing to lose: the floor keeps the ratio from being noise
    const double floor = norm ? 0.0 : params.mass_floor;

    const auto lost = [&](double kept, double total, double floor) {
        const double d = std::max(total, floor);
        return d > 0.0 ? (total - kept)/d : 0.0;
    };

    std::vector<double> cum(n_lines, 0.0);

    for (uint32_t b = 0; b + 1 < n_blocks; ++b) {
        double kept_mean = 0.0;
        double loss      = 0.0;

        for (size_t l = 0; l < n_lines; ++l) {
            cum[l] += sums[l*n_blocks + b];

            kept_mean += measure(cum[l]);
            loss       = std::max(loss, lost(measure(cum[l]), measure(all[l]), floor));
        }

        if (!worst) {
            loss = lost(kept_mean, all_mean, floor*n_lines);
        }

        if (loss <= params.threshold) {
            return b + 1;
        }
    }

    return n_blocks;
}

bool policy_refreekv(const refreekv_params & params, refreekv::attention & attn, const std::vector<uint8_t> & pinned, refreekv::selection & res) {
    const uint32_t n = attn.n_cells;

    const bool     by_score = params.ranking == REFREEKV_RANKING_SCORE;
    const uint32_t n_min    = order_head(params, n, by_score ? params.n_recent : 1, pinned).size();

    const auto cuts = refreekv::cuts(params, n, std::max(1u, n_min));

    res.n_keep = n;
    if (cuts.size() == 1) {
        res.order.resize(n);
        std::iota(res.order.begin(), res.order.end(), 0);
        return true;
    }

    if (!rank(params, attn, pinned, res.order)) {
        return false;
    }

    // block b: what the ranking adds between cut b - 1 and cut b
    std::vector<int32_t> block(n, -1);
    for (uint32_t r = 0, b = 0; r < n; ++r) {
        b += r >= cuts[b];

        const bool sink = res.order[r] < (uint32_t) params.n_sink;
        if (!sink || params.sinks_in_measure) {
            block[res.order[r]] = b;
        }
    }

    std::vector<float> sums;
    if (!attn.block_sums(block, cuts.size(), params.measure == REFREEKV_MEASURE_NORM, sums)) {
        return false;
    }

    res.n_keep = cuts[stop(params, sums, attn.n_rows, cuts.size()) - 1];

    return true;
}

void select_hot(const refreekv_params & params, uint32_t n_cells, const std::vector<uint8_t> & pinned, refreekv::selection & res) {
    const uint32_t n_min = order_head(params, n_cells, params.n_hot, pinned).size();

    res.order  = order_head(params, n_cells, n_cells, pinned);
    res.n_keep = cuts(params, n_cells, n_min).front();
}

} // namespace refreekv
