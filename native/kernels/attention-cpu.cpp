// Part of ggml's CPU backend (CMakeLists.txt).

#include "kernels/attention-cpu.h"

#include "kernels/lanes.h"

#ifdef REFREEKV_LANES

#include <algorithm>
#include <type_traits>

namespace refreekv {

static const int64_t CHUNK = 64; // cells
static const int64_t STEP  = 4;  // cells whose logits are in registers together

// vectors of rows that are in registers together: with STEP*TILE sums AVX-512 has 32 registers, others 16
#if defined(__AVX512F__)
static const int64_t TILE = 4;
#else
static const int64_t TILE = 2;
#endif

// the rows of a head are taken in tiles, of TILE vectors as long as there are so many: f(first row, vectors)
template <typename F>
static inline void for_tiles(int64_t n_padded_rows, F && f) {
    int64_t r = 0;
    for (; r + TILE*N_REG <= n_padded_rows; r += TILE*N_REG) {
        f(r, std::integral_constant<int64_t, TILE>());
    }
    for (; r < n_padded_rows; r += N_REG) {
        f(r, std::integral_constant<int64_t, 1>());
    }
}

// out[cell][row] = k[cell] . q[row], of STEP cells and a tile of rows; q: [n_embd_head][N*N_REG]
template <int64_t N>
static inline void dot_tile(const float * q, const float * k, int64_t k_stride, int64_t n_embd_head, float * out, int64_t out_stride) {
    reg acc[STEP][N] = {};

    for (int64_t d = 0; d < n_embd_head; ++d) {
        reg rows[N];
        for (int64_t v = 0; v < N; ++v) {
            rows[v] = load_reg(q + (d*N + v)*N_REG);
            hold(rows[v]);
        }
        for (int64_t i = 0; i < STEP; ++i) {
            for (int64_t v = 0; v < N; ++v) {
                acc[i][v] += k[i*k_stride + d]*rows[v];
            }
        }
    }
    for (int64_t i = 0; i < STEP; ++i) {
        for (int64_t v = 0; v < N; ++v) {
            store_reg(out + i*out_stride + v*N_REG, acc[i][v]);
        }
    }
}

// weights: per chunk of cells, head and row e^(logit - the largest of the chunk); factors make attention of them. Questions are
// answered by reading the weights once.
class attention_cpu : public refreekv::attention {
public:
    attention_cpu(const attention_inputs & in, attention_scratch & memory);

    bool scores(join heads, std::vector<float> & out) override;
    bool read(float * out) override;
    bool block_sums(const std::vector<int32_t> & block, uint32_t n_blocks, bool squared, std::vector<float> & out) override;

private:
    const attention_inputs in;

    attention_scratch & memory;

    const int64_t n_gqa;
    const int64_t n_padded_rows; // n_rows, rounded up to whole vectors
    const int64_t n_chunks;

    int64_t n_head_slice; // query heads whose weights are there together

    // of the slice that was computed last
    int64_t first_head = -1; // query head; -1: none was
    int64_t n_heads    = 0;

    std::vector<float> queries_memory;

    float * queries = nullptr;  // [n_heads][n_padded_rows][n_embd_head], in the order that dot_tile reads them
    std::vector<float> top;     // [n_chunks][n_heads][n_padded_rows]
    std::vector<float> factors; // the same

    size_t weights_bytes(int64_t n_heads) const;

    // [CHUNK][n_padded_rows]
    float * weights(int64_t chunk, int64_t head) const;

    template <typename F>
    void for_each_slice(F && f);

    void compute_slice(int64_t h, int64_t n);
    void pack_queries();
    void weigh_chunks();
    void join_chunks();
    void add_scores(join heads, float * out) const;
    void add_sums  (const std::vector<int32_t> & block, uint32_t n_blocks, bool squared, float * out) const;
};

attention_cpu::attention_cpu(const attention_inputs & in_, attention_scratch & memory) :
    in(in_), memory(memory), n_gqa(in.n_gqa), n_padded_rows(GGML_PAD(in.rows.size(), N_REG)), n_chunks((in.slots.size() + CHUNK - 1)/CHUNK) {
    n_cells = in.slots.size();
    n_rows  = in.rows.size();
    n_head  = in.n_head_kv*in.n_gqa;

    n_head_slice = std::clamp<int64_t>(memory.weights_limit/weights_bytes(1), 1, n_head);
}

size_t attention_cpu::weights_bytes(int64_t n_heads) const {
    return sizeof(float)*n_chunks*CHUNK*n_padded_rows*n_heads;
}

float * attention_cpu::weights(int64_t chunk, int64_t head) const {
    return (float *) memory.weights.data() + (chunk*n_heads + head)*CHUNK*n_padded_rows;
}

// f() once the weights of a slice are there, for each slice in turn
template <typename F>
void attention_cpu::for_each_slice(F && f) {
    for (int64_t h = 0; h < n_head; h += n_head_slice) {
        if (h != first_head) {
            compute_slice(h, std::min<int64_t>(n_head_slice, n_head - h));
        }
        f();
    }
}

void attention_cpu::compute_slice(int64_t h, int64_t n) {
    memory.weights.resize(weights_bytes(n));

    first_head = h;
    n_heads    = n;

    pack_queries();

    top.resize(n_chunks*n_heads*n_padded_rows);
    factors.resize(top.size());

    weigh_chunks();
    join_chunks();
}

void attention_cpu::pack_queries() {
    const int64_t n_embd_head = in.n_embd_head;

    const size_t size = n_heads*n_padded_rows*n_embd_head;

    queries = aligned(queries_memory, size);
    std::fill_n(queries, size, 0.0f);

    std::vector<float> row(n_embd_head);

    for (uint32_t r = 0; r < n_rows; ++r) {
        for (int64_t h = 0; h < n_heads; ++h) {
            const char * src = (const char *) in.ring->data + in.rows[r]*in.ring->nb[1] + (first_head + h)*n_embd_head*sizeof(ggml_fp16_t);
            ggml_cpu_fp16_to_fp32((const ggml_fp16_t *) src, row.data(), n_embd_head);

            float * dst = queries + h*n_padded_rows*n_embd_head;

            for_tiles(n_padded_rows, [&](int64_t r0, auto n) {
                const int64_t i = r - r0;
                for (int64_t d = 0; i >= 0 && i < n*N_REG && d < n_embd_head; ++d) {
                    dst[r0*n_embd_head + d*n*N_REG + i] = row[d];
                }
            });
        }
    }
}

void attention_cpu::weigh_chunks() {
    const int64_t n_embd_head = in.n_embd_head;
    const int64_t first_kv    = first_head/n_gqa;
    const int64_t n_embd      = n_embd_head*((first_head + n_heads - 1)/n_gqa - first_kv + 1); // of the KV heads of the slice

    const size_t k_first = ggml_row_size(in.k->type, first_kv*n_embd_head);

    // in registers: a store to the weights may be one to any of these, as far as the compiler knows
    const float pre_scale  = in.pre_scale;
    const float post_scale = in.post_scale;
    const float soft_cap   = in.soft_cap;
    const bool  use_alibi  = in.use_alibi;

    std::vector<float>   keys(CHUNK*n_embd);
    std::vector<int32_t> row_pos(n_padded_rows, INT32_MAX);
    std::copy(in.row_pos.begin(), in.row_pos.end(), row_pos.begin());

    for (int64_t chunk = 0; chunk < n_chunks; ++chunk) {
        const int64_t first = chunk*CHUNK;
        const int64_t n     = std::min<int64_t>(CHUNK, n_cells - first);

        for (int64_t i = 0; i < n; ++i) {
            to_float(in.k->type, (const char *) in.k->data + in.slots[first + i]*in.k->nb[1] + k_first, keys.data() + i*n_embd, n_embd);
        }

        // whether every row may see all of it, and nothing but the logits counts
        const bool plain = in.pos[first + n - 1] <= in.row_pos[0] && !in.use_alibi;

        for (int64_t h = 0; h < n_heads; ++h) {
            const float * k     = keys.data() + ((first_head + h)/n_gqa - first_kv)*n_embd_head;
            const float * q     = queries + h*n_padded_rows*n_embd_head;
            float *       w     = weights(chunk, h);
            float *       t     = top.data()     + (chunk*n_heads + h)*n_padded_rows;
            float *       total = factors.data() + (chunk*n_heads + h)*n_padded_rows;

            for (int64_t i = 0; i < n; i += STEP) {
                for_tiles(n_padded_rows, [&](int64_t r, auto n_tile) {
                    dot_tile<n_tile>(q + r*n_embd_head, k + i*n_embd, n_embd, n_embd_head, w + i*n_padded_rows + r, n_padded_rows);
                });
            }

            const float slope = alibi_slope(in.max_bias, first_head + h, n_head);

            for (int64_t r = 0; r < n_padded_rows; r += N_REG) {
                ireg at;
                memcpy(&at, row_pos.data() + r, sizeof(at));

                reg m = all(-INFINITY);

                for (int64_t i = 0; i < n; ++i) {
                    float * p = w + i*n_padded_rows + r;

                    reg x = load_reg(p)*pre_scale;
                    if (soft_cap > 0.0f) {
                        x = tanh(x)*soft_cap;
                    }
                    x *= post_scale;

                    if (!plain) {
                        const int32_t pos = in.pos[first + i];

                        if (use_alibi) {
                            x -= slope*__builtin_convertvector(at > pos ? at - pos : pos - at, reg);
                        }
                        x = at >= pos ? x : all(-INFINITY);
                    }
                    store_reg(p, x);
                    m = max(x, m);
                }

                reg sum = {};
                for (int64_t i = 0; i < n; ++i) {
                    float * p = w + i*n_padded_rows + r;

                    const reg x = exp_neg(m > -INFINITY ? load_reg(p) - m : all(-INFINITY));
                    store_reg(p, x);
                    sum += x;
                }
                for (int64_t i = n; i < CHUNK; ++i) {
                    store_reg(w + i*n_padded_rows + r, reg {});
                }

                store_reg(t     + r, m);
                store_reg(total + r, sum);
            }
        }
    }
}

// from the sums of the chunks to their factors
void attention_cpu::join_chunks() {
    const int64_t n_line = n_heads*n_padded_rows;

    for (int64_t l = 0; l < n_line; l += N_REG) {
        const float sink = in.sinks.empty() ? -INFINITY : in.sinks[first_head + l/n_padded_rows];

        reg m = all(sink);
        for (int64_t c = 0; c < n_chunks; ++c) {
            m = max(load_reg(top.data() + c*n_line + l), m);
        }

        const auto relative = [&](reg x) {
            return exp_neg(m > -INFINITY ? x - m : all(-INFINITY));
        };

        reg sum = relative(all(sink));
        for (int64_t c = 0; c < n_chunks; ++c) {
            sum += load_reg(factors.data() + c*n_line + l)*relative(load_reg(top.data() + c*n_line + l));
        }

        // rows that are there to fill vectors count for nothing
        reg inverse = {};
        for (int64_t i = 0; i < N_REG; ++i) {
            inverse[i] = l%n_padded_rows + i < n_rows && sum[i] > 0.0f ? 1.0f/sum[i] : 0.0f;
        }

        for (int64_t c = 0; c < n_chunks; ++c) {
            store_reg(factors.data() + c*n_line + l, relative(load_reg(top.data() + c*n_line + l))*inverse);
        }
    }
}

bool attention_cpu::scores(join heads, std::vector<float> & out) {
    out.assign(n_chunks*CHUNK, 0.0f);

    for_each_slice([&]() { add_scores(heads, out.data()); });
    out.resize(n_cells);

    return true;
}

void attention_cpu::add_scores(join heads, float * out) const {
    for (int64_t chunk = 0; chunk < n_chunks; ++chunk) {
        for (int64_t h = 0; h < n_heads; ++h) {
            const float * f = factors.data() + (chunk*n_heads + h)*n_padded_rows;

            for (int64_t i0 = 0; i0 < CHUNK; i0 += N_REG) {
                reg acc[N_REG];
                for (int64_t i = 0; i < N_REG; ++i) {
                    const float * w = weights(chunk, h) + (i0 + i)*n_padded_rows;

                    acc[i] = load_reg(w)*load_reg(f);
                    for (int64_t r = N_REG; r < n_padded_rows; r += N_REG) {
                        acc[i] += load_reg(w + r)*load_reg(f + r);
                    }
                }

                float *     p    = out + chunk*CHUNK + i0;
                const reg mean = sums(acc)/(float) n_rows;

                store_reg(p, heads == join::MAX ? max(load_reg(p), mean) : load_reg(p) + mean/(float) n_head);
            }
        }
    }
}

bool attention_cpu::block_sums(const std::vector<int32_t> & block, uint32_t n_blocks, bool squared, std::vector<float> & out) {
    out.assign((size_t) n_head*n_rows*n_blocks, 0.0f);

    for_each_slice([&]() { add_sums(block, n_blocks, squared, out.data() + first_head*n_rows*n_blocks); });

    return true;
}

void attention_cpu::add_sums(const std::vector<int32_t> & block, uint32_t n_blocks, bool squared, float * out) const {
    std::vector<float> sums(n_heads*n_blocks*n_padded_rows, 0.0f); // [n_heads][n_blocks][n_padded_rows]

    for (int64_t chunk = 0; chunk < n_chunks; ++chunk) {
        const int64_t n = std::min<int64_t>(CHUNK, n_cells - chunk*CHUNK);

        for (int64_t h = 0; h < n_heads; ++h) {
            const float * w = weights(chunk, h);
            const float * f = factors.data() + (chunk*n_heads + h)*n_padded_rows;

            for (int64_t i = 0; i < n; ++i) {
                const int32_t b = block[chunk*CHUNK + i];

                for (int64_t r = 0; b >= 0 && r < n_padded_rows; r += N_REG) {
                    const reg a = load_reg(w + i*n_padded_rows + r)*load_reg(f + r);
                    float *     p = sums.data() + (h*n_blocks + b)*n_padded_rows + r;

                    store_reg(p, load_reg(p) + (squared ? a*a : a));
                }
            }
        }
    }

    for (int64_t h = 0; h < n_heads; ++h) {
        for (uint32_t r = 0; r < n_rows; ++r) {
            for (uint32_t b = 0; b < n_blocks; ++b) {
                *out++ = sums[(h*n_blocks + b)*n_padded_rows + r];
            }
        }
    }
}

bool attention_cpu::read(float * out) {
    for_each_slice([&]() {
        for (int64_t h = 0; h < n_heads; ++h) {
            float * head = out + (first_head + h)*n_rows*n_cells;

            for (uint32_t j = 0; j < n_cells; ++j) {
                const float * w = weights(j/CHUNK, h) + j%CHUNK*n_padded_rows;
                const float * f = factors.data() + (j/CHUNK*n_heads + h)*n_padded_rows;

                for (uint32_t r = 0; r < n_rows; ++r) {
                    head[r*n_cells + j] = w[r]*f[r];
                }
            }
        }
    });

    return true;
}

std::unique_ptr<refreekv::attention> make_attention_cpu(const attention_inputs & in, attention_scratch & memory) {
    const bool fits = ggml_backend_is_cpu(in.backend) && in_host_memory(in.k) && in_host_memory(in.ring) && in.ring->type == GGML_TYPE_F16 &&
                      has_to_float(in.k->type) && in.n_embd_head % ggml_blck_size(in.k->type) == 0;

    return fits ? std::make_unique<attention_cpu>(in, memory) : nullptr;
}

} // namespace refreekv

#endif
