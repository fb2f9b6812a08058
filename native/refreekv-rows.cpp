#include "refreekv-rows.h"

#include "refreekv-row-bytes.h"

#include "ggml-alloc.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <functional>
#include <tuple>

// in: the rows of slots that have no source
static void refreekv_copy_host(const refreekv_row_bytes & src, refreekv_row_bytes dst, const std::vector<uint32_t> & slots, const refreekv_bytes & in) {
    dst.copy(src, slots);

    if (in.empty()) {
        return;
    }
    std::vector<uint32_t> others;
    for (size_t i = 0; i < slots.size(); ++i) {
        if (slots[i] == refreekv_rows::none) {
            others.push_back(i);
        }
    }
    dst.set(others.data(), others.size(), in.data());
}

// A graph that gathers rows on a backend. Rows are 32-bit words to it: get_rows and concat copy those verbatim on every
// backend, whatever the type of the cache.
class refreekv_gather {
public:
    refreekv_gather() {
        ggml_init_params params = { ggml_tensor_overhead()*32 + ggml_graph_overhead(), nullptr, true };
        ctx.reset(ggml_init(params));
    }

    // the rows of a list of slots, one after the other; into dst, when it is not transposed
    ggml_tensor * rows(ggml_tensor * src, bool trans, const std::vector<uint32_t> & slots, const refreekv_bytes & in, ggml_tensor * dst) {
        ggml_tensor * from = nullptr;

        if (src) {
            from = trans ? ggml_cont(ctx.get(), ggml_transpose(ctx.get(), src)) : src;
            from = as_type(from, GGML_TYPE_I32, from->ne[1]);
        }

        uint32_t next = src ? from->ne[1] : 0;
        for (uint32_t slot : slots) {
            idxs.push_back(slot != refreekv_rows::none ? slot : in.empty() ? 0 : next++);
        }

        if (!in.empty()) {
            const size_t  n_in = std::count(slots.begin(), slots.end(), refreekv_rows::none);
            ggml_tensor * more = upload(ggml_new_tensor_2d(ctx.get(), GGML_TYPE_I32, in.size()/n_in/4, n_in), in.data());

            from = from ? ggml_concat(ctx.get(), from, more, 1) : more;
        }

        ggml_tensor * res = ggml_get_rows(ctx.get(), from, upload(ggml_new_tensor_1d(ctx.get(), GGML_TYPE_I32, idxs.size()), idxs.data()));
        if (dst && !trans) {
            res->buffer = dst->buffer;
            res->data   = dst->data;
        }
        return res;
    }

    // rows() of a transposed tensor to where they belong
    ggml_tensor * store_transposed(ggml_tensor * rows, ggml_tensor * dst) {
        const int64_t n = rows->ne[1];

        return ggml_cpy(ctx.get(), ggml_transpose(ctx.get(), as_type(rows, dst->type, n)), ggml_view_2d(ctx.get(), dst, n, dst->ne[1], dst->nb[1], 0));
    }

    bool compute(ggml_backend_t backend, ggml_tensor * out) {
        ggml_set_output(out);

        ggml_cgraph * gf = ggml_new_graph(ctx.get());
        ggml_build_forward_expand(gf, out);

        for (int i = 0; i < ggml_graph_n_nodes(gf); ++i) {
            if (!ggml_backend_supports_op(backend, ggml_graph_node(gf, i))) {
                return false;
            }
        }

        galloc.reset(ggml_gallocr_new(ggml_backend_get_default_buffer_type(backend)));
        if (!ggml_gallocr_alloc_graph(galloc.get(), gf)) {
            return false;
        }

        for (const auto & [t, data] : uploads) {
            ggml_backend_tensor_set(t, data, 0, ggml_nbytes(t));
        }

        return ggml_backend_graph_compute(backend, gf) == GGML_STATUS_SUCCESS;
    }

private:
    ggml_context_ptr ctx;
    ggml_gallocr_ptr galloc;

    std::vector<int32_t> idxs;
    std::vector<std::pair<ggml_tensor *, const void *>> uploads;

    ggml_tensor * upload(ggml_tensor * t, const void * data) {
        ggml_set_input(t);
        uploads.emplace_back(t, data);
        return t;
    }

    // the first n rows of a contiguous tensor, read as another type
    ggml_tensor * as_type(ggml_tensor * t, ggml_type type, int64_t n) {
        ggml_tensor * res = ggml_view_2d(ctx.get(), t, t->ne[0], n, t->nb[1], 0);

        res->type  = type;
        res->ne[0] = t->nb[1]/ggml_type_size(type)*ggml_blck_size(type);
        res->nb[0] = ggml_type_size(type);

        return res;
    }
};

static std::atomic<int32_t> g_fail_in { 0 };

void refreekv_rows::fail_allocation(int32_t n) {
    g_fail_in = n;
}

size_t refreekv_rows::bytes() const {
    return st.buf ? ggml_backend_buffer_get_size(st.buf.get()) : 0;
}

size_t refreekv_rows::row_bytes() const {
    return ggml_row_size(s.type_k, s.n_embd_k) + ggml_row_size(s.type_v, s.n_embd_v);
}

void refreekv_rows::make_tensors(storage & dst, uint32_t capacity, size_t & size_k, size_t & size_v) const {
    ggml_init_params params = { 2*ggml_tensor_overhead(), nullptr, true };
    dst.ctx.reset(ggml_init(params));

    dst.k = ggml_new_tensor_2d(dst.ctx.get(), s.type_k, s.n_embd_k, capacity);
    dst.v = s.v_trans ? ggml_new_tensor_2d(dst.ctx.get(), s.type_v, capacity, s.n_embd_v)
                      : ggml_new_tensor_2d(dst.ctx.get(), s.type_v, s.n_embd_v, capacity);

    ggml_format_name(dst.k, "refreekv_k_l%d", il);
    ggml_format_name(dst.v, "refreekv_v_l%d", il);

    const size_t align = ggml_backend_buft_get_alignment(s.buft);

    size_k = GGML_PAD(ggml_backend_buft_get_alloc_size(s.buft, dst.k), align);
    size_v = GGML_PAD(ggml_backend_buft_get_alloc_size(s.buft, dst.v), align);
}

// K at the beginning of the buffer, V behind it
bool refreekv_rows::place_tensors(storage & dst, size_t size_k) {
    char * base = (char *) ggml_backend_buffer_get_base(dst.buf.get());

    return ggml_backend_tensor_alloc(dst.buf.get(), dst.k, base)          == GGML_STATUS_SUCCESS &&
           ggml_backend_tensor_alloc(dst.buf.get(), dst.v, base + size_k) == GGML_STATUS_SUCCESS;
}

bool refreekv_rows::alloc(storage & dst, uint32_t capacity) const {
    int32_t n = g_fail_in;
    while (n > 1 && !g_fail_in.compare_exchange_weak(n, n - 1)) {
    }
    if (n == 1) {
        return false;
    }

    size_t size_k;
    size_t size_v;
    make_tensors(dst, capacity, size_k, size_v);

    if (s.buft == ggml_backend_cpu_buffer_type()) {
        dst.pages = refreekv_pages_alloc(size_k + size_v);
        if (dst.pages) {
            dst.buf.reset(ggml_backend_cpu_buffer_from_ptr(dst.pages.get(), size_k + size_v));
        }
    } else {
        dst.buf.reset(ggml_backend_buft_alloc_buffer(s.buft, size_k + size_v));
        if (dst.buf) {
            // rows that are not written yet are masked, but must be finite
            ggml_backend_buffer_clear(dst.buf.get(), 0);
        }
    }

    if (!dst.buf) {
        return false;
    }

    return place_tensors(dst, size_k);
}

void refreekv_rows::move(ggml_tensor * src, ggml_tensor * dst, bool trans, const std::vector<uint32_t> & slots, ggml_backend_t backend, bool force_graph, const refreekv_bytes & in) {
    const bool host = ggml_backend_buffer_is_host(dst->buffer);

    if (host && !force_graph) {
        refreekv_copy_host(refreekv_row_bytes(src ? src : dst, trans), refreekv_row_bytes(dst, trans), slots, in);
        return;
    }

    refreekv_gather gather;

    if (backend && refreekv_row_bytes(dst, trans).row() % 4 == 0) {
        ggml_tensor * rows = gather.rows(src, trans, slots, in, dst);

        if (gather.compute(backend, trans ? gather.store_transposed(rows, dst) : rows)) {
            return;
        }
    }

    std::vector<uint8_t> from(src ? ggml_nbytes(src) : 0);
    std::vector<uint8_t> to  (ggml_nbytes(dst), 0);

    if (src) {
        ggml_backend_tensor_get(src, from.data(), 0, from.size());
        n_bounced += from.size();
    }
    refreekv_copy_host(refreekv_row_bytes(src ? src : dst, trans, from.data()), refreekv_row_bytes(dst, trans, to.data()), slots, in);
    ggml_backend_tensor_set(dst, to.data(), 0, to.size());
}

void refreekv_rows::read(ggml_tensor * src, bool trans, const std::vector<uint32_t> & slots, ggml_backend_t backend, bool force_graph, refreekv_bytes & out) {
    const refreekv_row_bytes rows(src, trans);

    out.resize(slots.size()*rows.row());

    if (ggml_backend_buffer_is_host(src->buffer) && !force_graph) {
        rows.get(slots.data(), slots.size(), out.data());
        return;
    }

    refreekv_gather gather;

    if (backend && rows.row() % 4 == 0) {
        ggml_tensor * gathered = gather.rows(src, trans, slots, {}, nullptr);

        if (gather.compute(backend, gathered)) {
            ggml_backend_tensor_get(gathered, out.data(), 0, out.size());
            return;
        }
    }

    std::vector<uint8_t> all(ggml_nbytes(src));
    ggml_backend_tensor_get(src, all.data(), 0, all.size());
    n_bounced += all.size();

    refreekv_row_bytes(src, trans, all.data()).get(slots.data(), slots.size(), out.data());
}

bool refreekv_rows::move(const std::vector<uint32_t> & slots, uint32_t capacity, ggml_backend_t backend, bool force_graph, const host_rows & in) {
    GGML_ASSERT(slots.size() <= capacity);

    if (capacity == 0) {
        clear();
        return true;
    }

    if (in.k.empty() && !force_graph && compact(slots, capacity)) {
        return true;
    }

    storage dst;
    if (!alloc(dst, capacity)) {
        return false;
    }

    const bool any = !in.k.empty() || std::any_of(slots.begin(), slots.end(), [](uint32_t slot) { return slot != none; });

    if (any) {
        move(st.k, dst.k, false,     slots, backend, force_graph, in.k);
        move(st.v, dst.v, s.v_trans, slots, backend, force_graph, in.v);
    }

    take(std::move(dst), capacity);

    return true;
}

void refreekv_rows::take(storage && dst, uint32_t capacity) {
    st    = std::move(dst);
    k     = st.k;
    v     = st.v;
    n_cap = capacity;
}

bool refreekv_rows::compact(const std::vector<uint32_t> & slots, uint32_t capacity) {
    const bool ascending = std::adjacent_find(slots.begin(), slots.end(), std::greater_equal<uint32_t>()) == slots.end();

    if (!refreekv_pages_can_shrink() || !st.pages || capacity > n_cap || !ascending || (!slots.empty() && slots.back() == none)) {
        return false;
    }

    storage dst;
    size_t  size_k;
    size_t  size_v;
    make_tensors(dst, capacity, size_k, size_v);

    dst.buf.reset(ggml_backend_cpu_buffer_from_ptr(st.pages.get(), size_k + size_v));
    if (!dst.buf || !place_tensors(dst, size_k)) {
        return false;
    }

    // K first: V comes to where K's end was
    for (const auto & [from, to, trans] : { std::make_tuple(st.k, dst.k, false), std::make_tuple(st.v, dst.v, s.v_trans) }) {
        refreekv_row_bytes rows(to, trans);
        rows.copy(refreekv_row_bytes(from, trans), slots);
        rows.clear(slots.size(), capacity);
    }

    dst.pages = std::move(st.pages);
    refreekv_pages_shrink(dst.pages, size_k + size_v);

    take(std::move(dst), capacity);

    return true;
}

void refreekv_rows::read(const std::vector<uint32_t> & slots, ggml_backend_t backend, bool force_graph, host_rows & out) {
    read(st.k, false,     slots, backend, force_graph, out.k);
    read(st.v, s.v_trans, slots, backend, force_graph, out.v);
}

void refreekv_rows::clear() {
    st    = {};
    k     = nullptr;
    v     = nullptr;
    n_cap = 0;
}
