#include "graph/heads.h"

#include <algorithm>

// appends n heads of t from the i-th on
static ggml_tensor * refreekv_append_heads(ggml_context * ctx, ggml_tensor * res, ggml_tensor * t, int64_t i, int64_t n) {
    ggml_tensor * part = ggml_view_3d(ctx, t, t->ne[0], n, t->ne[2], t->nb[1], t->nb[2], i*t->nb[1]);

    return res ? ggml_concat(ctx, res, part, 1) : part;
}

ggml_tensor * refreekv_select_heads(ggml_context * ctx, ggml_tensor * t, const std::vector<uint32_t> & heads, int64_t n_gqa) {
    if (t->ne[1] == (int64_t) heads.size()*n_gqa) {
        return t;
    }

    ggml_tensor * res = nullptr;

    for (size_t i = 0, n = 0; i < heads.size(); i += n) {
        n = 1;
        while (i + n < heads.size() && heads[i + n] == heads[i] + n) {
            ++n;
        }
        res = refreekv_append_heads(ctx, res, t, heads[i]*n_gqa, n*n_gqa);
    }

    return ggml_cont(ctx, res);
}

ggml_tensor * refreekv_join_heads(ggml_context * ctx, const std::vector<ggml_tensor *> & parts, const std::vector<std::vector<uint32_t>> & heads, int64_t n_gqa) {
    struct place {
        size_t part;
        size_t index;
    };
    std::vector<place> places;

    for (size_t p = 0; p < heads.size(); ++p) {
        for (size_t i = 0; i < heads[p].size(); ++i) {
            places.resize(std::max<size_t>(places.size(), heads[p][i] + 1));
            places[heads[p][i]] = { p, i };
        }
    }

    const int64_t n_tokens = parts[0]->ne[1];

    ggml_tensor * res = nullptr;

    for (size_t h = 0, n = 0; h < places.size(); h += n) {
        const auto [p, i] = places[h];

        n = 1;
        while (h + n < places.size() && places[h + n].part == p && places[h + n].index == i + n) {
            ++n;
        }

        const int64_t n_head = heads[p].size()*n_gqa;

        ggml_tensor * part = ggml_reshape_3d(ctx, parts[p], parts[p]->ne[0]/n_head, n_head, n_tokens);

        res = refreekv_append_heads(ctx, res, part, i*n_gqa, n*n_gqa);
    }

    return ggml_reshape_2d(ctx, res, res->ne[0]*res->ne[1], n_tokens);
}
