#include "evict/attention-graph.h"

#include "ggml-alloc.h"

#include <algorithm>
#include <cmath>
#include <mutex>
#include <numeric>

namespace refreekv {

// upper bound for the attention rows of one slice; the graphs need about twice as much
static const size_t REFREEKV_SLICE_BYTES = 64u*1024*1024;

static const float REFREEKV_BEHIND_ALL = 1 << 30; // a position

attention_graph::attention_graph(attention_inputs in_, attention_scratch & memory) : in(std::move(in_)), memory(memory) {
    n_cells = in.slots.size();
    n_rows  = in.rows.size();
    n_head  = in.n_head_kv*in.n_gqa;

    const size_t  size_kv   = sizeof(float)*in.n_kv*n_rows*in.n_gqa;

    n_head_kv_slice = std::clamp<int64_t>(REFREEKV_SLICE_BYTES/size_kv, 1, in.n_head_kv);

    if (in.max_bias > 0.0f) {
        n_head_kv_slice = in.n_head_kv; // the ALiBi slope depends on the head's index
    }

    if (in.use_alibi) {
        alibi_mask.assign(in.n_kv*n_rows, -INFINITY);
        for (uint32_t r = 0; r < n_rows; ++r) {
            for (uint32_t j = 0; j < n_cells && in.pos[j] <= in.row_pos[r]; ++j) {
                alibi_mask[r*in.n_kv + in.slots[j]] = -std::abs(in.pos[j] - in.row_pos[r]);
            }
        }
        return;
    }

    row_pos.assign(in.row_pos.begin(), in.row_pos.end());
    slot_pos.assign(in.n_kv, REFREEKV_BEHIND_ALL);
    for (uint32_t j = 0; j < n_cells; ++j) {
        slot_pos[in.slots[j]] = in.pos[j];
    }
}

// a leaf of a graph that is filled before it runs
template <typename T>
static ggml_tensor * upload(ggml_context * ctx, std::vector<std::pair<ggml_tensor *, const void *>> & ups, ggml_type type, int64_t ne0, int64_t ne1, const std::vector<T> & data, size_t first = 0) {
    ggml_tensor * t = ggml_new_tensor_2d(ctx, type, ne0, ne1);

    ggml_set_input(t);
    ups.emplace_back(t, data.data() + first);

    return t;
}

// b[j] - a[i]: [n_a, n_b]
static ggml_tensor * differences(ggml_context * ctx, ggml_tensor * a, ggml_tensor * b) {
    return ggml_sub(ctx, ggml_repeat_4d(ctx, b, a->ne[0], b->ne[1], 1, 1), a);
}

// [n_kv, n_rows]: 0 where a row sees a cell, else a number below which no logit lies
ggml_tensor * attention_graph::build_mask(ggml_context * ctx, uploads & ups) const {
    if (in.use_alibi) {
        return upload(ctx, ups, GGML_TYPE_F32, in.n_kv, n_rows, alibi_mask);
    }

    ggml_tensor * slots = upload(ctx, ups, GGML_TYPE_F32, in.n_kv, 1, slot_pos);
    ggml_tensor * rows  = upload(ctx, ups, GGML_TYPE_F32, 1, n_rows, row_pos);

    return ggml_clamp(ctx, ggml_scale(ctx, differences(ctx, slots, rows), 1e9f), -1e30f, 0.0f);
}

// f() once softmax holds the rows of a slice, for each slice in turn
template <typename F>
bool attention_graph::for_each_slice(F && f) {
    const bool all_in_one = n_head_kv_slice == in.n_head_kv;

    for (int64_t h = 0; h < in.n_head_kv; h += n_head_kv_slice) {
        const int64_t n = std::min(n_head_kv_slice, in.n_head_kv - h);

        if (!all_in_one || !softmax.out) {
            if (!compute(softmax, [&](ggml_context * ctx, uploads & ups) { return build_softmax(ctx, h, n, ups); })) {
                return false;
            }
        }
        if (!f()) {
            return false;
        }
    }

    return true;
}

template <typename F>
bool attention_graph::by_any_way(F && f) {
    do {
        unsupported = false;
        if (f()) {
            return true;
        }
    } while (unsupported && next_way());

    return false;
}

bool attention_graph::next_way() {
    softmax.out = nullptr;

    if (!dequantise && ggml_is_quantized(in.k->type)) {
        dequantise = true;
        all_slots.resize(in.n_kv);
        std::iota(all_slots.begin(), all_slots.end(), 0);
        return true;
    }
    if (in.backend == in.host) {
        return false;
    }

    ggml_init_params params = { 2*ggml_tensor_overhead(), nullptr, true };
    host_ctx.reset(ggml_init(params));

    const auto fetch = [&](ggml_tensor * & t) {
        ggml_tensor * there = t;

        t = ggml_dup_tensor(host_ctx.get(), there);
        return there;
    };
    const ggml_tensor * k    = fetch(in.k);
    const ggml_tensor * ring = fetch(in.ring);

    host_buf.reset(ggml_backend_alloc_ctx_tensors_from_buft(host_ctx.get(), ggml_backend_cpu_buffer_type()));
    if (!host_buf) {
        return false;
    }
    ggml_backend_tensor_get(k,    in.k->data,    0, ggml_nbytes(k));
    ggml_backend_tensor_get(ring, in.ring->data, 0, ggml_nbytes(ring));

    bytes_bounced += ggml_backend_buffer_get_size(host_buf.get());

    in.backend = in.host;
    dequantise = false;

    return true;
}

// of n_kv_heads KV heads from h_kv on: [n_kv, n_rows, n_head of the slice]
ggml_tensor * attention_graph::build_softmax(ggml_context * ctx, int64_t h_kv, int64_t n_kv_heads, uploads & ups) const {
    const int64_t n_gqa = in.n_gqa;

    ggml_tensor * bias = build_mask(ctx, ups);

    ggml_tensor * q = ggml_get_rows(ctx, in.ring, upload(ctx, ups, GGML_TYPE_I32, n_rows, 1, in.rows));

    q = ggml_reshape_3d(ctx, q, in.n_embd_head, q->ne[0]/in.n_embd_head, n_rows);
    if (n_kv_heads < in.n_head_kv) {
        q = ggml_cont(ctx, ggml_view_3d(ctx, q, q->ne[0], n_kv_heads*n_gqa, n_rows, q->nb[1], q->nb[2], h_kv*n_gqa*q->nb[1]));
    }
    q = ggml_permute(ctx, q, 0, 2, 1, 3);

    ggml_tensor * k = in.k;
    if (dequantise) {
        k = ggml_get_rows(ctx, k, upload(ctx, ups, GGML_TYPE_I32, in.n_kv, 1, all_slots));
    }

    const size_t head_bytes = ggml_row_size(k->type, in.n_embd_head);

    k = ggml_view_3d(ctx, k, in.n_embd_head, n_kv_heads, in.n_kv, head_bytes, k->nb[1], head_bytes*h_kv);
    k = ggml_permute(ctx, k, 0, 2, 1, 3);

    ggml_tensor * kq = ggml_mul_mat(ctx, k, q);
    ggml_prec_set_acc(kq, GGML_PREC_F32);

    if (in.soft_cap > 0.0f) {
        kq = ggml_scale(ctx, kq, in.pre_scale);
        kq = ggml_tanh (ctx, kq);
        kq = ggml_scale(ctx, kq, in.soft_cap);
    }

    kq = ggml_soft_max_ext(ctx, kq, bias, in.post_scale, in.max_bias);

    if (!in.sinks.empty()) {
        ggml_soft_max_add_sinks(kq, upload(ctx, ups, GGML_TYPE_F32, n_gqa*n_kv_heads, 1, in.sinks, n_gqa*h_kv));
    }

    return kq;
}

template <typename F>
bool attention_graph::compute(computed & res, F && f) {
    ggml_init_params params = { ggml_tensor_overhead()*128 + ggml_graph_overhead(), nullptr, true };

    res.out = nullptr;
    res.ctx.reset(ggml_init(params));

    auto & galloc = memory.graphs[{ res.kind, in.backend }];
    if (!galloc) {
        galloc.reset(ggml_gallocr_new(ggml_backend_get_default_buffer_type(in.backend)));
    }

    uploads ups;

    ggml_tensor * out = f(res.ctx.get(), ups);
    ggml_set_output(out);

    ggml_cgraph * gf = ggml_new_graph(res.ctx.get());
    ggml_build_forward_expand(gf, out);

    for (int i = 0; i < ggml_graph_n_nodes(gf); ++i) {
        if (!ggml_backend_supports_op(in.backend, ggml_graph_node(gf, i))) {
            unsupported = true;
            return false;
        }
    }

    if (!ggml_gallocr_alloc_graph(galloc.get(), gf)) {
        return false;
    }

    for (const auto & [t, data] : ups) {
        ggml_backend_tensor_set(t, data, 0, ggml_nbytes(t));
    }

    // layers may be looked at on several threads, and they have one backend
    static std::mutex mutex;
    std::lock_guard<std::mutex> lock(mutex);

    if (ggml_backend_graph_compute(in.backend, gf) != GGML_STATUS_SUCCESS) {
        return false;
    }

    res.out = out;

    return true;
}

// a tensor of another context that has its data already
static ggml_tensor * leaf(ggml_context * ctx, const ggml_tensor * t) {
    ggml_tensor * res = ggml_dup_tensor(ctx, t);

    res->buffer = t->buffer;
    res->data   = t->data;

    return res;
}

void attention_graph::read_back(std::vector<float> & out, const ggml_tensor * t) {
    out.resize(ggml_nelements(t));
    ggml_backend_tensor_get(t, out.data(), 0, ggml_nbytes(t));

    bytes_read += ggml_nbytes(t);
}

// sum over dimension 1 by halving: plain adds, which every backend has and runs at memory speed
static ggml_tensor * sum_dim1(ggml_context * ctx, ggml_tensor * t) {
    const auto rows = [&](ggml_tensor * t, int64_t i, int64_t n) {
        return ggml_view_3d(ctx, t, t->ne[0], n, t->ne[2], t->nb[1], t->nb[2], i*t->nb[1]);
    };

    ggml_tensor * odd = nullptr;

    while (t->ne[1] > 1) {
        const int64_t half = t->ne[1]/2;

        if (t->ne[1] % 2) {
            ggml_tensor * last = rows(t, t->ne[1] - 1, 1);
            odd = odd ? ggml_add(ctx, last, odd) : last;
        }
        t = ggml_add(ctx, rows(t, 0, half), rows(t, half, half));
    }

    return odd ? ggml_add(ctx, t, odd) : t;
}

bool attention_graph::scores(join heads, std::vector<float> & out) {
    return by_any_way([&]() { return scores_now(heads, out); });
}

bool attention_graph::scores_now(join heads, std::vector<float> & out) {
    out.assign(n_cells, 0.0f);

    computed           joined { 1, {} };
    std::vector<float> by_slot;

    return for_each_slice([&]() {
        const int64_t n = softmax.out->ne[2]; // heads of the slice

        const bool ok = compute(joined, [&](ggml_context * ctx, uploads &) {
            ggml_tensor * cur = leaf(ctx, softmax.out);

            cur = sum_dim1(ctx, cur);
            cur = ggml_scale(ctx, ggml_cont(ctx, cur), 1.0f/n_rows);
            cur = ggml_reshape_2d(ctx, cur, in.n_kv, n);

            return ggml_pool_2d(ctx, cur, heads == join::MAX ? GGML_OP_POOL_MAX : GGML_OP_POOL_AVG, 1, n, 1, n, 0, 0);
        });
        if (!ok) {
            return false;
        }

        read_back(by_slot, joined.out);

        for (uint32_t j = 0; j < n_cells; ++j) {
            const float score = by_slot[in.slots[j]];
            out[j] = heads == join::MAX ? std::max(out[j], score) : out[j] + score*n/n_head;
        }
        return true;
    });
}

bool attention_graph::read(float * out) {
    return by_any_way([&]() { return read_now(out); });
}

bool attention_graph::read_now(float * out) {
    std::vector<float> by_slot;

    return for_each_slice([&]() {
        read_back(by_slot, softmax.out);

        for (size_t first = 0; first < by_slot.size(); first += in.n_kv) {
            for (uint32_t j = 0; j < n_cells; ++j) {
                *out++ = by_slot[first + in.slots[j]];
            }
        }
        return true;
    });
}

// blocks are taken in chunks: which cell is in which would be a matrix that grows with the square of the context
static const uint32_t REFREEKV_CHUNK_BLOCKS = 64;

bool attention_graph::block_sums(const std::vector<int32_t> & block, uint32_t n_blocks, bool squared, std::vector<float> & out) {
    return by_any_way([&]() { return block_sums_now(block, n_blocks, squared, out); });
}

bool attention_graph::block_sums_now(const std::vector<int32_t> & block, uint32_t n_blocks, bool squared, std::vector<float> & out) {
    out.clear();

    computed           sums { 2, {} };
    std::vector<float> part;

    std::vector<float> of_slots(in.n_kv, -1.0f);
    for (uint32_t j = 0; j < n_cells; ++j) {
        of_slots[in.slots[j]] = block[j];
    }
    std::vector<float> numbers(n_blocks);
    std::iota(numbers.begin(), numbers.end(), 0.0f);

    return for_each_slice([&]() {
        const size_t n_lines = n_rows*softmax.out->ne[2];
        const size_t first   = out.size();

        out.resize(first + n_lines*n_blocks);

        for (uint32_t b0 = 0; b0 < n_blocks; b0 += REFREEKV_CHUNK_BLOCKS) {
            const uint32_t n = std::min(REFREEKV_CHUNK_BLOCKS, n_blocks - b0);

            const bool ok = compute(sums, [&](ggml_context * ctx, uploads & ups) {
                ggml_tensor * cur = leaf(ctx, softmax.out);
                cur = ggml_reshape_2d(ctx, cur, in.n_kv, n_lines); // the slice as one matrix

                if (squared) {
                    cur = ggml_sqr(ctx, cur);
                }

                ggml_tensor * slots  = upload(ctx, ups, GGML_TYPE_F32, in.n_kv, 1, of_slots);
                ggml_tensor * blocks = upload(ctx, ups, GGML_TYPE_F32, 1, n, numbers, b0);

                // 1 where a slot is of a block, else 0
                ggml_tensor * others = ggml_clamp(ctx, ggml_sqr(ctx, differences(ctx, slots, blocks)), 0.0f, 1.0f);

                return ggml_mul_mat(ctx, ggml_scale_bias(ctx, others, -1.0f, 1.0f), cur);
            });
            if (!ok) {
                return false;
            }

            read_back(part, sums.out);
            for (size_t l = 0; l < n_lines; ++l) {
                std::copy_n(part.begin() + l*n, n, out.begin() + first + l*n_blocks + b0);
            }
        }
        return true;
    });
}

} // namespace refreekv
