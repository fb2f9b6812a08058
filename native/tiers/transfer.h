#pragma once

#include "cache/logical-cells.h"
#include "cache/row-mover.h"
#include "graph/layouts.h"
#include "tiers/cold-rows.h"

#include <cstdint>
#include <future>
#include <vector>

namespace refreekv {

// Rows of a layer on their way to the cold store and back. Works on several layers at once.
class cold_transfer {
public:
    // one_thread: which rows the store has room for depends on the order in which they come
    cold_transfer(const logical_cells & logical, const layouts & lay, row_mover & mover, cold_rows & cold, bool one_thread) :
        logical(logical), lay(lay), mover(mover), cold(cold), one_thread(one_thread) {}

    // memory of one thread, for one layer after the other
    struct lane {
        // rows of a device come to one of these, while those of the layer before are put into the cold store from the other
        refreekv::rows::host_rows rows[2];
        std::future<int32_t>     put;                      // waits for it when it goes
        int32_t                  put_status = REFREEKV_OK; // of those that are done
    };

    // rows that are about to be evicted; cells ascend. Those of a layer with codes, where they came to the host for it, all of them: the
    // codes are made of them. Else nullptr
    const rows::host_rows * put(layer & layer, std::vector<uint32_t> cells, lane & scratch);

    // what is still on its way; put_status says how it went
    static void finish(lane & scratch);

    // the rows of these cells, which ascend, come back; in: memory for them, kept from layer to layer. A refreekv_status
    int32_t get(layer & layer, const std::vector<uint32_t> & cells, rows::host_rows & in);

private:
    const logical_cells & logical;
    const layouts &       lay;
    row_mover &           mover;
    cold_rows &           cold;
    const bool            one_thread;
};

} // namespace refreekv
