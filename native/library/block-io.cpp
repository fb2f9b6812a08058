#include "library/block-io.h"

#include "api/error.h"
#include "api/process.h"
#include "cache/parallel.h"
#include "cache/row-bytes.h"
#include "cache/runs.h"
#include "kernels/codes.h"
#include "kernels/kernels.h"
#include "policies/policy.h"

#include <algorithm>
#include <cerrno>
#include <cstring>

namespace refreekv {

static const uint32_t N_GROUP = REFREEKV_CODED_CELLS;

const char * block_io::refusal() const {
    if (!p.cold.exists()) {
        return "this context has no cold store";
    }
    if (p.params.policy == REFREEKV_POLICY_ELASTIC || p.params.n_hot == 0 || p.params.mask_only || p.warm.theta() == 0.0f) {
        return "decoding does not attend to codes of what is evicted, or attention decides what is";
    }
    if (p.warm.has_tensors()) {
        return "a part of the cache is not in host memory";
    }
    if (p.hparams.n_pos_per_embd() > 1) {
        return "positions of this model have several dimensions";
    }
    return nullptr;
}

block_layer block_io::form_of(const layer & layer) const {
    block_layer res = {};

    res.il      = layer.il;
    res.type_k  = p.cold.type_of(layer, false);
    res.type_v  = p.cold.type_of(layer, true);
    res.n_heads = layer.record.n_heads;
    res.row_k   = layer.record.row_k;
    res.row_v   = layer.record.row_v;
    res.head_k  = layer.record.head_k;
    res.head_v  = layer.record.head_v;
    res.codes_k = layer.warm->head_bytes(false);
    res.codes_v = layer.warm->head_bytes(true);

    return res;
}

// writes the sections of a layer, and notes their checksums
int32_t block_io::write_layer(const layer & layer, const std::vector<uint32_t> & cells, const block & b, block_layer & l) const {
    const auto & kernels = *find_kernels();
    const auto & record  = layer.record;

    std::vector<uint8_t> records(b.records_bytes(l));
    std::vector<uint8_t> k(N_GROUP*std::max(layer.row_size(false), record.row_k));
    std::vector<uint8_t> v(N_GROUP*std::max(layer.row_size(true),  record.row_v));

    const refreekv::row_bytes rows_k(layer.rows.k(), false);
    const refreekv::row_bytes rows_v(layer.rows.v(), layer.rows.get_shape().v_trans);

    const auto is_held = [&](uint32_t cell) { return layer.res.slot(cell) >= 0; };

    for (size_t i = 0, n; i < cells.size(); i += n) {
        // neighbours that are in the same place
        n = 1;
        while (i + n < cells.size() && n < N_GROUP && cells[i + n] == cells[i] + n && is_held(cells[i + n]) == is_held(cells[i])) {
            ++n;
        }
        uint8_t * out = records.data() + i*record.bytes();

        if (is_held(cells[i])) {
            uint32_t slots[N_GROUP];
            for (size_t j = 0; j < n; ++j) {
                slots[j] = layer.res.slot(cells[i + j]);
            }
            rows_k.get(slots, n, k.data());
            rows_v.get(slots, n, v.data());
            p.cold.pack(layer, n, k.data(), v.data(), out);
        } else if (!std::all_of(cells.begin() + i, cells.begin() + i + n, [&](uint32_t cell) { return p.cold.has(layer, cell); }) || !p.cold.read(layer, cells[i], n, out)) {
            set_error("library: rows of layer %d are not in the cold store (any more)", layer.il);
            return REFREEKV_ERR_STATE;
        }
    }

    std::vector<uint8_t> codes(b.codes_bytes(l));
    std::vector<float>   numbers(N_GROUP*std::max(layer.n_embd(false), layer.n_embd(true)));

    for (uint32_t g = 0; g < b.header.n_groups; ++g) {
        record.split(records.data() + (b.header.n_before + g*N_GROUP)*record.bytes(), N_GROUP, k.data(), v.data());

        for (bool is_v : { false, true }) {
            if (is_v && !layer.has_v()) {
                continue;
            }
            const int64_t n_row  = layer.n_embd(is_v);
            const int64_t n_head = is_v ? layer.warm->view.n_v : layer.warm->view.n_k;
            const size_t  row    = is_v ? record.row_v : record.row_k;

            for (uint32_t i = 0; i < N_GROUP; ++i) {
                kernels.to_float(p.cold.type_of(layer, is_v), (is_v ? v : k).data() + i*row, numbers.data() + i*n_row, n_row);
            }
            for (uint32_t h = 0; h < l.n_heads; ++h) {
                uint8_t * out = codes.data() + g*l.group_bytes() + h*(l.codes_k + l.codes_v) + (is_v ? l.codes_k : 0);

                kernels.encode(numbers.data() + h*n_head, n_row, N_GROUP, n_head, is_v ? b.header.bits_v : b.header.bits_k, is_v, out);
            }
        }
    }

    l.codes_sum   = checksum(codes.data(), codes.size());
    l.records_sum = checksum(records.data(), records.size());

    if (cold_failure.now() || !b.in->write(l.codes_at, codes.data(), codes.size()) || !b.in->write(l.records_at, records.data(), records.size())) {
        set_error("library: no room for a block: %s", strerror(errno));
        return REFREEKV_ERR_MEMORY;
    }
    return REFREEKV_OK;
}

int32_t block_io::write(llama_seq_id seq_id, llama_pos first, uint32_t n, uint32_t n_before, const std::string & label, const std::string & path) {
    if (p.kv.get_has_shift()) {
        set_error("library: positions have changed (seq_add, seq_div): decode a batch before it is written");
        return REFREEKV_ERR_STATE;
    }
    p.mover.synchronize();
    p.release_stale();

    const auto & all = p.logical.table_of_seq(seq_id).seq_pos_get(seq_id);

    std::vector<uint32_t> cells;
    for (auto it = all.lower_bound({ first, 0 }); it != all.end() && (uint32_t) (it->first - first) < n; ++it) {
        cells.push_back(p.logical.first_of(seq_id) + it->second);
    }
    if (cells.size() != n) {
        set_error("library: sequence %d does not have positions %d to %d", seq_id, first, first + (llama_pos) n - 1);
        return REFREEKV_ERR_STATE;
    }

    block b;

    b.header.first    = first;
    b.header.n_cells  = n;
    b.header.n_before = n_before;
    b.header.n_groups = (n - n_before)/N_GROUP;
    b.header.bits_k   = p.layers.front().warm->view.bits_k;
    b.header.bits_v   = p.layers.front().warm->view.bits_v;
    b.label           = label;
    for (const auto & layer : p.layers) {
        b.layers.push_back(form_of(layer));
    }
    b.lay_out();

    b.in = file::make(path);
    if (!b.in) {
        set_error("library: %s: %s", path.c_str(), strerror(errno));
        return REFREEKV_ERR_STATE;
    }

    int32_t status = guard([&]() {
        return run_parallel(p.layers.size(), p.mover.n_threads(), [&](uint32_t i, uint32_t) { return write_layer(p.layers[i], cells, b, b.layers[i]); });
    });
    if (status == REFREEKV_OK && !b.write_head()) {
        set_error("library: no room for a block: %s", strerror(errno));
        status = REFREEKV_ERR_MEMORY;
    }
    if (status != REFREEKV_OK) {
        b.in.reset();
        remove_file(path);
    }
    return status;
}

bool block_io::came_from_blocks(llama_seq_id seq_id, llama_pos first, uint32_t n) const {
    const auto & all = p.logical.table_of_seq(seq_id).seq_pos_get(seq_id);

    for (auto it = all.lower_bound({ first, 0 }); it != all.end() && (uint32_t) (it->first - first) < n; ++it) {
        if (!p.cold.is_attached(p.layers.front(), p.logical.first_of(seq_id) + it->second)) {
            return false;
        }
    }
    return true;
}

// cells: in the order of positions; hot: those whose rows are to be in the cache
int32_t block_io::open_layer(layer & layer, const std::vector<uint32_t> & cells, const std::vector<uint8_t> & hot, const std::vector<part> & blocks, size_t i_layer, rows::host_rows & in) {
    std::vector<uint8_t>  codes;
    std::vector<uint32_t> come;

    for (size_t i = 0, next = 0; i < blocks.size(); next += blocks[i++].n_cells) {
        const auto & b = blocks[i].of;
        const auto & l = b.layers[i_layer];

        codes.resize(blocks[i].n_groups*l.group_bytes());
        if (!b.in->read(l.codes_at, codes.data(), codes.size())) {
            set_error("library: codes of layer %d cannot be read any more", layer.il);
            return REFREEKV_ERR_STATE;
        }
        for (uint32_t g = 0; g < blocks[i].n_groups; ++g) {
            const size_t first = next + b.header.n_before + g*N_GROUP;

            uint64_t there = 0;
            for (uint32_t j = 0; j < N_GROUP; ++j) {
                there |= (uint64_t) !hot[first + j] << j;
            }
            const auto [lowest, highest] = std::minmax_element(cells.begin() + first, cells.begin() + first + N_GROUP);
            if (there == 0) {
                continue;
            }
            if (!warm_cells::may_share(*lowest, *highest)) {
                set_error("library: neighbouring tokens would lie too far from each other in this cache");
                return REFREEKV_ERR_STATE;
            }
            layer.warm->add(cells.data() + first, N_GROUP, there);
            for (uint32_t h = 0; h < l.n_heads; ++h) {
                const uint8_t * of_head = codes.data() + g*l.group_bytes() + h*(l.codes_k + l.codes_v);

                memcpy(layer.warm->codes_of(h, false), of_head,             l.codes_k);
                memcpy(layer.warm->codes_of(h, true),  of_head + l.codes_k, l.codes_v);
            }
            layer.warm->note_steps();
        }
    }

    for (size_t i = 0; i < cells.size(); ++i) {
        if (hot[i]) {
            come.push_back(cells[i]);
        }
    }
    std::sort(come.begin(), come.end());

    return p.transfer.get(layer, come, in);
}

// first: the position that it is to begin with
bool block_io::fits(const block & b, uint32_t first) const {
    const auto & h = b.header;

    bool res = b.layers.size() == p.layers.size() && h.first == first && h.n_groups == (h.n_cells - h.n_before)/N_GROUP &&
        h.n_before == (first == 0 ? std::min<uint32_t>(p.params.n_sink, h.n_cells) : 0);
    for (size_t i = 0; res && i < p.layers.size(); ++i) {
        const auto & view = p.layers[i].warm->view;

        res = b.layers[i].alike(form_of(p.layers[i])) && h.bits_k == (uint32_t) view.bits_k && h.bits_v == (uint32_t) view.bits_v;
    }
    return res;
}

int32_t block_io::open(llama_seq_id seq_id, const std::vector<std::string> & paths, uint32_t n) {
    std::vector<part> blocks;

    uint32_t n_there = 0;
    for (const auto & path : paths) {
        auto b = open_block(path);
        if (!fits(b, n_there) || n_there >= n) {
            set_error("library: %s: is not of this model, of these cache types, or of this place", path.c_str());
            return REFREEKV_ERR_STATE;
        }
        const uint32_t n_cells  = std::min(b.header.n_cells, n - n_there);
        const uint32_t n_groups = (n_cells - std::min(n_cells, b.header.n_before))/N_GROUP;

        n_there += n_cells;
        blocks.push_back({ std::move(b), n_cells, n_groups });
    }
    if (n == 0 || n_there < n || n > p.logical.stream_size()) {
        set_error("library: %u tokens are wanted, the blocks have %u, and the context has room for %u", n, n_there, p.logical.stream_size());
        return REFREEKV_ERR_STATE;
    }

    publishing publish(p);

    p.kv.seq_rm(seq_id, -1, -1);
    p.mover.synchronize();
    p.release_stale();

    const auto slots = p.kv.take_cells(seq_id, n);
    if (slots.empty()) {
        set_error("library: the context has no room for %u tokens", n);
        return REFREEKV_ERR_MEMORY;
    }

    const int32_t status = guard([&]() { return open(seq_id, slots, blocks, n); });

    p.layouts.make_stale();

    if (status != REFREEKV_OK) {
        p.kv.seq_rm(seq_id, -1, -1);
        p.release_stale();
        p.idle_rows = true;
    }
    p.update_layouts();

    return status;
}

// which cells a pruning would keep, in the order of positions
std::vector<uint8_t> block_io::kept(llama_seq_id seq_id, const std::vector<part> & blocks, uint32_t n) const {
    std::vector<uint8_t> res(n, 1);
    if (n < (uint32_t) std::max(0, p.params.n_min)) {
        return res;
    }
    std::vector<uint8_t> pinned;
    for (const auto & c : p.evictor.cells_of(seq_id)) {
        pinned.push_back(c.stays);
    }
    selection sel;
    select_hot(p.params, n, pinned, sel);
    for (uint32_t r = sel.n_keep; r < n; ++r) {
        res[sel.order[r]] = 0;
    }
    // those without codes stay, too: where cells are protected, others leave in their place
    for (size_t i = 0, next = 0; i < blocks.size(); next += blocks[i++].n_cells) {
        const uint32_t n_before = std::min(blocks[i].n_cells, blocks[i].of.header.n_before);

        std::fill_n(res.begin() + next, n_before, 1);
        std::fill(res.begin() + next + n_before + blocks[i].n_groups*N_GROUP, res.begin() + next + blocks[i].n_cells, 1);
    }
    return res;
}

int32_t block_io::open(llama_seq_id seq_id, const llama_kv_cache::slot_info & slots, const std::vector<part> & blocks, uint32_t n) {
    std::vector<uint32_t> cells;
    p.logical.for_batch(slots, [&](uint32_t cell) { cells.push_back(cell); });

    const std::vector<uint8_t> all(n, 1);
    const std::vector<uint8_t> hot = kept(seq_id, blocks, n);

    const uint32_t n_hot = std::count(hot.begin(), hot.end(), 1);

    const auto is_full = [&](size_t i) { return i < (size_t) p.params.n_full_layers; };

    uint64_t bytes = p.bytes();
    for (size_t i = 0; i < p.layers.size(); ++i) {
        auto & layer = p.layers[i];

        const uint32_t n_need = p.layouts.padded(layer.res.n_used() + (is_full(i) ? n : n_hot));

        bytes += n_need > layer.rows.capacity() ? layer.rows.bytes_for(n_need) - layer.rows.bytes() : 0;
    }
    if (!p.within_limit(bytes)) {
        return REFREEKV_ERR_MEMORY;
    }

    for (size_t i = 0; i < p.layers.size(); ++i) {
        auto & layer = p.layers[i];

        const uint32_t * its = cells.data();
        for (const auto & b : blocks) {
            for_runs(its, b.n_cells, [&](size_t j, size_t n_run) {
                p.cold.attach(layer, its[j], n_run, b.of.in, b.of.layers[i].records_at + j*layer.record.bytes());
                return true;
            });
            its += b.n_cells;
        }
    }

    std::vector<rows::host_rows> in(p.mover.n_threads());

    const int32_t status = run_parallel(p.layers.size(), p.mover.n_threads(), [&](uint32_t i, uint32_t thread) {
        return open_layer(p.layers[i], cells, is_full(i) ? all : hot, blocks, i, in[thread]);
    });
    if (status != REFREEKV_OK) {
        return status;
    }
    if (n_hot < n) {
        p.pruned[seq_id] = n - 1;
    }
    p.n_generation++;

    return p.within_limit(p.bytes()) ? REFREEKV_OK : REFREEKV_ERR_MEMORY;
}

} // namespace refreekv
