#include "tiers/cold-rows.h"

#include "api/error.h"
#include "cache/runs.h"
#include "tiers/cold-store.h"

#include "llama-hparams.h"
#include "llama-impl.h"

#include <algorithm>
#include <cinttypes>
#include <cstring>

namespace refreekv {

static const size_t PIECE = 64 << 10; // bytes; stays in the processor's cache until it is where it belongs
static const size_t GAP   = 4 << 10;  // that are read sooner than another read is begun

cold_rows::cold_rows(const refreekv_params & params, const llama_hparams & hparams, bool on_host, uint32_t n_cells) : hparams(hparams), by_heads(params.theta > 0.0f), type(params.cold_type), limit(params.cold_limit), n_cells(n_cells) {
    if (params.cold == REFREEKV_COLD_NONE) {
        return;
    }

    const bool file = params.cold == REFREEKV_COLD_FILE || (params.cold == REFREEKV_COLD_AUTO && on_host);

    try {
        store = file ? std::make_unique<cold_store>(params.cold_dir ? params.cold_dir : ".") : std::make_unique<cold_store>();
    } catch (const std::exception & err) {
        if (params.cold == REFREEKV_COLD_FILE) {
            set_error("%s", err.what());
            throw;
        }
        LLAMA_LOG_WARN("refreekv: %s; evicted rows are kept in memory\n", err.what());
        store = std::make_unique<cold_store>();
    }
}

cold_rows::~cold_rows() = default;

int32_t cold_rows::kind() const {
    return !store ? REFREEKV_COLD_NONE : store->is_file() ? REFREEKV_COLD_FILE : REFREEKV_COLD_MEMORY;
}

// the cache's type, unless a smaller one was asked for that its rows are whole blocks of
ggml_type cold_rows::type_of(const layer & g, bool v) const {
    if (type < 0 || ggml_is_quantized(g.type(v)) || (v && !g.has_v())) {
        return g.type(v);
    }
    // where single heads are read, each is whole blocks
    const int64_t n = !by_heads ? g.n_embd(v) : v ? hparams.n_embd_head_v(g.il) : hparams.n_embd_head_k(g.il);

    return n % ggml_blck_size((ggml_type) type) == 0 ? (ggml_type) type : g.type(v);
}

size_t cold_rows::row_size(const layer & g, bool v) const {
    return ggml_row_size(type_of(g, v), g.n_embd(v));
}

bool cold_rows::readable() const {
    return store && store->readable();
}

bool cold_rows::in_memory() const {
    return store && !store->is_file();
}

void cold_rows::share_by(ggml_backend_buffer_type_t buft, std::function<void()> wait) {
    store->share_by(buft, std::move(wait));
}

uint64_t cold_rows::shared_address(const layer & g, uint32_t cell) const {
    if (!store || g.is_cold[cell] != OWN) {
        return 0;
    }
    const auto address = (uint64_t) (uintptr_t) store->shared_address(place_of(g, cell), g.record.bytes());

    return address%4 == 0 ? address : 0; // as kernels read it
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
        // 0 where a head is no whole number of blocks of its type
        const auto head = [&](bool v) {
            const int64_t n = !v ? hparams.n_embd_head_k(g.il) : g.has_v() ? hparams.n_embd_head_v(g.il) : 0;

            return n % ggml_blck_size(type_of(g, v)) == 0 ? ggml_row_size(type_of(g, v), n) : 0;
        };
        g.record = { row_size(g, false), row_size(g, true), hparams.n_head_kv(g.il), head(false), head(true) };

        g.cold_place = place;
        g.is_cold.assign(store ? n_cells : 0, 0);
        place += n_cells*(uint64_t) g.record.bytes();
    }
    n_bytes    = 0;
    n_attached = 0;
    is_full    = false;
    if (store) {
        store->clear();
    }
}

void cold_rows::forget(layer & g, const std::vector<uint32_t> & cells) {
    if (!any()) {
        return;
    }
    const size_t size = g.record.bytes();

    for_runs(cells, [&](size_t i, size_t n) {
        const auto end = g.is_cold.begin() + cells[i] + n;

        for (auto it = g.is_cold.begin() + cells[i], next = it; it != end; it = next) {
            const uint8_t where = *it;
            next = std::find_if(it, end, [&](uint8_t other) { return other != where; });

            const size_t n_same = next - it;
            if (where == OWN) {
                n_bytes -= n_same*size;
            } else if (where == ATTACHED) {
                store->detach(place_of(g, it - g.is_cold.begin()), n_same*size);
                n_attached -= n_same;
            }
            std::fill(it, next, 0);
        }
        return true;
    });
    if (!any()) {
        store->clear();
    }
}

void cold_rows::forget_copies(layer & g, std::vector<uint32_t> cells) {
    if (store->is_file()) {
        return;
    }
    cells.erase(std::remove_if(cells.begin(), cells.end(), [&](uint32_t cell) { return g.is_cold[cell] != OWN; }), cells.end());
    forget(g, cells);
}

void cold_rows::attach(layer & g, uint32_t cell, size_t n, const std::shared_ptr<const file> & in, uint64_t at) {
    store->attach(place_of(g, cell), n*g.record.bytes(), in, at);
    std::fill_n(g.is_cold.begin() + cell, n, ATTACHED);
    n_attached += n;
}

void cold_rows::pack(const layer & g, size_t n, const uint8_t * k, const uint8_t * v, uint8_t * records) const {
    std::vector<uint8_t> smaller[2];

    const auto rows = [&](bool is_v) {
        const uint8_t * src = is_v ? v : k;
        if (type_of(g, is_v) == g.type(is_v)) {
            return src;
        }
        smaller[is_v].resize(n*row_size(g, is_v));
        convert(g.type(is_v), src, type_of(g, is_v), smaller[is_v].data(), n, g.n_embd(is_v));

        return (const uint8_t *) smaller[is_v].data();
    };
    g.record.join(rows(false), rows(true), n, records);
}

bool cold_rows::read(const layer & g, uint32_t cell, size_t n, uint8_t * records) const {
    return store->read(place_of(g, cell), records, n*g.record.bytes());
}

bool cold_rows::write(const layer & g, uint32_t cell, size_t n, const uint8_t * k, const uint8_t * v) {
    const size_t size  = g.record.bytes();
    const size_t n_max = std::min(n, std::max<size_t>(1, PIECE/size));

    std::vector<uint8_t> records(n_max*size);

    for (size_t i = 0; i < n; i += n_max) {
        const size_t n_piece = std::min(n_max, n - i);

        pack(g, n_piece, k + i*g.row_size(false), v + i*g.row_size(true), records.data());

        if (!store->write(place_of(g, cell + i), records.data(), n_piece*size)) {
            return false;
        }
    }
    return true;
}

bool cold_rows::put(layer & g, uint32_t cell, size_t n, const uint8_t * k, const uint8_t * v) {
    const uint64_t more = n*g.record.bytes();

    const bool ok = (limit == 0 || n_bytes + more <= limit) && write(g, cell, n, k, v);

    if (ok) {
        std::fill_n(g.is_cold.begin() + cell, n, OWN);
        n_bytes += more;
    } else if (!is_full.exchange(true)) {
        LLAMA_LOG_WARN("refreekv: no room in the cold store (%" PRIu64 " MiB are there): what does not fit is lost\n", n_bytes >> 20);
    }

    return ok;
}

// cells that lie close together come with one read, and what lies between them, too
bool cold_rows::get(const layer & g, const std::vector<uint32_t> & cells, const rows_fn & f) const {
    const size_t size  = g.record.bytes();
    const size_t n_max = std::max<size_t>(1, PIECE/size);
    const size_t n_gap = std::max<size_t>(1, GAP/size);

    // a read of what lies between two cells fails where the store has no row there
    const auto are_there = [&](uint32_t from, uint32_t to) { return std::find(g.is_cold.begin() + from, g.is_cold.begin() + to, 0) == g.is_cold.begin() + to; };

    refreekv::bytes records;
    refreekv::bytes rows  [2];
    refreekv::bytes larger[2]; // where the cold store's type is a smaller one than the cache's

    records.resize(n_max*size);
    for (bool v : { false, true }) {
        rows  [v].resize(n_max*row_size(g, v));
        larger[v].resize(type_of(g, v) == g.type(v) ? 0 : n_max*g.row_size(v));
    }

    for (size_t first = 0, last; first < cells.size(); first = last + 1) {
        last = first;
        while (last + 1 < cells.size() && cells[last + 1] - cells[last] <= n_gap && cells[last + 1] - cells[first] < n_max && are_there(cells[last], cells[last + 1])) {
            ++last;
        }
        if (!store->read(place_of(g, cells[first]), records.data(), (cells[last] - cells[first] + 1)*size)) {
            return false;
        }

        for_runs(cells.data() + first, last - first + 1, [&](size_t i, size_t n) {
            g.record.split(records.data() + (cells[first + i] - cells[first])*size, n, rows[0].data(), rows[1].data());

            const auto as_cached = [&](bool v) {
                if (type_of(g, v) == g.type(v)) {
                    return rows[v].data();
                }
                convert(type_of(g, v), rows[v].data(), g.type(v), larger[v].data(), n, g.n_embd(v));
                return larger[v].data();
            };
            f(first + i, n, as_cached(false), as_cached(true));
            return true;
        });
    }

    return true;
}

void cold_rows::copy(layer & g, uint32_t first_src, uint32_t first_dst, uint32_t n) {
    if (!any()) {
        return;
    }
    std::vector<uint32_t> cells;
    for (uint32_t i = 0; i < n; ++i) {
        if (g.is_cold[first_src + i]) {
            cells.push_back(first_src + i);
        }
    }

    const size_t row_k = g.row_size(false);
    const size_t row_v = g.row_size(true);

    std::vector<uint8_t> k(cells.size()*row_k);
    std::vector<uint8_t> v(cells.size()*row_v);

    const bool got = get(g, cells, [&](size_t i, size_t n, const uint8_t * rows_k, const uint8_t * rows_v) {
        memcpy(k.data() + i*row_k, rows_k, n*row_k);
        memcpy(v.data() + i*row_v, rows_v, n*row_v);
    });
    const bool ok = got && for_runs(cells, [&](size_t i, size_t n) {
        return put(g, cells[i] - first_src + first_dst, n, k.data() + i*row_k, v.data() + i*row_v);
    });
    is_full = is_full || !ok;
}

} // namespace refreekv
