#include "tiers/code-tensors.h"

#include "api/process.h"
#include "kernels/codes.h"
#include "kernels/device/call.h"
#include "kernels/kernels.h"

#include <algorithm>
#include <cstring>
#include <new>
#include <numeric>
#include <tuple>

namespace refreekv {

static const uint32_t N_STEP = 4; // blocks: the room is a multiple of it

// All of the room is computed with, so it grows by a sixteenth, but not for cells that are known to be the first
static uint32_t room_for(uint32_t n_blocks, bool first) {
    return GGML_PAD(first ? n_blocks : n_blocks + n_blocks/16, N_STEP);
}

code_tensors::pair code_tensors::make_tensors(ggml_context * ctx, ggml_type type_v, int64_t n_head_kv, int64_t n_k, int64_t n_v, int64_t capacity) {
    return { ggml_new_tensor_3d(ctx, TYPE_K, padded(n_k), capacity, n_head_kv), ggml_new_tensor_3d(ctx, type_v, capacity, n_v, n_head_kv), nullptr, nullptr };
}

code_tensors::pair code_tensors::make_kernel_tensors(ggml_context * ctx, int64_t n_head_kv, int64_t n_k, int64_t n_v, int64_t n_blocks) {
    return {
        ggml_new_tensor_3d(ctx, GGML_TYPE_I8, codes_bytes(n_k, tiles::BITS_K), n_blocks, n_head_kv),
        ggml_new_tensor_3d(ctx, GGML_TYPE_I8, codes_bytes(n_v, tiles::BITS_V), n_blocks, n_head_kv),
        ggml_new_tensor_1d(ctx, GGML_TYPE_I64, n_blocks*N_CELLS), ggml_new_tensor_1d(ctx, GGML_TYPE_I64, n_head_kv),
    };
}

size_t code_tensors::block_k() const {
    return for_kernels() ? codes_bytes(n_k, tiles::BITS_K) : N_CELLS*line_k(n_k);
}

size_t code_tensors::line_v(uint32_t n_blocks) const {
    return for_kernels() ? n_blocks*codes_bytes(n_v, tiles::BITS_V) : ggml_row_size(type_v, n_blocks*N_CELLS);
}

code_tensors::tensors code_tensors::allocate(uint32_t n_blocks) const {
    tensors res = {};

    ggml_init_params params = { 4*ggml_tensor_overhead(), nullptr, true };
    res.ctx.reset(ggml_init(params));

    static_cast<pair &>(res) = for_kernels() ? make_kernel_tensors(res.ctx.get(), n_head_kv, n_k, n_v, n_blocks)
                                             : make_tensors(res.ctx.get(), type_v, n_head_kv, n_k, n_v, n_blocks*N_CELLS);

    ggml_format_name(res.k, "refreekv_codes_k_l%d", il);
    ggml_format_name(res.v, "refreekv_codes_v_l%d", il);

    if (!allocation_failure.now()) {
        res.buf.reset(ggml_backend_alloc_ctx_tensors_from_buft(res.ctx.get(), buft));
    }
    if (!res.buf) {
        throw std::bad_alloc();
    }
    ggml_backend_buffer_clear(res.buf.get(), 0);

    return res;
}

void code_tensors::replace_by(tensors && then) {
    n_counted = take_n_read();
    sent_exact.clear();
    now = std::move(then);
}

void code_tensors::set_exact(const std::vector<uint64_t> & addresses) {
    if (addresses != sent_exact && !addresses.empty()) {
        ggml_backend_tensor_set(now.exact, addresses.data(), 0, addresses.size()*sizeof(addresses[0]));
        sent_exact = addresses;
    }
}

uint64_t code_tensors::take_n_read() {
    uint64_t res = n_counted;
    if (now.n_read) {
        ggml_backend_tensor_get(now.n_read, by_heads.data(), 0, ggml_nbytes(now.n_read));
        ggml_backend_tensor_memset(now.n_read, 0, 0, ggml_nbytes(now.n_read));

        res = std::accumulate(by_heads.begin(), by_heads.end(), res);
    }
    n_counted = 0;
    return res;
}

// block i gets what block order[i] has
void code_tensors::move_to(tensors && then, const std::vector<uint32_t> & order) {
    if (now.k && !order.empty()) {
        auto from = make(n_room());
        auto to   = make(order.size());

        get(0, from);

        const size_t block_v = line_v(1);

        for (size_t i = 0; i < order.size(); ++i) {
            for (int64_t h = 0; h < n_head_kv; ++h) {
                memcpy(to.k.data() + (h*to.n + i)*block_k(), from.k.data() + (h*from.n + order[i])*block_k(), block_k());
            }
            for (int64_t c = 0; c < n_head_kv*n_lines_v(); ++c) {
                memcpy(to.v.data() + (c*to.n + i)*block_v, from.v.data() + (c*from.n + order[i])*block_v, block_v);
            }
        }
        replace_by(std::move(then));
        set(0, to);
    } else {
        replace_by(std::move(then));
    }
}

bool code_tensors::copy_to(const tensors & then) const {
    ggml_backend_t its = backend();
    if (!its) {
        return false;
    }
    ggml_init_params params = { ggml_tensor_overhead()*16 + ggml_graph_overhead(), nullptr, true };
    ggml_context_ptr ctx { ggml_init(params) };

    // n lines as 32-bit words, which a copy takes as they are
    const auto words = [&](ggml_tensor * t, size_t bytes, int64_t n, size_t line) {
        ggml_tensor * res = ggml_view_1d(ctx.get(), t, ggml_blck_size(t->type), 0);

        res->type  = GGML_TYPE_I32;
        res->ne[0] = bytes/sizeof(int32_t);
        res->ne[1] = n;
        res->nb[0] = sizeof(int32_t);
        res->nb[1] = line;
        res->nb[2] = res->nb[3] = line*n;

        return res;
    };

    ggml_cgraph * gf = ggml_new_graph(ctx.get());

    for (const auto & [src, dst, n] : { std::tuple { now.k, then.k, n_head_kv }, std::tuple { now.v, then.v, n_head_kv*n_lines_v() } }) {
        const size_t line_src = ggml_nbytes(src)/n;
        const size_t line_dst = ggml_nbytes(dst)/n;

        ggml_tensor * node = ggml_cpy(ctx.get(), words(src, line_src, n, line_src), words(dst, line_src, n, line_dst));
        if (!ggml_backend_supports_op(its, node)) {
            return false;
        }
        ggml_build_forward_expand(gf, node);
    }
    return ggml_backend_graph_compute(its, gf) == GGML_STATUS_SUCCESS;
}

void code_tensors::reserve(uint32_t n) {
    if (n <= n_room()) {
        return;
    }
    std::vector<uint32_t> order(n_room());
    std::iota(order.begin(), order.end(), 0);

    tensors then = allocate(room_for(n, n_room() == 0));

    // layers in host memory grow beside each other, and a backend computes one graph at a time
    if (now.k && !ggml_backend_buffer_is_host(now.buf.get()) && copy_to(then)) {
        replace_by(std::move(then));
    } else {
        move_to(std::move(then), order);
    }
}

void code_tensors::arrange(const std::vector<uint32_t> & order) {
    if (order.empty()) {
        replace_by({});
        return;
    }
    tensors then = {};
    try {
        then = allocate(room_for(order.size(), false));
    } catch (const std::bad_alloc &) {
        std::vector<uint32_t> dst(order.size());
        std::iota(dst.begin(), dst.end(), 0);
        copy(order, dst);
        return;
    }
    move_to(std::move(then), order);
}

void code_tensors::copy(const std::vector<uint32_t> & src, const std::vector<uint32_t> & dst) {
    std::vector<blocks> all; // before any is overwritten
    for (uint32_t b : src) {
        all.push_back(make(1));
        get(b, all.back());
    }
    for (size_t i = 0; i < dst.size(); ++i) {
        set(dst[i], all[i]);
    }
}

void code_tensors::encode(blocks & to, uint32_t i, int64_t n, const float * k, int64_t stride_k, const float * v, int64_t stride_v) const {
    if (for_kernels()) {
        const auto * kernels = find_kernels();

        for (int64_t h = 0; h < n_head_kv; ++h) {
            kernels->encode(k + h*n_k, stride_k, n, n_k, tiles::BITS_K, false, to.k.data() + (h*to.n + i)*block_k());
            kernels->encode(v + h*n_v, stride_v, n, n_v, tiles::BITS_V, true,  to.v.data() + (h*to.n + i)*line_v(1));
        }
        return;
    }
    const auto to_k = ggml_get_type_traits(TYPE_K)->from_float_ref;
    const auto to_v = ggml_get_type_traits(type_v)->from_float_ref;

    const int64_t n_line = padded(n_k);

    std::vector<float> line(std::max<int64_t>(n_line, N_CELLS), 0.0f);

    for (int64_t h = 0; h < n_head_kv; ++h) {
        for (int64_t c = 0; c < n; ++c) {
            std::copy_n(k + c*stride_k + h*n_k, n_k, line.data());
            to_k(line.data(), to.k.data() + ((h*to.n + i)*N_CELLS + c)*line_k(n_k), n_line);
        }
    }

    std::fill(line.begin(), line.end(), 0.0f);

    for (int64_t channel = 0; channel < n_head_kv*n_v; ++channel) {
        for (int64_t c = 0; c < n; ++c) {
            line[c] = v[c*stride_v + channel];
        }
        to_v(line.data(), to.v.data() + (channel*to.n + i)*line_v(1), N_CELLS);
    }
}

void code_tensors::set(uint32_t first, const blocks & from) {
    const size_t piece_k = from.n*block_k();
    const size_t piece_v = line_v(from.n);

    ggml_backend_tensor_set_2d(now.k, from.k.data(), first*block_k(), piece_k, n_head_kv,               n_room()*block_k(), piece_k);
    ggml_backend_tensor_set_2d(now.v, from.v.data(), line_v(first),   piece_v, n_head_kv*n_lines_v(), line_v(n_room()),   piece_v);
}

void code_tensors::get(uint32_t first, blocks & to) const {
    const size_t piece_k = to.n*block_k();
    const size_t piece_v = line_v(to.n);

    ggml_backend_tensor_get_2d(now.k, to.k.data(), first*block_k(), piece_k, n_head_kv,               n_room()*block_k(), piece_k);
    ggml_backend_tensor_get_2d(now.v, to.v.data(), line_v(first),   piece_v, n_head_kv*n_lines_v(), line_v(n_room()),   piece_v);
}

} // namespace refreekv
