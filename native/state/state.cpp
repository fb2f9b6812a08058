// Saving and loading the rows of a refreekv_store: the counterpart of llama_kv_cache::state_write_data and
// state_read_data. The cells themselves (positions, sequences) are written by upstream before; here they are counted in
// that order. Of each group what it holds is written, and then what the cold store has of the rest (state/state-cold.cpp).

#include "cache/store.h"

#include "api/error.h"

#include "llama-context.h"
#include "llama-io.h"

#include <algorithm>
#include <cstring>
#include <numeric>

static const uint32_t REFREEKV_STATE_MAGIC   = 0x564b4652; // "RFKV"
static const uint32_t REFREEKV_STATE_VERSION = 5;
static const uint32_t REFREEKV_STATE_V       = 0x56564652; // "RFVV", between K and V: states have no checksum

// f(tensor, offset, size) for the bytes of these slots, in this order. Consecutive slots are one piece; how the pieces fall
// does not change the order of the bytes.
template <typename F>
static void refreekv_for_pieces(ggml_tensor * t, const std::vector<uint32_t> & slots, size_t start, size_t stride, F && f) {
    for (size_t i = 0, n = 0; i < slots.size(); i += n) {
        n = 1;
        while (i + n < slots.size() && slots[i + n] == slots[i] + n) {
            ++n;
        }
        f(t, start + slots[i]*stride, n*stride);
    }
}

template <typename F>
static void refreekv_for_k(const refreekv_rows & rows, const std::vector<uint32_t> & slots, F && f) {
    refreekv_for_pieces(rows.k(), slots, 0, rows.k()->nb[1], f);
}

// line by line when it is transposed
template <typename F>
static void refreekv_for_v(const refreekv_rows & rows, const std::vector<uint32_t> & slots, F && f) {
    if (!rows.get_shape().v_trans) {
        refreekv_for_pieces(rows.v(), slots, 0, rows.v()->nb[1], f);
        return;
    }
    for (int64_t j = 0; j < rows.v()->ne[1]; ++j) {
        refreekv_for_pieces(rows.v(), slots, j*rows.v()->nb[1], rows.v()->nb[0], f);
    }
}

struct refreekv_state_header {
    uint32_t magic;
    uint32_t version;
    uint32_t v_trans;
    uint32_t n_layers;
    uint32_t n_cells;
    uint32_t pruned; // anything in the context
};

struct refreekv_state_group {
    int32_t  il;
    uint32_t n_heads;
    int32_t  type_k;
    int32_t  type_v;
    uint64_t n_embd_k;
    uint64_t n_embd_v;
    uint32_t n_held;
    uint32_t whole;
};

void refreekv_store::state_write(llama_io_write_i & io, uint32_t strm, const std::vector<std::pair<uint32_t, uint32_t>> & ranges) {
    std::vector<uint32_t> list;
    for (const auto & [c0, c1] : ranges) {
        for (uint32_t c = c0; c < c1; ++c) {
            list.push_back(strm*logical.stream_size() + c);
        }
    }

    const refreekv_state_header header = { REFREEKV_STATE_MAGIC, REFREEKV_STATE_VERSION, kv.v_trans, (uint32_t) layers.size(), (uint32_t) list.size(),
        std::any_of(pruned.begin(), pruned.end(), [](llama_pos pos) { return pos >= 0; }) };
    io.write(&header, sizeof(header));

    // which cells lie behind a pruning: from them the reader learns how far each sequence was pruned
    std::vector<uint8_t> behind(list.size(), 0);
    for (size_t i = 0; i < list.size(); ++i) {
        for (llama_seq_id s = 0; s < logical.n_seq_ids(); ++s) {
            behind[i] |= logical.seq_has(list[i], s) && logical.pos_of(list[i]) <= pruned[s];
        }
    }
    io.write(behind.data(), behind.size());

    // how the layers are divided into groups
    const auto     whole   = whole_heads();
    const uint32_t n_whole = whole.size();
    io.write(&n_whole, sizeof(n_whole));
    if (!whole.empty()) { // upstream copies with memcpy, which takes no null pointer
        io.write(whole.data(), whole.size()*sizeof(whole[0]));
    }

    for (const auto & g : groups) {
        // (slot, index in the list), in the order of slots
        std::vector<std::pair<uint32_t, uint32_t>> held;
        for (uint32_t i = 0; i < list.size(); ++i) {
            const int32_t slot = g.res.slot(list[i]);
            if (slot >= 0 && !g.res.hidden(slot)) {
                held.emplace_back(slot, i);
            }
        }
        std::sort(held.begin(), held.end());

        const auto & shape = g.rows.get_shape();

        const refreekv_state_group info = { g.il, (uint32_t) g.heads.size(), shape.type_k, shape.type_v,
            (uint64_t) shape.n_embd_k, (uint64_t) shape.n_embd_v, (uint32_t) held.size(), g.whole };
        io.write(&info, sizeof(info));

        std::vector<uint32_t> slots;
        for (const auto & [slot, i] : held) {
            slots.push_back(slot);
            io.write(&i, sizeof(i));
        }

        if (!slots.empty()) {
            const auto write = [&](ggml_tensor * t, size_t offset, size_t size) { io.write_tensor(t, offset, size); };

            refreekv_for_k(g.rows, slots, write);
            io.write(&REFREEKV_STATE_V, sizeof(REFREEKV_STATE_V));
            refreekv_for_v(g.rows, slots, write);
        }
    }

    write_cold(io, list);
}

// a restore failed: what it wrote must not be read, not even with weight 0
void refreekv_store::clear_rows(const slot_info & sinfo) {
    for (auto & g : groups) {
        std::vector<uint32_t> slots;
        logical.for_batch(sinfo, [&](uint32_t cell) {
            if (g.res.slot(cell) >= 0) {
                slots.push_back(g.res.slot(cell));
            }
        });
        if (!slots.empty()) {
            const auto zero = [](ggml_tensor * t, size_t offset, size_t size) { ggml_backend_tensor_memset(t, 0, offset, size); };

            refreekv_for_k(g.rows, slots, zero);
            refreekv_for_v(g.rows, slots, zero);
        }
    }
}

// the heads kept whole where the state was written
bool refreekv_store::read_whole_heads(llama_io_read_i & io, heads_list & heads) const {
    uint32_t n = 0;
    io.read(&n, sizeof(n));

    if (n > n_heads_kv()) {
        refreekv_set_error("state: damaged, %u of %u KV heads are kept whole", n, n_heads_kv());
        return false;
    }

    heads.resize(n);
    if (!heads.empty()) {
        io.read(heads.data(), n*sizeof(heads[0]));
    }
    std::sort(heads.begin(), heads.end());

    return valid_heads(heads);
}

// what comes before the rows of a group; cells: indices of the list, in the order of the rows
bool refreekv_store::read_group_head(llama_io_read_i & io, int32_t il, size_t n_heads, bool whole, const refreekv_rows::shape & shape,
        uint32_t cell_count, std::vector<uint32_t> & cells) {
    refreekv_state_group info;
    io.read(&info, sizeof(info));

    if (info.il != il || info.n_heads != n_heads || (bool) info.whole != whole) {
        refreekv_set_error("state: damaged, its groups of KV heads are not those it names");
        return false;
    }
    if (info.type_k != shape.type_k || info.type_v != shape.type_v || info.n_embd_k != (uint64_t) shape.n_embd_k || info.n_embd_v != (uint64_t) shape.n_embd_v) {
        refreekv_set_error("state: layer %d has other cache types or row sizes than this context", il);
        return false;
    }
    if (info.n_held > cell_count) {
        refreekv_set_error("state: damaged, layer %d holds more cells than there are", il);
        return false;
    }

    cells.resize(info.n_held);
    if (!cells.empty()) {
        io.read(cells.data(), cells.size()*sizeof(uint32_t));
    }

    std::vector<uint8_t> seen(cell_count, 0);
    for (uint32_t i : cells) {
        if (i >= cell_count || seen[i]) {
            refreekv_set_error("state: damaged, layer %d names a cell that is not there", il);
            return false;
        }
        seen[i] = 1;
    }

    return true;
}

static bool refreekv_read_mark(llama_io_read_i & io, int32_t il) {
    uint32_t mark = 0;
    io.read(&mark, sizeof(mark));
    if (mark != REFREEKV_STATE_V) {
        refreekv_set_error("state: damaged, layer %d has no V where it should be", il);
        return false;
    }
    return true;
}

// K or V of all heads of a layer as bytes, cells in the order of a list. As in the tensors: by cell, or by element where it
// is transposed.
class refreekv_layer_bytes {
public:
    refreekv_layer_bytes(ggml_type type, size_t n_embd_head, size_t n_heads, size_t n_cells, bool trans) :
        trans(trans), n_heads(n_heads), n_cells(n_cells),
        n_parts(trans ? n_embd_head : 1), part(trans ? ggml_type_size(type) : ggml_row_size(type, n_embd_head)), bytes(n_heads*n_cells*n_parts*part) {}

    // of some heads, with cells in another order: cells[i] is the place in the list of the i-th
    void put(const std::vector<uint8_t> & src, const std::vector<uint32_t> & heads, const std::vector<uint32_t> & cells) {
        for_parts(heads, cells, [&](size_t ours, size_t theirs) { memcpy(bytes.data() + ours, src.data() + theirs, part); });
    }
    void get(std::vector<uint8_t> & dst, const std::vector<uint32_t> & heads, const std::vector<uint32_t> & cells) const {
        for_parts(heads, cells, [&](size_t ours, size_t theirs) { memcpy(dst.data() + theirs, bytes.data() + ours, part); });
    }

private:
    const bool   trans;
    const size_t n_heads;
    const size_t n_cells;
    const size_t n_parts; // of one head in one cell that do not lie side by side
    const size_t part;    // bytes

    std::vector<uint8_t> bytes;

    size_t place(size_t n, size_t head, size_t p, size_t cell) const {
        return part*(trans ? (head*n_parts + p)*n_cells + cell : cell*n + head);
    }

    template <typename F>
    void for_parts(const std::vector<uint32_t> & heads, const std::vector<uint32_t> & cells, F && f) const {
        for (size_t h = 0; h < heads.size(); ++h) {
            for (size_t p = 0; p < n_parts; ++p) {
                for (size_t i = 0; i < cells.size(); ++i) {
                    f(place(n_heads, heads[h], p, cells[i]), place(heads.size(), h, p, i));
                }
            }
        }
    }
};

// a state in which nothing was evicted, of a context with other heads kept whole
bool refreekv_store::read_divided_anew(llama_io_read_i & io, const heads_list & theirs, const std::vector<uint32_t> & list) {
    std::vector<uint32_t> in_order(list.size());
    std::iota(in_order.begin(), in_order.end(), 0);

    for (const auto & layer : layers) {
        const auto parts = divide(layer, theirs);

        // undivided here and there: its heads may not be separable
        const bool one           = parts.size() == 1 && layer.groups.size() == 1;
        const auto heads_of_part = [&](const std::vector<uint32_t> & heads) { return one ? std::vector<uint32_t> { 0 } : heads; };

        const int64_t n_heads       = one ? 1                    : kv.hparams.n_head_kv(layer.il);
        const int64_t n_embd_head_k = one ? layer.shape.n_embd_k : kv.hparams.n_embd_head_k(layer.il);
        const int64_t n_embd_head_v = one ? layer.shape.n_embd_v : kv.hparams.n_embd_head_v(layer.il);

        refreekv_layer_bytes k(layer.shape.type_k, n_embd_head_k, n_heads, list.size(), false);
        refreekv_layer_bytes v(layer.shape.type_v, n_embd_head_v, n_heads, list.size(), layer.shape.v_trans);

        std::vector<uint8_t> bytes;

        for (const auto & p : parts) {
            const auto shape = shape_of(layer, p.heads);

            std::vector<uint32_t> cells;
            if (!read_group_head(io, layer.il, p.heads.size(), p.whole, shape, list.size(), cells)) {
                return false;
            }
            if (cells.size() != list.size()) {
                refreekv_set_error("state: damaged, layer %d lacks cells that were never evicted", layer.il);
                return false;
            }
            if (cells.empty()) {
                continue;
            }

            bytes.resize(cells.size()*ggml_row_size(shape.type_k, shape.n_embd_k));
            io.read(bytes.data(), bytes.size());
            k.put(bytes, heads_of_part(p.heads), cells);

            if (!refreekv_read_mark(io, layer.il)) {
                return false;
            }

            bytes.resize(cells.size()*ggml_row_size(shape.type_v, shape.n_embd_v));
            io.read(bytes.data(), bytes.size());
            v.put(bytes, heads_of_part(p.heads), cells);
        }

        for (uint32_t i_group : layer.groups) {
            auto & g = groups[i_group];

            if (!make_room(g, list.size())) {
                return false;
            }

            std::vector<uint32_t> slots;
            for (uint32_t cell : list) {
                slots.push_back(g.res.assign(cell));
            }
            if (slots.empty()) {
                continue;
            }

            const uint8_t * next = nullptr;
            const auto write = [&](ggml_tensor * t, size_t offset, size_t size) {
                ggml_backend_tensor_set(t, next, offset, size);
                next += size;
            };

            // more than its heads where V is padded to the widest layer (cpy_v)
            bytes.assign(slots.size()*ggml_row_size(g.rows.get_shape().type_k, g.rows.get_shape().n_embd_k), 0);
            k.get(bytes, heads_of_part(g.heads), in_order);
            next = bytes.data();
            refreekv_for_k(g.rows, slots, write);

            bytes.assign(slots.size()*ggml_row_size(g.rows.get_shape().type_v, g.rows.get_shape().n_embd_v), 0);
            v.get(bytes, heads_of_part(g.heads), in_order);
            next = bytes.data();
            refreekv_for_v(g.rows, slots, write);
        }
    }

    layouts.make_stale();

    return true;
}

// false: the state is not one of this context, or is damaged; upstream then clears what was read and reports the failure
bool refreekv_store::state_read(llama_io_read_i & io, uint32_t cell_count, const slot_info & sinfo) {
    refreekv_publishing publish(this);

    std::vector<uint32_t> list;
    logical.for_batch(sinfo, [&](uint32_t cell) { list.push_back(cell); });

    refreekv_state_header header;
    io.read(&header, sizeof(header));

    if (header.magic != REFREEKV_STATE_MAGIC || header.version != REFREEKV_STATE_VERSION) {
        refreekv_set_error("state: it was not written by a context with a KV policy (or by another version); load it into one like that");
        return false;
    }
    if (header.v_trans != (uint32_t) kv.v_trans) {
        refreekv_set_error("state: it was written with flash_attn = %s; this context has %s", header.v_trans ? "False" : "True", kv.v_trans ? "False" : "True");
        return false;
    }
    if (header.n_layers != layers.size() || header.n_cells != cell_count || list.size() != cell_count) {
        refreekv_set_error("state: %u layers and %u cells do not fit this model's %zu layers and %u cells", header.n_layers, header.n_cells, layers.size(), cell_count);
        return false;
    }

    mover.synchronize();
    release_stale();

    // the cells may be those of a sequence that was there before: what the state does not hold of them must go
    std::vector<uint8_t> in_list(logical.size(), 0);
    for (uint32_t cell : list) {
        in_list[cell] = 1;
    }
    for (auto & g : groups) {
        g.res.release([&](uint32_t cell) { return in_list[cell]; });
        cold.forget(g, list);
    }
    warm.refresh(groups);

    // read_tensor writes when io is done. A state of several streams grows the rows once per stream, so there they are
    // written at once.
    const bool at_once = restoring && kv.n_stream > 1;

    const auto read_bytes = [&](ggml_tensor * t, size_t offset, size_t size) {
        if (!at_once) {
            io.read_tensor(t, offset, size);
            return;
        }
        std::vector<uint8_t> bytes(size);
        io.read(bytes.data(), size);
        ggml_backend_tensor_set(t, bytes.data(), offset, size);
    };

    std::vector<uint8_t> behind(cell_count);
    io.read(behind.data(), behind.size());

    heads_list theirs;
    if (!read_whole_heads(io, theirs)) {
        return false;
    }

    const heads_list ours = whole_heads();

    if (ours != theirs) {
        if (!header.pruned && (!ours.empty() || !holds_nothing())) {
            return read_divided_anew(io, theirs, list) && read_cold(io, list);
        }
        // which cells a head has lost is in the state: its division goes with it
        if (!holds_nothing()) {
            refreekv_set_error("state: it keeps other KV heads whole than this context, which is not empty");
            return false;
        }
        make_groups(theirs);
    }

    for (auto & g : groups) {
        std::vector<uint32_t> idxs;
        if (!read_group_head(io, g.il, g.heads.size(), g.whole, g.rows.get_shape(), cell_count, idxs) || !make_room(g, idxs.size())) {
            return false;
        }

        std::vector<uint32_t> slots;
        for (uint32_t i : idxs) {
            slots.push_back(g.res.assign(list[i]));
        }
        if (!slots.empty()) {
            refreekv_for_k(g.rows, slots, read_bytes);
            if (!refreekv_read_mark(io, g.il)) {
                return false;
            }
            refreekv_for_v(g.rows, slots, read_bytes);
        }
    }
    if (!read_cold(io, list)) {
        return false;
    }

    for (llama_seq_id s = 0; s < logical.n_seq_ids(); ++s) {
        for (uint32_t i = 0; i < cell_count; ++i) {
            if (behind[i] && logical.seq_has(list[i], s)) {
                pruned[s] = std::max(pruned[s], logical.pos_of(list[i]));
                ring.forget(s);
            }
        }
    }

    layouts.make_stale();

    return true;
}
