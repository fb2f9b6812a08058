// What a refreekv_store has in its cold store: the place of each row, and which rows are there.

#include "cache/store.h"

#include "tiers/cold-store.h"
#include "api/error.h"
#include "cache/runs.h"

#include "llama-impl.h"

#include <algorithm>
#include <cinttypes>
#include <cstring>

static const size_t REFREEKV_COLD_PIECE = 64 << 10; // bytes; stays in the processor's cache until it is where it belongs
static const size_t REFREEKV_COLD_GAP   = 4 << 10;  // that are read sooner than a read more is begun

void refreekv_store::make_cold() {
    if (params.cold == REFREEKV_COLD_NONE) {
        return;
    }

    const bool on_host = std::all_of(layers.begin(), layers.end(), [](const layer & l) { return ggml_backend_buft_is_host(l.shape.buft); });
    const bool file    = params.cold == REFREEKV_COLD_FILE || (params.cold == REFREEKV_COLD_AUTO && on_host);

    try {
        cold = file ? std::make_unique<refreekv_cold>(params.cold_dir ? params.cold_dir : ".") : std::make_unique<refreekv_cold>();
    } catch (const std::exception & err) {
        if (params.cold == REFREEKV_COLD_FILE) {
            refreekv_set_error("%s", err.what());
            throw;
        }
        LLAMA_LOG_WARN("refreekv: %s; evicted rows are kept in memory\n", err.what());
        cold = std::make_unique<refreekv_cold>();
    }
}

// the type of K or V in the cold store: the cache's, unless a smaller one was asked for that its rows are whole blocks of
ggml_type refreekv_store::cold_type(const group & g, bool v) const {
    const ggml_type type = cache_type(g, v);

    if (params.cold_type < 0 || ggml_is_quantized(type)) {
        return type;
    }
    return n_embd(g, v) % ggml_blck_size((ggml_type) params.cold_type) == 0 ? (ggml_type) params.cold_type : type;
}

static void refreekv_convert(ggml_type from, const uint8_t * src, ggml_type to, uint8_t * dst, int64_t n_rows, int64_t n_embd) {
    std::vector<float> values(n_rows*n_embd);

    if (from == GGML_TYPE_F32) {
        memcpy(values.data(), src, values.size()*sizeof(float));
    } else {
        ggml_get_type_traits(from)->to_float(src, values.data(), values.size());
    }
    ggml_quantize_chunk(to, values.data(), dst, 0, n_rows, n_embd, nullptr); // to f32, f16 and bf16, too
}

// every cell of every group has a place of its own, K of a group before its V
void refreekv_store::place_cold() {
    uint64_t place = 0;
    for (auto & g : groups) {
        g.cold_place = place;
        g.is_cold.assign(cold ? n_cells : 0, 0);
        place += n_cells*(uint64_t) cold_bytes(g);
    }
    bytes_cold = 0;
    cold_full  = false;
    if (cold) {
        cold->clear();
    }
}

// rows that nobody will ask for again
void refreekv_store::forget_cold(group & g, const std::vector<uint32_t> & cells) {
    if (bytes_cold == 0) {
        return;
    }
    for (uint32_t cell : cells) {
        if (g.is_cold[cell]) {
            g.is_cold[cell] = 0;
            bytes_cold -= cold_bytes(g);
        }
    }
    if (bytes_cold == 0) {
        cold->clear();
    }
}

// Rows of n cells in a row, K and V of each cell after cell. false: no room, and the rest of what is to come is lost, too
bool refreekv_store::put_cold(group & g, uint32_t cell, size_t n, const uint8_t * k, const uint8_t * v) {
    const uint64_t more = n*cold_bytes(g);

    const auto write = [&](bool is_v, const uint8_t * rows) {
        const ggml_type type = cache_type(g, is_v);
        const size_t    row  = cold_row(g, is_v);

        if (cold_type(g, is_v) == type) {
            return cold->write(cold_place(g, cell, is_v), rows, n*row);
        }

        const size_t n_max = std::max<size_t>(1, REFREEKV_COLD_PIECE/row);

        std::vector<uint8_t> smaller(std::min(n_max, n)*row);

        for (size_t i = 0; i < n; i += n_max) {
            const size_t n_piece = std::min(n_max, n - i);

            refreekv_convert(type, rows + i*cache_row(g, is_v), cold_type(g, is_v), smaller.data(), n_piece, n_embd(g, is_v));
            if (!cold->write(cold_place(g, cell + i, is_v), smaller.data(), n_piece*row)) {
                return false;
            }
        }
        return true;
    };

    const bool ok = (params.cold_limit == 0 || bytes_cold + more <= params.cold_limit) && write(false, k) && write(true, v);

    if (ok) {
        std::fill_n(g.is_cold.begin() + cell, n, 1);
        bytes_cold += more;
    } else if (!cold_full.exchange(true)) {
        LLAMA_LOG_WARN("refreekv: no room in the cold store (%" PRIu64 " MiB are there): what does not fit is lost\n", bytes_cold >> 20);
    }

    return ok;
}

// f(i, n, bytes) for the K or V of these cells, which ascend: n of them from the i-th on. Those that lie close together are
// read at once, and what lies between them, too
bool refreekv_store::get_cold(const group & g, bool v, const std::vector<uint32_t> & cells, const std::function<void(size_t, size_t, const uint8_t *)> & f) const {
    const ggml_type type  = cache_type(g, v);
    const size_t    row   = cold_row(g, v);
    const size_t    n_max = std::max<size_t>(1, REFREEKV_COLD_PIECE/row);
    const size_t    n_gap = std::max<size_t>(1, REFREEKV_COLD_GAP/row);

    const bool same = cold_type(g, v) == type;

    // kept, and not cleared: decoding reads many blocks with every token (tiers/faults.cpp)
    thread_local refreekv_bytes bytes;
    thread_local refreekv_bytes larger;

    bytes .resize(n_max*row);
    larger.resize(same ? 0 : n_max*cache_row(g, v));

    for (size_t first = 0, last; first < cells.size(); first = last + 1) {
        last = first;
        while (last + 1 < cells.size() && cells[last + 1] - cells[last] <= n_gap && cells[last + 1] - cells[first] < n_max) {
            ++last;
        }
        if (!cold->read(cold_place(g, cells[first], v), bytes.data(), (cells[last] - cells[first] + 1)*row)) {
            return false;
        }

        refreekv_for_runs(cells.data() + first, last - first + 1, [&](size_t i, size_t n) {
            const uint8_t * rows = bytes.data() + (cells[first + i] - cells[first])*row;
            if (!same) {
                refreekv_convert(cold_type(g, v), rows, type, larger.data(), n, n_embd(g, v));
            }
            f(first + i, n, same ? rows : larger.data());
            return true;
        });
    }

    return true;
}

ggml_type refreekv_store::cache_type(const group & g, bool v) const {
    return v ? g.rows.get_shape().type_v : g.rows.get_shape().type_k;
}

int64_t refreekv_store::n_embd(const group & g, bool v) const {
    return v ? g.rows.get_shape().n_embd_v : g.rows.get_shape().n_embd_k;
}

size_t refreekv_store::cache_row(const group & g, bool v) const {
    return ggml_row_size(cache_type(g, v), n_embd(g, v));
}

size_t refreekv_store::cold_row(const group & g, bool v) const {
    return ggml_row_size(cold_type(g, v), n_embd(g, v));
}

size_t refreekv_store::cold_bytes(const group & g) const {
    return cold_row(g, false) + cold_row(g, true);
}

uint64_t refreekv_store::cold_place(const group & g, uint32_t cell, bool v) const {
    return g.cold_place + (v ? n_cells*(uint64_t) cold_row(g, false) : 0) + cell*(uint64_t) cold_row(g, v);
}

// A sequence in another stream is about to have the cells of this one: first_dst + i for first_src + i.
void refreekv_store::copy_cold(uint32_t first_src, uint32_t first_dst) {
    if (bytes_cold == 0) {
        return;
    }
    for (auto & g : groups) {
        std::vector<uint32_t> cells;
        for (uint32_t i = 0; i < kv_size; ++i) {
            if (g.is_cold[first_src + i]) {
                cells.push_back(first_src + i);
            }
        }

        const auto get = [&](bool v, std::vector<uint8_t> & rows) {
            rows.resize(cells.size()*cache_row(g, v));
            return get_cold(g, v, cells, [&](size_t i, size_t n, const uint8_t * bytes) { memcpy(rows.data() + i*cache_row(g, v), bytes, n*cache_row(g, v)); });
        };

        std::vector<uint8_t> k;
        std::vector<uint8_t> v;

        const bool ok = get(false, k) && get(true, v) && refreekv_for_runs(cells, [&](size_t i, size_t n) {
            return put_cold(g, cells[i] - first_src + first_dst, n, k.data() + i*cache_row(g, false), v.data() + i*cache_row(g, true));
        });
        cold_full = cold_full || !ok;

        if (g.evicted) {
            g.evicted->sketch.copy(first_src, first_dst, kv_size);
            g.evicted->sketch.keep([&](uint32_t cell) { return cell/kv_size != first_dst/kv_size || g.is_cold[cell]; });
        }
    }
}
