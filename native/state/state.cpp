// Saving and loading the rows of a cache: the counterpart of llama_kv_cache::state_write_data and
// state_read_data. The cells themselves (positions, sequences) are written by upstream before; here they are counted in
// that order. Of each layer what it holds is written, and then what the cold store has of the rest (state/state-cold.cpp).

#include "state/state.h"

#include "api/error.h"

#include "llama-context.h"
#include "llama-io.h"

#include <algorithm>

namespace refreekv {

static const uint32_t REFREEKV_STATE_MAGIC   = 0x564b4652; // "RFKV"
static const uint32_t REFREEKV_STATE_VERSION = 7;
static const uint32_t REFREEKV_STATE_V       = 0x56564652; // "RFVV", between K and V: states have no checksum

// f(tensor, offset, size) for the bytes of these slots, in this order. Consecutive slots are one piece; how the pieces fall
// does not change the order of the bytes.
template <typename F>
static void for_pieces(ggml_tensor * t, const std::vector<uint32_t> & slots, size_t start, size_t stride, F && f) {
    for (size_t i = 0, n = 0; i < slots.size(); i += n) {
        n = 1;
        while (i + n < slots.size() && slots[i + n] == slots[i] + n) {
            ++n;
        }
        f(t, start + slots[i]*stride, n*stride);
    }
}

template <typename F>
static void for_k(const refreekv::rows & rows, const std::vector<uint32_t> & slots, F && f) {
    for_pieces(rows.k(), slots, 0, rows.k()->nb[1], f);
}

// line by line when it is transposed
template <typename F>
static void for_v(const refreekv::rows & rows, const std::vector<uint32_t> & slots, F && f) {
    if (!rows.v()) {
        return; // it is a part of K
    }
    if (!rows.get_shape().v_trans) {
        for_pieces(rows.v(), slots, 0, rows.v()->nb[1], f);
        return;
    }
    for (int64_t j = 0; j < rows.v()->ne[1]; ++j) {
        for_pieces(rows.v(), slots, j*rows.v()->nb[1], rows.v()->nb[0], f);
    }
}

struct state_header {
    uint32_t magic;
    uint32_t version;
    uint32_t v_trans;
    uint32_t n_layers;
    uint32_t n_cells;
};

struct state_layer {
    int32_t  il;
    int32_t  type_k;
    int32_t  type_v;
    uint32_t n_held;
    uint64_t n_embd_k;
    uint64_t n_embd_v;
};

void states::write(llama_io_write_i & io, uint32_t strm, const std::vector<std::pair<uint32_t, uint32_t>> & ranges) {
    std::vector<uint32_t> list;
    for (const auto & [c0, c1] : ranges) {
        for (uint32_t c = c0; c < c1; ++c) {
            list.push_back(strm*p.logical.stream_size() + c);
        }
    }

    const state_header header = { REFREEKV_STATE_MAGIC, REFREEKV_STATE_VERSION, p.v_trans, (uint32_t) p.layers.size(), (uint32_t) list.size() };
    io.write(&header, sizeof(header));

    // which cells lie behind a pruning: from them the reader learns how far each sequence was pruned
    std::vector<uint8_t> behind(list.size(), 0);
    for (size_t i = 0; i < list.size(); ++i) {
        for (llama_seq_id s = 0; s < p.logical.n_seq_ids(); ++s) {
            behind[i] |= p.logical.seq_has(list[i], s) && p.logical.pos_of(list[i]) <= p.pruned[s];
        }
    }
    io.write(behind.data(), behind.size());

    for (const auto & layer : p.layers) {
        // (slot, index in the list), in the order of slots
        std::vector<std::pair<uint32_t, uint32_t>> held;
        for (uint32_t i = 0; i < list.size(); ++i) {
            const int32_t slot = layer.res.slot(list[i]);
            if (slot >= 0 && !layer.res.hidden(slot)) {
                held.emplace_back(slot, i);
            }
        }
        std::sort(held.begin(), held.end());

        const auto & shape = layer.rows.get_shape();

        const state_layer info = { layer.il, shape.type_k, shape.type_v, (uint32_t) held.size(), (uint64_t) shape.n_embd_k, (uint64_t) shape.n_embd_v };
        io.write(&info, sizeof(info));

        std::vector<uint32_t> slots;
        for (const auto & [slot, i] : held) {
            slots.push_back(slot);
            io.write(&i, sizeof(i));
        }

        if (!slots.empty()) {
            const auto write = [&](ggml_tensor * t, size_t offset, size_t size) { io.write_tensor(t, offset, size); };

            for_k(layer.rows, slots, write);
            io.write(&REFREEKV_STATE_V, sizeof(REFREEKV_STATE_V));
            for_v(layer.rows, slots, write);
        }
    }

    write_cold(p, io, list);
    write_warm(p, io, list);
}

// a restore failed: what it wrote must not be read, not even with weight 0
void states::clear_rows(const llama_kv_cache::slot_info & sinfo) {
    for (auto & layer : p.layers) {
        std::vector<uint32_t> slots;
        p.logical.for_batch(sinfo, [&](uint32_t cell) {
            if (layer.res.slot(cell) >= 0) {
                slots.push_back(layer.res.slot(cell));
            }
        });
        if (!slots.empty()) {
            const auto zero = [](ggml_tensor * t, size_t offset, size_t size) { ggml_backend_tensor_memset(t, 0, offset, size); };

            for_k(layer.rows, slots, zero);
            for_v(layer.rows, slots, zero);
        }
    }
}

// what comes before the rows of a layer; cells: indices of the list, in the order of the rows
static bool read_layer_head(llama_io_read_i & io, const layer & layer, uint32_t cell_count, std::vector<uint32_t> & cells) {
    state_layer info;
    io.read(&info, sizeof(info));

    if (info.il != layer.il) {
        set_error("state: damaged, it does not have layer %d where it should be", layer.il);
        return false;
    }

    const auto & shape = layer.rows.get_shape();

    if (info.type_k != shape.type_k || info.type_v != shape.type_v || info.n_embd_k != (uint64_t) shape.n_embd_k || info.n_embd_v != (uint64_t) shape.n_embd_v) {
        set_error("state: layer %d has other cache types or row sizes than this context", layer.il);
        return false;
    }
    if (info.n_held > cell_count) {
        set_error("state: damaged, layer %d holds more cells than there are", layer.il);
        return false;
    }

    cells.resize(info.n_held);
    if (!cells.empty()) {
        io.read(cells.data(), cells.size()*sizeof(uint32_t));
    }

    std::vector<uint8_t> seen(cell_count, 0);
    for (uint32_t i : cells) {
        if (i >= cell_count || seen[i]) {
            set_error("state: damaged, layer %d names a cell that is not there", layer.il);
            return false;
        }
        seen[i] = 1;
    }

    return true;
}

static bool read_mark(llama_io_read_i & io, int32_t il) {
    uint32_t mark = 0;
    io.read(&mark, sizeof(mark));
    if (mark != REFREEKV_STATE_V) {
        set_error("state: damaged, layer %d has no V where it should be", il);
        return false;
    }
    return true;
}

// false: the state is not one of this context, or is damaged; upstream then clears what was read and reports the failure
bool states::read(llama_io_read_i & io, uint32_t cell_count, const llama_kv_cache::slot_info & sinfo) {
    std::vector<uint32_t> list;
    p.logical.for_batch(sinfo, [&](uint32_t cell) { list.push_back(cell); });

    state_header header;
    io.read(&header, sizeof(header));

    if (header.magic != REFREEKV_STATE_MAGIC || header.version != REFREEKV_STATE_VERSION) {
        set_error("state: it was not written by a context with a KV policy (or by another version); load it into one like that");
        return false;
    }
    if (header.v_trans != (uint32_t) p.v_trans) {
        set_error("state: it was written with flash_attn = %s; this context has %s", header.v_trans ? "False" : "True", p.v_trans ? "False" : "True");
        return false;
    }
    if (header.n_layers != p.layers.size() || header.n_cells != cell_count || list.size() != cell_count) {
        set_error("state: %u layers and %u cells do not fit this model's %zu layers and %u cells", header.n_layers, header.n_cells, p.layers.size(), cell_count);
        return false;
    }

    p.mover.synchronize();
    p.release_stale();

    // the cells may be those of a sequence that was there before: what the state does not hold of them must go
    std::vector<uint8_t> in_list(p.logical.size(), 0);
    for (uint32_t cell : list) {
        in_list[cell] = 1;
    }
    for (auto & layer : p.layers) {
        layer.res.release([&](uint32_t cell) { return in_list[cell]; });
        p.cold.forget(layer, list);
        if (layer.warm && layer.warm->keep([&](uint32_t cell) { return !in_list[cell]; })) {
            p.n_generation++;
        }
    }

    // read_tensor writes when io is done. A state of several streams grows the rows once per stream, so there they are
    // written at once.
    const bool at_once = p.emptied && p.n_stream > 1;

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

    for (auto & layer : p.layers) {
        std::vector<uint32_t> idxs;
        if (!read_layer_head(io, layer, cell_count, idxs) || !p.make_room(layer, idxs.size())) {
            return false;
        }

        std::vector<uint32_t> slots;
        for (uint32_t i : idxs) {
            slots.push_back(layer.res.assign(list[i]));
        }
        if (!slots.empty()) {
            for_k(layer.rows, slots, read_bytes);
            if (!read_mark(io, layer.il)) {
                return false;
            }
            for_v(layer.rows, slots, read_bytes);
        }
    }
    if (!read_cold(p, io, list) || !read_warm(p, io, list)) {
        return false;
    }
    code_missing(p, list);

    if (!p.has_room_for_codes()) {
        return false;
    }

    for (llama_seq_id s = 0; s < p.logical.n_seq_ids(); ++s) {
        for (uint32_t i = 0; i < cell_count; ++i) {
            p.loaded[s] |= p.logical.seq_has(list[i], s);
            if (behind[i] && p.logical.seq_has(list[i], s)) {
                p.pruned[s] = std::max(p.pruned[s], p.logical.pos_of(list[i]));
                p.ring.forget(s);
            }
        }
    }

    p.layouts.make_stale();

    return true;
}

} // namespace refreekv
