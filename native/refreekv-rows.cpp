#include "refreekv-rows.h"

#include "ggml-alloc.h"

#include <atomic>
#include <cstring>

struct refreekv_run {
    size_t src;
    size_t dst;
    size_t n;
};

// consecutive source slots are copied in one piece
static std::vector<refreekv_run> refreekv_runs(const std::vector<uint32_t> & slots) {
    std::vector<refreekv_run> res;

    for (size_t i = 0; i < slots.size(); ++i) {
        if (slots[i] == refreekv_rows::none) {
            continue;
        }
        if (!res.empty() && i == res.back().dst + res.back().n && slots[i] == res.back().src + res.back().n) {
            res.back().n++;
        } else {
            res.push_back({ slots[i], i, 1 });
        }
    }

    return res;
}

static void refreekv_copy_host(const ggml_tensor * src, ggml_tensor * dst, const std::vector<refreekv_run> & runs, bool trans) {
    const size_t n_lines = trans ? src->ne[1]     : 1;
    const size_t el      = trans ? src->nb[0]     : src->nb[1];

    for (size_t j = 0; j < n_lines; ++j) {
        const char * ps = (const char *) src->data + j*src->nb[1];
              char * pd = (      char *) dst->data + j*dst->nb[1];

        for (const auto & r : runs) {
            memcpy(pd + r.dst*el, ps + r.src*el, r.n*el);
        }
    }
}

// rows as 32-bit words: get_rows copies those verbatim whatever the cache type is
static ggml_tensor * refreekv_gather_rows(ggml_context * ctx, ggml_tensor * src, ggml_tensor * dst, ggml_tensor * idxs) {
    const auto words = [&](ggml_tensor * t, int64_t n) {
        ggml_tensor * res = ggml_new_tensor_2d(ctx, GGML_TYPE_I32, t->nb[1]/4, n);
        res->buffer   = t->buffer;
        res->data     = t->data;
        return res;
    };

    ggml_tensor * cur = ggml_get_rows(ctx, words(src, src->ne[1]), idxs);

    return ggml_cpy(ctx, cur, words(dst, idxs->ne[0]));
}

// the transposed V has the cells along the first dimension; its types are never quantised, and a trip through f32 is exact
static ggml_tensor * refreekv_gather_cols(ggml_context * ctx, ggml_tensor * src, ggml_tensor * dst, ggml_tensor * idxs) {
    ggml_tensor * cur = ggml_cont(ctx, ggml_transpose(ctx, src));

    cur = ggml_get_rows(ctx, cur, idxs);
    cur = ggml_cont(ctx, ggml_transpose(ctx, cur));

    return ggml_cpy(ctx, cur, ggml_view_2d(ctx, dst, idxs->ne[0], dst->ne[1], dst->nb[1], 0));
}

static bool refreekv_copy_graph(ggml_backend_t backend, const std::vector<uint32_t> & slots,
        ggml_tensor * k_src, ggml_tensor * k_dst, ggml_tensor * v_src, ggml_tensor * v_dst, bool v_trans) {
    if (k_src->nb[1] % 4 != 0 || (!v_trans && v_src->nb[1] % 4 != 0)) {
        return false;
    }

    ggml_init_params params = { ggml_tensor_overhead()*32 + ggml_graph_overhead(), nullptr, true };

    ggml_context_ptr ctx { ggml_init(params) };

    ggml_tensor * idxs = ggml_new_tensor_1d(ctx.get(), GGML_TYPE_I32, slots.size());
    ggml_set_input(idxs);

    ggml_cgraph * gf = ggml_new_graph(ctx.get());
    ggml_build_forward_expand(gf, refreekv_gather_rows(ctx.get(), k_src, k_dst, idxs));
    ggml_build_forward_expand(gf, v_trans ? refreekv_gather_cols(ctx.get(), v_src, v_dst, idxs)
                                          : refreekv_gather_rows(ctx.get(), v_src, v_dst, idxs));

    for (int i = 0; i < ggml_graph_n_nodes(gf); ++i) {
        if (!ggml_backend_supports_op(backend, ggml_graph_node(gf, i))) {
            return false;
        }
    }

    ggml_gallocr_ptr galloc { ggml_gallocr_new(ggml_backend_get_default_buffer_type(backend)) };
    if (!ggml_gallocr_alloc_graph(galloc.get(), gf)) {
        return false;
    }

    std::vector<int32_t> sources;
    for (uint32_t slot : slots) {
        sources.push_back(slot == refreekv_rows::none ? 0 : slot);
    }
    ggml_backend_tensor_set(idxs, sources.data(), 0, ggml_nbytes(idxs));

    return ggml_backend_graph_compute(backend, gf) == GGML_STATUS_SUCCESS;
}

static std::atomic<int32_t> g_fail_in { 0 };

void refreekv_rows::fail_allocation(int32_t n) {
    g_fail_in = n;
}

// the last resort: through host memory, on any backend
static void refreekv_copy_bounce(ggml_tensor * src, ggml_tensor * dst, const std::vector<refreekv_run> & runs, bool trans) {
    const size_t n_lines = trans ? src->ne[1] : 1;
    const size_t el      = trans ? src->nb[0] : src->nb[1];

    std::vector<uint8_t> bytes;

    for (size_t j = 0; j < n_lines; ++j) {
        for (const auto & r : runs) {
            bytes.resize(r.n*el);
            ggml_backend_tensor_get(src, bytes.data(), j*src->nb[1] + r.src*el, bytes.size());
            ggml_backend_tensor_set(dst, bytes.data(), j*dst->nb[1] + r.dst*el, bytes.size());
        }
    }
}

size_t refreekv_rows::bytes() const {
    return st.buf ? ggml_backend_buffer_get_size(st.buf.get()) : 0;
}

size_t refreekv_rows::row_bytes() const {
    return ggml_row_size(s.type_k, s.n_embd_k) + ggml_row_size(s.type_v, s.n_embd_v);
}

bool refreekv_rows::alloc(storage & dst, uint32_t capacity) const {
    if (g_fail_in == 1) {
        return false;
    }
    if (g_fail_in > 1) {
        --g_fail_in;
    }

    ggml_init_params params = { 2*ggml_tensor_overhead(), nullptr, true };
    dst.ctx.reset(ggml_init(params));

    dst.k = ggml_new_tensor_2d(dst.ctx.get(), s.type_k, s.n_embd_k, capacity);
    dst.v = s.v_trans ? ggml_new_tensor_2d(dst.ctx.get(), s.type_v, capacity, s.n_embd_v)
                      : ggml_new_tensor_2d(dst.ctx.get(), s.type_v, s.n_embd_v, capacity);

    ggml_format_name(dst.k, "refreekv_k_l%d", il);
    ggml_format_name(dst.v, "refreekv_v_l%d", il);

    const size_t align  = ggml_backend_buft_get_alignment(s.buft);
    const size_t size_k = GGML_PAD(ggml_backend_buft_get_alloc_size(s.buft, dst.k), align);
    const size_t size_v = GGML_PAD(ggml_backend_buft_get_alloc_size(s.buft, dst.v), align);

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

    char * base = (char *) ggml_backend_buffer_get_base(dst.buf.get());

    return ggml_backend_tensor_alloc(dst.buf.get(), dst.k, base)          == GGML_STATUS_SUCCESS &&
           ggml_backend_tensor_alloc(dst.buf.get(), dst.v, base + size_k) == GGML_STATUS_SUCCESS;
}

bool refreekv_rows::move(const std::vector<uint32_t> & slots, uint32_t capacity, ggml_backend_t backend, bool force_graph) {
    GGML_ASSERT(slots.size() <= capacity);

    if (capacity == 0) {
        clear();
        return true;
    }

    storage dst;
    if (!alloc(dst, capacity)) {
        return false;
    }

    const auto runs = refreekv_runs(slots);

    if (!runs.empty()) {
        if (ggml_backend_buffer_is_host(st.buf.get()) && !force_graph) {
            refreekv_copy_host(st.k, dst.k, runs, false);
            refreekv_copy_host(st.v, dst.v, runs, s.v_trans);
        } else if (!backend || !refreekv_copy_graph(backend, slots, st.k, dst.k, st.v, dst.v, s.v_trans)) {
            refreekv_copy_bounce(st.k, dst.k, runs, false);
            refreekv_copy_bounce(st.v, dst.v, runs, s.v_trans);
        }
    }

    st    = std::move(dst);
    k     = st.k;
    v     = st.v;
    n_cap = capacity;

    return true;
}

void refreekv_rows::clear() {
    st    = {};
    k     = nullptr;
    v     = nullptr;
    n_cap = 0;
}
