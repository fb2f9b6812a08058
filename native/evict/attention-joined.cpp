#include "evict/attention-joined.h"

#include <algorithm>

namespace refreekv {

attention_joined::attention_joined(std::vector<part> parts_) : parts(std::move(parts_)) {
    for (const auto & make : parts) {
        const auto its = make();

        n_cells = its->n_cells;
        n_rows  = its->n_rows;
        n_head += its->n_head;
    }
}

template <typename F>
bool attention_joined::ask(F && f) {
    return std::all_of(parts.begin(), parts.end(), [&](const part & make) {
        const auto its = make();
        const bool ok  = f(*its);

        bytes_read    += its->bytes_read;
        bytes_bounced += its->bytes_bounced;

        return ok;
    });
}

bool attention_joined::scores(join heads, std::vector<float> & out) {
    out.assign(n_cells, 0.0f);

    return ask([&](refreekv::attention & its) {
        std::vector<float> of_one;
        if (!its.scores(heads, of_one)) {
            return false;
        }
        for (uint32_t j = 0; j < n_cells; ++j) {
            out[j] = heads == join::MAX ? std::max(out[j], of_one[j]) : out[j] + of_one[j]*its.n_head/n_head;
        }
        return true;
    });
}

bool attention_joined::read(float * out) {
    return ask([&](refreekv::attention & its) {
        float * const here = out;

        out += (size_t) its.n_head*n_rows*n_cells;
        return its.read(here);
    });
}

bool attention_joined::block_sums(const std::vector<int32_t> & block, uint32_t n_blocks, bool squared, std::vector<float> & out) {
    out.clear();

    return ask([&](refreekv::attention & its) {
        std::vector<float> of_one;
        if (!its.block_sums(block, n_blocks, squared, of_one)) {
            return false;
        }
        out.insert(out.end(), of_one.begin(), of_one.end());
        return true;
    });
}

} // namespace refreekv
