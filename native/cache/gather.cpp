#include "cache/gather.h"

#include "cache/row-bytes.h"

#include "ggml-alloc.h"

#include <algorithm>

namespace refreekv {

gather::gather() {
    ggml_init_params params = { ggml_tensor_overhead()*32 + ggml_graph_overhead(), nullptr, true };
    ctx.reset(ggml_init(params));
}

ggml_tensor * gather::rows(ggml_tensor * src, bool trans, const std::vector<uint32_t> & slots, size_t i, const refreekv::bytes & in) {
    ggml_tensor * from = nullptr;

    if (src) {
        from = trans ? ggml_cont(ctx.get(), ggml_transpose(ctx.get(), src)) : src;
        from = as_type(from, GGML_TYPE_I32, from->ne[1]);
    }

    uint32_t next = src ? from->ne[1] : 0;
    for (; i < slots.size(); ++i) {
        idxs.push_back(slots[i] != row_bytes::none ? slots[i] : in.empty() ? 0 : next++);
    }

    if (!in.empty()) {
        const size_t  n_in = std::count(slots.begin(), slots.end(), row_bytes::none);
        ggml_tensor * more = upload(ggml_new_tensor_2d(ctx.get(), GGML_TYPE_I32, in.size()/n_in/4, n_in), in.data());

        from = from ? ggml_concat(ctx.get(), from, more, 1) : more;
    }

    return ggml_get_rows(ctx.get(), from, upload(ggml_new_tensor_1d(ctx.get(), GGML_TYPE_I32, idxs.size()), idxs.data()));
}

ggml_tensor * gather::store(ggml_tensor * rows, ggml_tensor * dst, bool trans, size_t i, bool in_place) {
    const int64_t n = rows->ne[1];

    if (!trans && !in_place) {
        rows->buffer = dst->buffer;
        rows->data   = dst->data;
        return rows;
    }
    if (!trans) {
        ggml_tensor * all = as_type(dst, GGML_TYPE_I32, dst->ne[1]);
        return ggml_cpy(ctx.get(), rows, ggml_view_2d(ctx.get(), all, all->ne[0], n, all->nb[1], i*all->nb[1]));
    }
    return ggml_cpy(ctx.get(), ggml_transpose(ctx.get(), as_type(rows, dst->type, n)), ggml_view_2d(ctx.get(), dst, n, dst->ne[1], dst->nb[1], i*dst->nb[0]));
}

bool gather::compute(ggml_backend_t backend, ggml_tensor * out) {
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

ggml_tensor * gather::upload(ggml_tensor * t, const void * data) {
    ggml_set_input(t);
    uploads.emplace_back(t, data);
    return t;
}

ggml_tensor * gather::as_type(ggml_tensor * t, ggml_type type, int64_t n) {
    ggml_tensor * res = ggml_view_2d(ctx.get(), t, t->ne[0], n, t->nb[1], 0);

    res->type  = type;
    res->ne[0] = t->nb[1]/ggml_type_size(type)*ggml_blck_size(type);
    res->nb[0] = ggml_type_size(type);

    return res;
}

} // namespace refreekv
