// Part of ggml's CPU backend (CMakeLists.txt).

#include "kernels/decode.h"

#include "kernels/lines.h"

#ifdef REFREEKV_LANES

#include "ggml-backend.h"

#include <algorithm>
#include <cmath>
#include <new>
#include <vector>

namespace refreekv {

static const int64_t MAX_TOKENS = 4; // that share the work on a warm cell; of more, each is one thread's

// Without warm cells: llama.cpp's flash attention takes 64 tokens and more together, and fewer of them one by one
static const int64_t MAX_HOT_TOKENS = 63;
static const int64_t MAX_PARTS      = 32 << 20; // bytes of the graph's memory

// dst: [n_part, n_head*n_tokens, n_chunks]
static void attend_hot(ggml_tensor * dst, int ith, int nth, void * userdata) {
    for (int64_t chunk = ith; chunk < dst->ne[2]; chunk += nth) {
        attend_chunk(dst, *(const decode_softmax *) userdata, chunk, 0, dst->src[0]->ne[2], (float *) ((char *) dst->data + chunk*dst->nb[2]));
    }
}

static float sink_of(const ggml_tensor * sinks, int64_t h) {
    return sinks ? ((const float *) sinks->data)[h] : -INFINITY;
}

// dst: [n_embd_head_v*n_head, n_tokens]; sources: parts [n_part, n_head*n_tokens, n_chunks], sinks
static void join_hot(ggml_tensor * dst, int ith, int nth, void *) {
    const ggml_tensor * parts = dst->src[0];

    shape s = {}; // as far as join_line looks at it
    s.n_part   = parts->ne[0];
    s.n_v      = s.n_part - N_LANES;
    s.n_chunks = parts->ne[2];
    s.n_head   = dst->ne[0]/s.n_v;

    const lines l(s, dst->ne[1], 0, (float *) parts->data);

    for (int64_t r = ith; r < l.n_lines; r += nth) {
        join_line(s, l, r, sink_of(dst->src[1], r % s.n_head), 0.0f, (float *) dst->data + r*s.n_v);
    }
}

// Three operations where there are warm cells and few tokens. Sources: q, k, v, mask, and what the ones before have put out; the sinks
// last. userdata: a warm_view

// dst: lines, without what the second one adds
static void judge(ggml_tensor * dst, int ith, int nth, void * userdata) {
    const auto & warm = *(const warm_view *) userdata;

    const ggml_tensor * q = dst->src[0];

    const shape s(q, dst->src[1], dst->src[2]);
    const lines l(s, q->ne[2], warm.n_blocks, (float *) dst->data);

    for (int64_t i = ith; i < s.n_chunks; i += nth) {
        attend_chunk(dst, *warm.softmax, i, 0, q->ne[2], l.parts + i*l.n_lines*s.n_part);
    }

    for_units(s, l, ith, nth, [&](int64_t h_kv, int64_t span) {
        for (int64_t t = 0; t < q->ne[2]; ++t) {
            judge_span(warm, s, l, q, t, t, h_kv, span);
        }
    });
}

// dst: spans of lines, and lse
static void attend_warm(ggml_tensor * dst, int ith, int nth, void * userdata) {
    const auto & warm = *(const warm_view *) userdata;

    const ggml_tensor * q     = dst->src[0];
    const ggml_tensor * sinks = dst->src[4];

    const shape s(q, dst->src[1], dst->src[2]);
    const lines l(s, q->ne[2], warm.n_blocks, (float *) dst->src[3]->data, (float *) dst->data);

    thread_local std::vector<float> scratch;

    // each thread for itself: it is less work than another operation to wait for
    float * lse = aligned(scratch, 2*GGML_PAD(l.n_lines, N_LANES));
    for (int64_t r = 0; r < l.n_lines; ++r) {
        lse[r] = estimate_lse(s, l, r, sink_of(sinks, r % s.n_head));
    }
    if (ith == 0) {
        std::copy_n(lse, l.n_lines, l.lse);
    }

    float * least = lse + GGML_PAD(l.n_lines, N_LANES);
    std::fill_n(least, l.n_lines, -1.0f);

    for_units(s, l, ith, nth, [&](int64_t h_kv, int64_t span) {
        for (int64_t t = 0; t < q->ne[2]; ++t) {
            attend_span(warm, s, l, lse, least, q, t, t, h_kv, span);
        }
    });
}

// dst: [n_embd_head_v*n_head, n_tokens]
static void join_all(ggml_tensor * dst, int ith, int nth, void * userdata) {
    const auto & warm = *(const warm_view *) userdata;

    const ggml_tensor * q     = dst->src[0];
    const ggml_tensor * sinks = dst->src[5];

    const shape s(q, dst->src[1], dst->src[2]);
    const lines l(s, q->ne[2], warm.n_blocks, (float *) dst->src[3]->data, (float *) dst->src[4]->data);

    counted counts;
    for (int64_t r = ith; r < l.n_lines; r += nth) {
        join_line(s, l, r, sink_of(sinks, r % s.n_head), l.lse[r], (float *) dst->data + r*s.n_v, &counts);
    }
    counts.add_to(*warm.counts);
}

// The same for many tokens, each by one thread. Sources: q, k, v, mask, sinks; dst: [n_embd_head_v*n_head, n_tokens]
static void attend_tokens(ggml_tensor * dst, int ith, int nth, void * userdata) {
    const auto & warm = *(const warm_view *) userdata;

    const ggml_tensor * q     = dst->src[0];
    const ggml_tensor * sinks = dst->src[4];

    const shape s(q, dst->src[1], dst->src[2]);

    thread_local std::vector<float> scratch;

    const int64_t size = GGML_PAD(lines::size(s, 1, warm.n_blocks, true), N_LANES);
    const lines   l(s, 1, warm.n_blocks, aligned(scratch, size + s.n_head));
    float *       least = l.parts + size;
    counted       counts;

    for (int64_t t = ith; t < q->ne[2]; t += nth) {
        for (int64_t c = 0; c < s.n_chunks; ++c) {
            attend_chunk(dst, *warm.softmax, c, t, 1, l.parts + c*l.n_lines*s.n_part);
        }
        for_units(s, l, 0, 1, [&](int64_t h_kv, int64_t span) { judge_span(warm, s, l, q, t, 0, h_kv, span); });
        for (int64_t h = 0; h < s.n_head; ++h) {
            l.lse[h] = estimate_lse(s, l, h, sink_of(sinks, h));
        }
        std::fill_n(least, s.n_head, -1.0f);
        for_units(s, l, 0, 1, [&](int64_t h_kv, int64_t span) { attend_span(warm, s, l, l.lse, least, q, t, 0, h_kv, span); });
        for (int64_t h = 0; h < s.n_head; ++h) {
            join_line(s, l, h, sink_of(sinks, h), l.lse[h], (float *) ((char *) dst->data + t*dst->nb[1]) + h*s.n_v, &counts);
        }
    }
    counts.add_to(*warm.counts);
}

static const decode_softmax & softmax_of(const decode_softmax & softmax) { return softmax; }
static const decode_softmax & softmax_of(const warm_view & warm)         { return *warm.softmax; }

// These operations are called by ggml's threads, which nothing can be thrown through. Once one had no memory, the others do nothing: what they
// would work on is worth nothing
template <ggml_custom_op_t F, typename T>
static void guarded(ggml_tensor * dst, int ith, int nth, void * userdata) {
    auto & no_memory = *softmax_of(*(const T *) userdata).no_memory;

    if (no_memory) {
        return;
    }
    try {
        F(dst, ith, nth, userdata);
    } catch (const std::bad_alloc &) {
        no_memory = true;
    }
}

static bool has_warm(const decode_call & call) {
    return call.warm && call.warm->n_blocks > 0;
}

// of what the first operation puts out where there are no warm cells
static int64_t parts_bytes(const decode_call & call) {
    const shape s(call.q, call.k, call.v);

    return s.n_part*s.n_head*call.q->ne[2]*s.n_chunks*sizeof(float);
}

bool decode_fits(const decode_call & call) {
    const ggml_tensor * q = call.q;
    const ggml_tensor * k = call.k;
    const ggml_tensor * v = call.v;

    const bool size_fits = has_warm(call) ? q->ne[1]/k->ne[1] <= REFREEKV_WARM_GQA : q->ne[2] <= MAX_HOT_TOKENS && parts_bytes(call) <= MAX_PARTS;

    return size_fits && q->type == GGML_TYPE_F32 && q->nb[0] == sizeof(float) && q->ne[3] == 1 &&
           in_host_memory(k) && in_host_memory(v) && has_to_float(k->type) && has_to_float(v->type) &&
           (!call.sinks || (call.sinks->type == GGML_TYPE_F32 && ggml_is_contiguous(call.sinks))) &&
           k->ne[2] % CHUNK == 0 && k->ne[0] % N_LANES == 0 && head_size_v(v) % N_LANES == 0;
}

ggml_tensor * decode(ggml_context * ctx, const decode_call & call, std::vector<ggml_tensor *> & nodes) {
    const shape s(call.q, call.k, call.v);

    const int64_t n_tokens = call.q->ne[2];

    const ggml_custom_op_t hot    = guarded<attend_hot, decode_softmax>;
    const ggml_custom_op_t judges = guarded<judge,      warm_view>;

    const auto node = [&](int64_t ne0, int64_t ne1, int64_t ne2, std::vector<ggml_tensor *> args, ggml_custom_op_t f, const void * userdata) {
        if (call.sinks && f != hot && f != judges) {
            args.push_back(call.sinks);
        }
        nodes.push_back(ggml_custom_4d(ctx, GGML_TYPE_F32, ne0, ne1, ne2, 1, args.data(), args.size(), f, GGML_N_TASKS_MAX, const_cast<void *>(userdata)));
        return nodes.back();
    };

    if (!has_warm(call)) {
        ggml_tensor * parts = node(s.n_part, s.n_head*n_tokens, s.n_chunks, { call.q, call.k, call.v, call.mask }, hot, call.softmax);

        return node(s.n_v*s.n_head, n_tokens, 1, { parts }, guarded<join_hot, decode_softmax>, call.softmax);
    }

    const int64_t n_blocks = call.warm->n_blocks;

    if (n_tokens > MAX_TOKENS) {
        return node(s.n_v*s.n_head, n_tokens, 1, { call.q, call.k, call.v, call.mask }, guarded<attend_tokens, warm_view>, call.warm);
    }

    ggml_tensor * judged = node(lines::size      (s, n_tokens, n_blocks, false), 1, 1, { call.q, call.k, call.v, call.mask },      judges,                          call.warm);
    ggml_tensor * spans  = node(lines::spans_size(s, n_tokens, n_blocks),        1, 1, { call.q, call.k, call.v, judged },         guarded<attend_warm, warm_view>, call.warm);
    return                 node(s.n_v*s.n_head, n_tokens, 1,                           { call.q, call.k, call.v, judged, spans }, guarded<join_all, warm_view>,    call.warm);
}

} // namespace refreekv

#endif
