#include "cache/rows.h"

#include "api/process.h"
#include "cache/gather.h"
#include "cache/row-bytes.h"

#include <algorithm>
#include <cstring>
#include <utility>

namespace refreekv {

// in: the rows of slots that have no source
static void copy_host(const refreekv::row_bytes & src, refreekv::row_bytes dst, const row_moves & moves, const refreekv::bytes & in, const refreekv::bytes & spare) {
    dst.copy(src, moves, spare);

    if (!in.empty()) {
        dst.set(moves.others.data(), moves.others.size(), in.data());
    }
}

size_t rows::bytes() const {
    if (region_k) {
        return region_k->bytes() + (region_v ? region_v->bytes() : 0);
    }
    return buf ? ggml_backend_buffer_get_size(buf.get()) : 0;
}

size_t rows::bytes_for(uint32_t capacity) {
    if (!has_regions()) {
        return capacity*row_bytes();
    }
    return region_k->bytes_for(capacity*ggml_row_size(s.type_k, s.n_embd_k) + behind_k) +
        (region_v ? region_v->bytes_for(capacity*ggml_row_size(s.type_v, s.n_embd_v) + behind_v) : 0);
}

size_t rows::row_bytes() const {
    return ggml_row_size(s.type_k, s.n_embd_k) + ggml_row_size(s.type_v, s.n_embd_v);
}

rows::layout rows::make_layout(uint32_t capacity) const {
    layout res;

    ggml_init_params params = { 2*ggml_tensor_overhead(), nullptr, true };
    res.ctx.reset(ggml_init(params));

    const size_t align = ggml_backend_buft_get_alignment(s.buft);

    res.k = ggml_new_tensor_2d(res.ctx.get(), s.type_k, s.n_embd_k, capacity);
    ggml_format_name(res.k, "refreekv_k_l%d", il);
    res.size_k = GGML_PAD(ggml_backend_buft_get_alloc_size(s.buft, res.k), align);

    if (s.n_embd_v == 0) {
        return res;
    }
    res.v = s.v_trans ? ggml_new_tensor_2d(res.ctx.get(), s.type_v, capacity, s.n_embd_v)
                      : ggml_new_tensor_2d(res.ctx.get(), s.type_v, s.n_embd_v, capacity);

    ggml_format_name(res.v, "refreekv_v_l%d", il);
    res.size_v = GGML_PAD(ggml_backend_buft_get_alloc_size(s.buft, res.v), align);

    return res;
}

bool rows::has_regions() {
    if (!region_k && !no_regions) {
        const layout most = make_layout(s.max_cells);

        behind_k = most.size_k - ggml_nbytes(most.k);
        behind_v = most.v ? most.size_v - ggml_nbytes(most.v) : 0;

        auto of_k = region::make(s.buft, most.size_k);
        auto of_v = most.v ? region::make(s.buft, most.size_v) : nullptr;

        no_regions = !of_k || (most.v && !of_v);
        if (!no_regions) { // both, or none
            region_k = std::move(of_k);
            region_v = std::move(of_v);
        }
    }
    return !no_regions;
}

bool rows::resize_regions(size_t size_k, size_t size_v) {
    const size_t before = region_k->size();

    if (!region_k->resize(size_k)) {
        return false;
    }
    if (region_v && !region_v->resize(size_v)) {
        region_k->resize(before);
        return false;
    }
    return true;
}

// not ggml_backend_tensor_alloc, for which the memory of a buffer is one piece
static void place_tensor(ggml_tensor * t, ggml_backend_buffer_t buf, char * addr) {
    t->buffer = buf;
    t->data   = addr;
}

// Once the rows are where they belong: CUDA clears what lies behind a quantised tensor, and that may have been rows.
static void init_tensor(ggml_tensor * t) {
    ggml_backend_buffer_init_tensor(t->buffer, t);
}

bool rows::move(const std::vector<uint32_t> & slots, uint32_t capacity, ggml_backend_t backend, bool force_graph, const host_rows & in) {
    GGML_ASSERT(slots.size() <= capacity && capacity <= s.max_cells);

    if (capacity == 0) {
        clear();
        return true;
    }

    const bool ok = has_regions() ? move_in_place(slots, make_layout(capacity), capacity > n_cap, backend, force_graph, in)
                                  : move_to_new  (slots, make_layout(capacity), backend, force_graph, in);
    n_cap = ok ? capacity : n_cap;

    return ok;
}

bool rows::move_in_place(const std::vector<uint32_t> & slots, layout && then, bool grows, ggml_backend_t backend, bool force_graph, const host_rows & in) {
    if (grows && (allocation_failure.now() || !resize_regions(then.size_k, then.size_v))) {
        return false;
    }
    place_tensor(then.k, region_k->buffer(), region_k->base());
    if (then.v) {
        place_tensor(then.v, region_v->buffer(), region_v->base());
    }

    move(then, slots, backend, force_graph, in);

    if (!grows) {
        resize_regions(then.size_k, then.size_v);
    }
    now = std::move(then);

    init_tensor(now.k);
    if (now.v) {
        init_tensor(now.v);
    }

    return true;
}

bool rows::move_to_new(const std::vector<uint32_t> & slots, layout && then, ggml_backend_t backend, bool force_graph, const host_rows & in) {
    if (allocation_failure.now()) {
        return false;
    }

    ggml_backend_buffer_ptr to(ggml_backend_buft_alloc_buffer(s.buft, then.size_k + then.size_v));
    if (!to) {
        return false;
    }
    ggml_backend_buffer_clear(to.get(), 0); // rows that are not written yet are masked, but must be finite

    char * base = (char *) ggml_backend_buffer_get_base(to.get());

    place_tensor(then.k, to.get(), base);
    init_tensor(then.k);

    if (then.v) {
        place_tensor(then.v, to.get(), base + then.size_k);
        init_tensor(then.v);
    }

    move(then, slots, backend, force_graph, in);

    now = std::move(then);
    buf = std::move(to);

    return true;
}

// that the host needs to move rows in place
size_t rows::spare_bytes(const layout & then, const std::vector<uint32_t> & slots) const {
    if (!now.k) {
        return 0;
    }
    const size_t of_k = refreekv::row_bytes(then.k, false).spare(refreekv::row_bytes(now.k, false), slots);

    return then.v ? std::max(of_k, refreekv::row_bytes(then.v, s.v_trans).spare(refreekv::row_bytes(now.v, s.v_trans), slots)) : of_k;
}

void rows::move(const layout & then, const std::vector<uint32_t> & slots, ggml_backend_t backend, bool force_graph, const host_rows & in) {
    const bool any = !in.k.empty() || std::any_of(slots.begin(), slots.end(), [](uint32_t slot) { return slot != none; });

    if (any) {
        // before anything has moved
        spare.resize(has_regions() && ggml_backend_buffer_is_host(then.k->buffer) ? spare_bytes(then, slots) : 0);
        const row_moves moves(slots, !spare.empty());

        move(now.k, then.k, false, moves, backend, force_graph, in.k);
        if (then.v) {
            move(now.v, then.v, s.v_trans, moves, backend, force_graph, in.v);
        }

        spare = {};
    }
}

void rows::move(ggml_tensor * src, ggml_tensor * dst, bool trans, const row_moves & moves, ggml_backend_t backend, bool force_graph, const refreekv::bytes & in) {
    const auto & slots = moves.slots;

    const bool host     = ggml_backend_buffer_is_host(dst->buffer);
    const bool in_place = src && src->buffer == dst->buffer; // addresses alone say nothing: on Vulkan all buffers begin at the same one

    // those that stay where they are
    size_t first = 0;
    if (in_place && src->nb[1] == dst->nb[1]) {
        while (first < slots.size() && slots[first] == first) {
            ++first;
        }
    }
    if (first == slots.size()) {
        return;
    }

    if (host && !force_graph) {
        copy_host(refreekv::row_bytes(src ? src : dst, trans), refreekv::row_bytes(dst, trans), moves, in, spare);
        return;
    }

    refreekv::gather gather;

    if (backend && refreekv::row_bytes(dst, trans).row() % 4 == 0) {
        ggml_tensor * rows = gather.rows(src, trans, slots, first, in);

        if (gather.compute(backend, gather.store(rows, dst, trans, first, in_place))) {
            return;
        }
    }

    std::vector<uint8_t> from(src ? ggml_nbytes(src) : 0);
    std::vector<uint8_t> to  (ggml_nbytes(dst), 0);

    if (src) {
        ggml_backend_tensor_get(src, from.data(), 0, from.size());
        n_bounced += from.size();
    }
    copy_host(refreekv::row_bytes(src ? src : dst, trans, from.data()), refreekv::row_bytes(dst, trans, to.data()), moves, in, spare);
    ggml_backend_tensor_set(dst, to.data(), 0, to.size());
}

void rows::read(ggml_tensor * src, bool trans, const std::vector<uint32_t> & slots, ggml_backend_t backend, bool force_graph, refreekv::bytes & out) {
    const refreekv::row_bytes rows(src, trans);

    out.resize(slots.size()*rows.row());

    if (ggml_backend_buffer_is_host(src->buffer) && !force_graph) {
        rows.get(slots.data(), slots.size(), out.data());
        return;
    }

    refreekv::gather gather;

    if (backend && rows.row() % 4 == 0) {
        ggml_tensor * gathered = gather.rows(src, trans, slots, 0, {});

        if (gather.compute(backend, gathered)) {
            ggml_backend_tensor_get(gathered, out.data(), 0, out.size());
            return;
        }
    }

    std::vector<uint8_t> all(ggml_nbytes(src));
    ggml_backend_tensor_get(src, all.data(), 0, all.size());
    n_bounced += all.size();

    refreekv::row_bytes(src, trans, all.data()).get(slots.data(), slots.size(), out.data());
}

void rows::read(const std::vector<uint32_t> & slots, ggml_backend_t backend, bool force_graph, host_rows & out) {
    read(now.k, false, slots, backend, force_graph, out.k);
    if (now.v) {
        read(now.v, s.v_trans, slots, backend, force_graph, out.v);
    }
}

void rows::clear() {
    now   = {};
    n_cap = 0;

    region_k.reset();
    region_v.reset();
    buf.reset();
}

} // namespace refreekv
