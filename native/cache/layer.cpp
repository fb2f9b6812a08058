#include "cache/layer.h"

#include <numeric>

namespace refreekv {

std::vector<uint32_t> layer::all_slots() const {
    std::vector<uint32_t> slots(res.n_slots());
    std::iota(slots.begin(), slots.end(), 0);
    return slots;
}

std::vector<uint32_t> layer::used_slots() const {
    std::vector<uint32_t> slots;
    for (uint32_t s = 0; s < res.n_slots(); ++s) {
        if (res.cell(s) >= 0) {
            slots.push_back(s);
        }
    }
    return slots;
}

} // namespace refreekv
