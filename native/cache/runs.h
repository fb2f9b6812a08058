#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace refreekv {

// f(i, n) for each run of n cells (or slots), one after the other, from the i-th of the list on; f returns false to stop
template <typename F>
static bool for_runs(const uint32_t * cells, size_t n_cells, F && f) {
    for (size_t i = 0, n = 0; i < n_cells; i += n) {
        n = 1;
        while (i + n < n_cells && cells[i + n] == (uint64_t) cells[i] + n) {
            ++n;
        }
        if (!f(i, n)) {
            return false;
        }
    }
    return true;
}

template <typename F>
static bool for_runs(const std::vector<uint32_t> & cells, F && f) {
    return for_runs(cells.data(), cells.size(), f);
}

} // namespace refreekv
