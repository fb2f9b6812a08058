#pragma once

#include "policies/policy.h"

namespace refreekv {

// Attention that the caller already has, [n_head][n_rows][n_cells] (the C API's refreekv_select).
class attention_host : public refreekv::attention {
public:
    attention_host(const float * attn, uint32_t n_head, uint32_t n_rows, uint32_t n_cells);

    bool scores(join heads, std::vector<float> & out) override;
    bool read(float * out) override;
    bool block_sums(const std::vector<int32_t> & block, uint32_t n_blocks, bool squared, std::vector<float> & out) override;

private:
    const float * attn;
};

} // namespace refreekv
