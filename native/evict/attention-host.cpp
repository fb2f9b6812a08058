#include "evict/attention-host.h"

#include <algorithm>

namespace refreekv {

attention_host::attention_host(const float * attn, uint32_t n_head, uint32_t n_rows, uint32_t n_cells) : attn(attn) {
    this->n_head  = n_head;
    this->n_rows  = n_rows;
    this->n_cells = n_cells;
}

bool attention_host::scores(join heads, std::vector<float> & out) {
    std::vector<double> joined(n_cells, 0.0);

    for (uint32_t h = 0; h < n_head; ++h) {
        std::vector<double> sum(n_cells, 0.0);
        for (uint32_t r = 0; r < n_rows; ++r) {
            const float * row = attn + ((size_t) h*n_rows + r)*n_cells;
            for (uint32_t j = 0; j < n_cells; ++j) {
                sum[j] += row[j];
            }
        }
        for (uint32_t j = 0; j < n_cells; ++j) {
            const double mean = sum[j]/n_rows;
            joined[j] = heads == join::MAX ? std::max(joined[j], mean) : joined[j] + mean/n_head;
        }
    }
    out.assign(joined.begin(), joined.end());

    return true;
}

bool attention_host::read(float * out) {
    std::copy_n(attn, (size_t) n_head*n_rows*n_cells, out);

    return true;
}

bool attention_host::block_sums(const std::vector<int32_t> & block, uint32_t n_blocks, bool squared, std::vector<float> & out) {
    out.resize((size_t) n_head*n_rows*n_blocks);

    for (size_t l = 0; l < (size_t) n_head*n_rows; ++l) {
        std::vector<double> sum(n_blocks, 0.0);
        for (uint32_t j = 0; j < n_cells; ++j) {
            if (block[j] >= 0) {
                const double a = attn[l*n_cells + j];
                sum[block[j]] += squared ? a*a : a;
            }
        }
        std::copy(sum.begin(), sum.end(), out.begin() + l*n_blocks);
    }

    return true;
}

} // namespace refreekv
