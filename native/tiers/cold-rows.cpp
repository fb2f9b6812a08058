#include "tiers/cold-rows.h"

#include "api/error.h"
#include "cache/runs.h"
#include "tiers/cold-store.h"

#include "llama-impl.h"

#include <algorithm>
#include <cinttypes>
#include <cstring>

namespace refreekv {

static const size_t PIECE = 64 << 10; // bytes; stays in the processor's cache until it is where it belongs
static const size_t GAP   = 4 << 10;  // that are read sooner than another read is begun

cold_rows::cold_rows(const refreekv_params & params, bool on_host, uint32_t n_cells) : type(params.cold_type), limit(params.cold_limit), n_cells(n_cells) {
    if (params.cold == REFREEKV_COLD_NONE) {
        return;
    }

    const bool file = params.cold == REFREEKV_COLD_FILE || (params.cold == REFREEKV_COLD_AUTO && on_host);

    try {
        store = file ? std::make_unique<refreekv_cold>(params.cold_dir ? params.cold_dir : ".") : std::make_unique<refreekv_cold>();
    } catch (const std::exception & err) {
        if (params.cold == REFREEKV_COLD_FILE) {
            refreekv_set_error("%s", err.what());
            throw;
        }
        LLAMA_LOG_WARN("refreekv: %s; evicted rows are kept in memory\n", err.what());
        store = std::make_unique<refreekv_cold>();
    }
}

cold_rows::~cold_rows() = default;

int32_t cold_rows::kind() const {
    return !store ? REFREEKV_COLD_NONE : store->is_file() ? REFREEKV_COLD_FILE : REFREEKV_COLD_MEMORY;
}

// the cache's type, unless a smaller one was asked for that its rows are whole blocks of
ggml_type cold_rows::type_of(const layer & g, bool v) const {
    if (type < 0 || ggml_is_quantized(g.type(v))) {
        return g.type(v);
    }
    return g.n_embd(v) % ggml_blck_size((ggml_type) type) == 0 ? (ggml_type) type : g.type(v);
}

size_t cold_rows::row_size(const layer & g, bool v) const {
    return ggml_row_size(type_of(g, v), g.n_embd(v));
}

uint64_t cold_rows::place_of(const layer & g, uint32_t cell, bool v) const {
    return g.cold_place + (v ? n_cells*(uint64_t) row_size(g, false) : 0) + cell*(uint64_t) row_size(g, v);
}

static void convert(ggml_type from, const uint8_t * src, ggml_type to, uint8_t * dst, int64_t n_rows, int64_t n_embd) {
    std::vector<float> values(n_rows*n_embd);

    if (from == GGML_TYPE_F32) {
        memcpy(values.data(), src, values.size()*sizeof(float));
    } else {
        ggml_get_type_traits(from)->to_float(src, values.data(), values.size());
    }
    ggml_quantize_chunk(to, values.data(), dst, 0, n_rows, n_embd, nullptr); // to f32, f16 and bf16, too
}

void cold_rows::reset(std::vector<layer> & layers) {
    uint64_t place = 0;
    for (auto & g : layers) {
        g.cold_place = place;
        g.is_cold.assign(store ? n_cells : 0, 0);
        place += n_cells*(uint64_t) size_of(g);
    }
    n_bytes = 0;
    is_full = false;
    if (store) {
        store->clear();
    }
}

void cold_rows::forget(layer & g, const std::vector<uint32_t> & cells) {
    if (n_bytes == 0) {
        return;
    }
    for (uint32_t cell : cells) {
        if (g.is_cold[cell]) {
            g.is_cold[cell] = 0;
            n_bytes -= size_of(g);
        }
    }
    if (n_bytes == 0) {
        store->clear();
    }
}

bool cold_rows::write(layer & g, uint32_t cell, size_t n, bool v, const uint8_t * rows) {
    const size_t row = row_size(g, v);

    if (type_of(g, v) == g.type(v)) {
        return store->write(place_of(g, cell, v), rows, n*row);
    }

    const size_t n_max = std::max<size_t>(1, PIECE/row);

    std::vector<uint8_t> smaller(std::min(n_max, n)*row);

    for (size_t i = 0; i < n; i += n_max) {
        const size_t n_piece = std::min(n_max, n - i);

        convert(g.type(v), rows + i*g.row_size(v), type_of(g, v), smaller.data(), n_piece, g.n_embd(v));
        if (!store->write(place_of(g, cell + i, v), smaller.data(), n_piece*row)) {
            return false;
        }
    }
    return true;
}

bool cold_rows::put(layer & g, uint32_t cell, size_t n, const uint8_t * k, const uint8_t * v) {
    const uint64_t more = n*size_of(g);

    const bool ok = (limit == 0 || n_bytes + more <= limit) && write(g, cell, n, false, k) && write(g, cell, n, true, v);

    if (ok) {
        std::fill_n(g.is_cold.begin() + cell, n, 1);
        n_bytes += more;
    } else if (!is_full.exchange(true)) {
        LLAMA_LOG_WARN("refreekv: no room in the cold store (%" PRIu64 " MiB are there): what does not fit is lost\n", n_bytes >> 20);
    }

    return ok;
}

// cells that lie close together are read at once, and what lies between them, too
bool cold_rows::get(const layer & g, bool v, const std::vector<uint32_t> & cells, const rows_fn & f) const {
    const size_t row   = row_size(g, v);
    const size_t n_max = std::max<size_t>(1, PIECE/row);
    const size_t n_gap = std::max<size_t>(1, GAP/row);

    const bool same = type_of(g, v) == g.type(v);

    // kept, and not cleared: decoding reads many blocks with every token (faults.cpp)
    thread_local refreekv_bytes bytes;
    thread_local refreekv_bytes larger;

    bytes .resize(n_max*row);
    larger.resize(same ? 0 : n_max*g.row_size(v));

    for (size_t first = 0, last; first < cells.size(); first = last + 1) {
        last = first;
        while (last + 1 < cells.size() && cells[last + 1] - cells[last] <= n_gap && cells[last + 1] - cells[first] < n_max) {
            ++last;
        }
        if (!store->read(place_of(g, cells[first], v), bytes.data(), (cells[last] - cells[first] + 1)*row)) {
            return false;
        }

        refreekv_for_runs(cells.data() + first, last - first + 1, [&](size_t i, size_t n) {
            const uint8_t * rows = bytes.data() + (cells[first + i] - cells[first])*row;
            if (!same) {
                convert(type_of(g, v), rows, g.type(v), larger.data(), n, g.n_embd(v));
            }
            f(first + i, n, same ? rows : larger.data());
            return true;
        });
    }

    return true;
}

void cold_rows::copy(layer & g, uint32_t first_src, uint32_t first_dst, uint32_t n) {
    if (n_bytes == 0) {
        return;
    }
    std::vector<uint32_t> cells;
    for (uint32_t i = 0; i < n; ++i) {
        if (g.is_cold[first_src + i]) {
            cells.push_back(first_src + i);
        }
    }

    const auto read = [&](bool is_v, std::vector<uint8_t> & rows) {
        const size_t row = g.row_size(is_v);

        rows.resize(cells.size()*row);
        return get(g, is_v, cells, [&](size_t i, size_t n, const uint8_t * bytes) { memcpy(rows.data() + i*row, bytes, n*row); });
    };

    std::vector<uint8_t> k;
    std::vector<uint8_t> v;

    const bool ok = read(false, k) && read(true, v) && refreekv_for_runs(cells, [&](size_t i, size_t n) {
        return put(g, cells[i] - first_src + first_dst, n, k.data() + i*g.row_size(false), v.data() + i*g.row_size(true));
    });
    is_full = is_full || !ok;
}

} // namespace refreekv
