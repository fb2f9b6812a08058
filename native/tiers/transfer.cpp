#include "tiers/transfer.h"

#include "api/error.h"
#include "cache/parallel.h"
#include "cache/row-bytes.h"
#include "cache/runs.h"

#include <algorithm>
#include <cstring>
#include <system_error>
#include <utility>

namespace refreekv {

// that rows of one layer pass through, on their way from a device and back: much of the time goes into memory that was never touched
static const uint32_t N_THREADS = 4;

static const size_t PIECE = 64 << 10; // bytes of rows that stay in the processor's cache on their way

const rows::host_rows * cold_transfer::put(layer & layer, std::vector<uint32_t> cells, lane & scratch) {
    if (!cold.exists()) {
        return nullptr;
    }
    const size_t n_all = cells.size();

    // a row never changes: what came back from a file is still there
    cells.erase(std::remove_if(cells.begin(), cells.end(), [&](uint32_t cell) { return cold.has(layer, cell); }), cells.end());

    if (cells.empty()) {
        return nullptr;
    }
    const bool all = cells.size() == n_all;

    std::vector<uint32_t> slots;
    for (uint32_t cell : cells) {
        slots.push_back(layer.res.slot(cell));
    }

    if (!mover.in_place(layer)) {
        mover.read(layer, slots, scratch.rows[0]);

        finish(scratch);
        std::swap(scratch.rows[0], scratch.rows[1]);

        // which rows find room in a store with a limit depends on their order
        const uint32_t n_parts = one_thread ? 1 : N_THREADS;

        const auto put = [this, &layer, &rows = scratch.rows[1], cells = std::move(cells), n_parts]() {
            const size_t n_part = (cells.size() + n_parts - 1)/n_parts;

            return run_parallel(n_parts, n_parts, [&](uint32_t p, uint32_t) {
                const size_t first = std::min(cells.size(), p*n_part);

                for_runs(cells.data() + first, std::min(cells.size() - first, n_part), [&](size_t i, size_t n) {
                    i += first;
                    return cold.put(layer, cells[i], n, rows.k.data() + i*layer.row_size(false), rows.v.data() + i*layer.row_size(true));
                });
                return (int32_t) REFREEKV_OK; // what there is no room for is lost
            });
        };
        // coding is next, and has to know which rows the store has
        try {
            scratch.put = std::async(layer.warm ? std::launch::deferred : std::launch::async, put);
        } catch (const std::system_error &) {
            scratch.put = std::async(std::launch::deferred, put); // no more threads to be had
        }
        if (layer.warm) {
            finish(scratch);
        }
        return layer.warm && all ? &scratch.rows[1] : nullptr;
    }

    const refreekv::row_bytes k(layer.rows.k(), false);
    const refreekv::row_bytes v(layer.rows.v(), layer.rows.get_shape().v_trans);

    const size_t n_max = std::max<size_t>(1, PIECE/(k.row() + v.row()));

    std::vector<uint8_t> rows_k(n_max*k.row());
    std::vector<uint8_t> rows_v(n_max*v.row());

    for_runs(cells, [&](size_t i, size_t n) {
        for (size_t done = 0, n_piece; done < n; done += n_piece) {
            n_piece = std::min(n_max, n - done);

            k.get(slots.data() + i + done, n_piece, rows_k.data());
            v.get(slots.data() + i + done, n_piece, rows_v.data());

            if (!cold.put(layer, cells[i] + done, n_piece, rows_k.data(), rows_v.data())) {
                return false;
            }
        }
        return true;
    });
    return nullptr;
}

void cold_transfer::finish(lane & scratch) {
    if (!scratch.put.valid()) {
        return;
    }
    // its error is another thread's
    if (const int32_t status = scratch.put.get()) {
        set_error("no memory on the way to the cold store");
        scratch.put_status = status;
    }
}

// in: memory for rows on their way to a device, that is kept from layer to layer
int32_t cold_transfer::get(layer & layer, const std::vector<uint32_t> & cells, rows::host_rows & in) {
    const auto no_memory = [&]() {
        set_error("restore: no memory for %zu cells in layer %d", layer.res.n_used() + cells.size(), layer.il);
        return REFREEKV_ERR_MEMORY;
    };
    const auto not_there = [&]() {
        set_error("restore: the cold store cannot be read any more (layer %d)", layer.il);
        return REFREEKV_ERR_STATE;
    };

    std::vector<uint32_t> absent; // those that are not just hidden
    std::vector<uint8_t>  is_absent(logical.size(), 0);
    for (uint32_t cell : cells) {
        if (layer.res.slot(cell) < 0) {
            absent.push_back(cell);
            is_absent[cell] = 1;
        } else {
            layer.res.assign(cell);
        }
    }
    if (absent.empty()) {
        return REFREEKV_OK;
    }

    // in the order of cells, as if nothing had been evicted
    std::vector<uint32_t> order;
    std::vector<uint32_t> slots_now;
    std::vector<uint32_t> slots; // of those that are absent, then
    for (uint32_t cell = 0; cell < logical.size(); ++cell) {
        if (is_absent[cell]) {
            slots.push_back(order.size());
        } else if (layer.res.slot(cell) < 0) {
            continue;
        }
        order.push_back(cell);
        slots_now.push_back(is_absent[cell] ? rows::none : layer.res.slot(cell));
    }
    layer.res.reserve(order.size()); // once rows have moved, nothing may fail before the slots say so

    if (!mover.in_place(layer)) {
        const size_t row_k = layer.row_size(false);
        const size_t row_v = layer.row_size(true);

        in.k.resize(absent.size()*row_k);
        in.v.resize(absent.size()*row_v);

        const size_t n_part = (absent.size() + N_THREADS - 1)/N_THREADS;

        const int32_t status = run_parallel(N_THREADS, N_THREADS, [&](uint32_t p, uint32_t) {
            const size_t first = std::min(absent.size(), p*n_part);

            const std::vector<uint32_t> part(absent.begin() + first, absent.begin() + std::min(absent.size(), first + n_part));

            const bool ok = cold.get(layer, part, [&](size_t i, size_t n, const uint8_t * k, const uint8_t * v) {
                memcpy(in.k.data() + (first + i)*row_k, k, n*row_k);
                memcpy(in.v.data() + (first + i)*row_v, v, n*row_v);
            });

            return ok ? REFREEKV_OK : not_there();
        });
        if (status != REFREEKV_OK) {
            return status;
        }
        if (!mover.move(layer, slots_now, lay.padded(order.size()), in)) {
            return no_memory();
        }
        layer.res.arrange(order);

        return REFREEKV_OK;
    }

    if (!mover.move(layer, slots_now, lay.padded(order.size()))) {
        return no_memory();
    }
    layer.res.arrange(order);
    layer.res.release([&](uint32_t cell) { return is_absent[cell]; }); // until their rows are there

    refreekv::row_bytes rows_k(layer.rows.k(), false);
    refreekv::row_bytes rows_v(layer.rows.v(), layer.rows.get_shape().v_trans);

    const bool ok = cold.get(layer, absent, [&](size_t i, size_t n, const uint8_t * k, const uint8_t * v) {
        rows_k.set(slots.data() + i, n, k);
        rows_v.set(slots.data() + i, n, v);
    });
    if (!ok) {
        return not_there();
    }
    for (uint32_t cell : absent) {
        layer.res.assign(cell); // the free slots, lowest first
    }

    return REFREEKV_OK;
}

} // namespace refreekv
