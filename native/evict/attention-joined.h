#pragma once

#include "policies/policy.h"

#include <functional>
#include <memory>
#include <vector>

namespace refreekv {

// The attention of several layers of the model to the cells of one layer of the cache, as if their heads were those of one layer. Each
// question is put to one of them after the other, which is made for it, so that one's memory is enough for all.
class attention_joined : public refreekv::attention {
public:
    using part = std::function<std::unique_ptr<refreekv::attention>()>;

    explicit attention_joined(std::vector<part> parts);

    bool scores(join heads, std::vector<float> & out) override;
    bool read(float * out) override;
    bool block_sums(const std::vector<int32_t> & block, uint32_t n_blocks, bool squared, std::vector<float> & out) override;

private:
    const std::vector<part> parts;

    // f(attention) of each of them in turn
    template <typename F>
    bool ask(F && f);
};

} // namespace refreekv
