// Part of ggml's CPU backend (CMakeLists.txt).

#include "kernels/decode.h"

#include "kernels/decode-evicted.h"
#include "kernels/tiles.h"

#ifdef REFREEKV_LANES

#include "ggml-backend.h"

#include <algorithm>
#include <cmath>
#include <vector>

static const int64_t CHUNK = 128; // cells; what one thread takes at a time

// Tokens of a batch. Longer ones are faster with upstream's operations, which cannot read evicted blocks; with some, the limit
// covers drafts and many sequences, and bounds the memory of the parts.
static const int64_t MAX_TOKENS         = 4;
static const int64_t MAX_TOKENS_EVICTED = 32;

static bool is_trans(const ggml_tensor * v) {
    return v->nb[1] > v->nb[2];
}

static int64_t head_size_v(const ggml_tensor * v) {
    return v->ne[is_trans(v) ? 2 : 0];
}

// dst: [n_embd_head_v + N_LANES, n_head*n_tokens, n_chunks]; after each weighted sum of V the maximum of the scores and the
// sum of the weights
static void decode_chunks(ggml_tensor * dst, int ith, int nth, void * userdata) {
    const ggml_tensor * q    = dst->src[0];
    const ggml_tensor * k    = dst->src[1];
    const ggml_tensor * v    = dst->src[2];
    const ggml_tensor * mask = dst->src[3];

    const auto & by = *(const refreekv_decode_softmax *) userdata;

    const bool v_trans = is_trans(v);

    const int64_t n_head    = q->ne[1];
    const int64_t n_tokens  = q->ne[2];
    const int64_t n_head_kv = k->ne[1];
    const int64_t n_gqa     = n_head/n_head_kv;
    const int64_t n_k       = k->ne[0];
    const int64_t n_v       = dst->ne[0] - N_LANES;
    const int64_t n_rows_k  = n_k*n_head_kv;
    const int64_t n_rows_v  = n_v*n_head_kv;

    const auto dot = dot_tile_of(n_k/N_LANES);
    const auto add = add_tile_of(n_v/N_LANES);

    thread_local std::vector<float> scratch;

    const int64_t n_tile = TILE*std::max({ n_rows_k, n_rows_v, CHUNK });

    float * tile    = aligned(scratch, n_tile + (n_head*n_tokens + n_tokens)*CHUNK);
    float * weights = tile + n_tile;                   // [n_tokens][n_head][CHUNK]
    float * masks   = weights + n_head*n_tokens*CHUNK; // [n_tokens][CHUNK]

    for (int64_t chunk = ith; chunk < dst->ne[2]; chunk += nth) {
        const int64_t cell = chunk*CHUNK;

        float * out = (float *) ((char *) dst->data + chunk*dst->nb[2]); // [n_tokens][n_head][n_v + N_LANES]

        for (int64_t c = 0; c < CHUNK; c += TILE) {
            read_rows(k, cell + c, tile, n_rows_k);

            for (int64_t t = 0; t < n_tokens; ++t) {
                for (int64_t h = 0; h < n_head; ++h) {
                    const float * query = (const float *) ((const char *) q->data + h*q->nb[1] + t*q->nb[2]);

                    dot(query, tile + h/n_gqa*n_k, n_rows_k, n_k/N_LANES, weights + (t*n_head + h)*CHUNK + c);
                }
            }
        }

        for (int64_t t = 0; t < n_tokens; ++t) {
            to_float(mask, (const char *) mask->data + t*mask->nb[1] + ggml_row_size(mask->type, cell), masks + t*CHUNK, CHUNK);
        }

        for (int64_t r = 0; r < n_head*n_tokens; ++r) {
            float * line = out + r*dst->ne[0];

            weigh(weights + r*CHUNK, CHUNK, masks + r/n_head*CHUNK, by, alibi_slope(by.max_bias, r % n_head, n_head), line[n_v], line[n_v + 1]);

            std::fill_n(line, n_v, 0.0f);
        }

        if (!v_trans) {
            for (int64_t c = 0; c < CHUNK; c += TILE) {
                read_rows(v, cell + c, tile, n_rows_v);

                for (int64_t r = 0; r < n_head*n_tokens; ++r) {
                    add(weights + r*CHUNK + c, tile + r % n_head/n_gqa*n_v, n_rows_v, n_v/N_LANES, out + r*dst->ne[0]);
                }
            }
            continue;
        }

        // lines of V are channels: [CHUNK] cells of TILE of them at a time
        for (int64_t line = 0; line < n_rows_v; line += TILE) {
            for (int64_t i = 0; i < TILE; ++i) {
                const char * src = (const char *) v->data + (line + i)*v->nb[2] + ggml_row_size(v->type, cell);

                prefetch(src + TILE*v->nb[2], ggml_row_size(v->type, CHUNK));
                to_float(v, src, tile + i*CHUNK, CHUNK);
            }
            for (int64_t t = 0; t < n_tokens; ++t) {
                for (int64_t g = 0; g < n_gqa; ++g) {
                    const int64_t r = t*n_head + line/n_v*n_gqa + g;

                    dot_tile<CHUNK/N_LANES>(weights + r*CHUNK, tile, CHUNK, 0, out + r*dst->ne[0] + line % n_v);
                }
            }
        }
    }
}

// dst: [n_embd_head_v*n_head, n_tokens]; sources: the parts of the chunks, those of the blocks, the sinks; userdata: not nullptr
// where the second are there
static void join_chunks(ggml_tensor * dst, int ith, int nth, void * userdata) {
    const ggml_tensor * parts  = dst->src[0];
    const ggml_tensor * blocks = userdata ? dst->src[1] : nullptr;
    const ggml_tensor * sinks  = dst->src[userdata ? 2 : 1];

    const int64_t n_v    = parts->ne[0] - N_LANES;
    const int64_t n_head = dst->ne[0]/n_v;

    const int64_t n_chunks = parts->ne[2];
    const int64_t n_all    = n_chunks + (blocks ? blocks->ne[2] : 0);

    for (int64_t r = ith; r < parts->ne[1]; r += nth) {
        const auto line_of = [&](int64_t c) {
            const ggml_tensor * t = c < n_chunks ? parts : blocks;

            return (const float *) ((const char *) t->data + r*t->nb[1] + (c < n_chunks ? c : c - n_chunks)*t->nb[2]);
        };

        const float sink = sinks ? ((const float *) sinks->data)[r % n_head] : -INFINITY;

        float top = sink;
        for (int64_t c = 0; c < n_all; ++c) {
            top = std::max(top, line_of(c)[n_v]);
        }

        float * out   = (float *) dst->data + r*n_v;
        float   total = sinks ? expf(sink - top) : 0.0f;

        std::fill_n(out, n_v, 0.0f);

        for (int64_t c = 0; c < n_all; ++c) {
            const float * line = line_of(c);

            if (line[n_v] == -INFINITY) {
                continue; // nothing that this token may see
            }
            const float w = expf(line[n_v] - top);

            total += w*line[n_v + 1];
            for (int64_t d = 0; d < n_v; d += N_LANES) {
                store(out + d, load(out + d) + w*load(line + d));
            }
        }
        for (int64_t d = 0; total > 0.0f && d < n_v; d += N_LANES) {
            store(out + d, load(out + d)/total);
        }
    }
}

bool refreekv_decode_fits(const refreekv_decode_call & call) {
    const ggml_tensor * q = call.q;
    const ggml_tensor * k = call.k;
    const ggml_tensor * v = call.v;

    const int64_t n_max = call.evicted && call.evicted->sketch.n_blocks() > 0 ? MAX_TOKENS_EVICTED : MAX_TOKENS;

    return q->type == GGML_TYPE_F32 && q->nb[0] == sizeof(float) && q->ne[2] <= n_max && q->ne[3] == 1 &&
           in_host_memory(k) && in_host_memory(v) && has_to_float(k->type) && has_to_float(v->type) &&
           (!call.sinks || (call.sinks->type == GGML_TYPE_F32 && ggml_is_contiguous(call.sinks))) &&
           k->ne[2] % CHUNK == 0 && k->ne[0] % N_LANES == 0 && head_size_v(v) % N_LANES == 0;
}

bool refreekv_decode_can_fault(int64_t n_embd_head_k, int64_t n_embd_head_v, ggml_type type_k, ggml_type type_v) {
    return n_embd_head_k % N_LANES == 0 && n_embd_head_v % N_LANES == 0 && has_to_float(type_k) && has_to_float(type_v);
}

ggml_tensor * refreekv_decode(ggml_context * ctx, const refreekv_decode_call & call, std::vector<ggml_tensor *> & nodes) {
    const int64_t n_v      = head_size_v(call.v);
    const int64_t n_head   = call.q->ne[1];
    const int64_t n_tokens = call.q->ne[2];
    const int64_t n_blocks = call.evicted ? call.evicted->sketch.n_blocks() : 0;

    const auto node = [&](int64_t ne0, int64_t ne1, int64_t ne2, std::vector<ggml_tensor *> args, ggml_custom_op_t f, const void * userdata) {
        nodes.push_back(ggml_custom_4d(ctx, GGML_TYPE_F32, ne0, ne1, ne2, 1, args.data(), args.size(), f, GGML_N_TASKS_MAX, const_cast<void *>(userdata)));
        return nodes.back();
    };
    const auto with_sinks = [&](std::vector<ggml_tensor *> args) {
        if (call.sinks) {
            args.push_back(call.sinks);
        }
        return args;
    };

    ggml_tensor * parts = node(n_v + N_LANES, n_head*n_tokens, call.k->ne[2]/CHUNK, { call.q, call.k, call.v, call.mask }, decode_chunks, call.softmax);

    if (n_blocks == 0) {
        return node(n_v*n_head, n_tokens, 1, with_sinks({ parts }), join_chunks, nullptr);
    }

    ggml_tensor * judged = node(GGML_PAD(n_blocks, N_LANES), n_head*n_tokens, 1, { call.q, call.k }, refreekv_judge_blocks, call.evicted);
    ggml_tensor * least  = node(1, n_head*n_tokens, 1, with_sinks({ parts, judged }), refreekv_choose_blocks, call.evicted);
    ggml_tensor * blocks = node(n_v + N_LANES, n_head*n_tokens, n_blocks, { call.q, call.k, call.v, judged, least }, refreekv_read_blocks, call.evicted);

    return node(n_v*n_head, n_tokens, 1, with_sinks({ parts, blocks }), join_chunks, call.evicted);
}

#endif
