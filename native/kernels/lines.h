#pragma once

#include "kernels/codes.h"
#include "kernels/hot.h"
#include "kernels/tiles.h"
#include "kernels/warm.h"

#ifdef REFREEKV_LANES

namespace refreekv {

// What the lines of a batch (token by token, its heads) have before their parts are joined; one piece of memory
struct lines {
    int64_t n_lines;
    int64_t n_blocks;
    int64_t n_padded; // blocks, up to whole vectors
    int64_t n_spans;

    float * parts;   // [n_chunks][n_lines][n_part] of what is held
    float * weights; // [n_lines][n_blocks*64] of warm cells, within their blocks
    float * tops;    // [n_lines][n_padded]
    float * totals;
    float * excess;
    float * spans;   // [n_spans][n_lines][n_part] of warm cells: a weighted sum of V and the numbers of warm_part, relative to e^lse
    float * lse;     // [n_lines]

    // passes: whether what the second one puts out is there, too
    static int64_t size(const shape & s, int64_t n_tokens, int64_t n_blocks, bool passes) {
        const int64_t n_lines = s.n_head*n_tokens;

        return n_lines*(s.n_chunks*s.n_part + n_blocks*REFREEKV_CODED_CELLS + 3*GGML_PAD(n_blocks, N_LANES)) + (passes ? spans_size(s, n_tokens, n_blocks) : 0);
    }

    static int64_t spans_size(const shape & s, int64_t n_tokens, int64_t n_blocks) {
        const int64_t n_lines = s.n_head*n_tokens;

        return n_lines*s.n_part*warm_spans(n_blocks) + GGML_PAD(n_lines, N_LANES);
    }

    lines(const shape & s, int64_t n_tokens, int64_t n_blocks, float * memory, float * memory_spans = nullptr) :
        n_lines(s.n_head*n_tokens), n_blocks(n_blocks), n_padded(GGML_PAD(n_blocks, N_LANES)), n_spans(warm_spans(n_blocks)) {
        parts  = memory;
        weights = parts + s.n_chunks*n_lines*s.n_part;
        tops   = weights + n_lines*n_blocks*REFREEKV_CODED_CELLS;
        totals = tops   + n_lines*n_padded;
        excess = totals + n_lines*n_padded;
        spans  = memory_spans ? memory_spans : excess + n_lines*n_padded;
        lse    = spans  + n_spans*n_lines*s.n_part;
    }

    warm_judged judged(int64_t r) const {
        return { weights + r*n_blocks*REFREEKV_CODED_CELLS, tops + r*n_padded, totals + r*n_padded, excess + r*n_padded };
    }
};

// f(h_kv, span) for a thread's share of the spans of all KV heads: neighbours, since codes are read in the order of memory
template <typename F>
static void for_units(const shape & s, const lines & l, int64_t ith, int64_t nth, F && f) {
    const int64_t n = s.n_head_kv*l.n_spans;

    for (int64_t u = n*ith/nth; u < n*(ith + 1)/nth; ++u) {
        f(u/l.n_spans, u%l.n_spans);
    }
}

// the first pass over a span of warm cells, in one KV head. token: of the batch; t: of the lines
void judge_span(const warm_view & warm, const shape & s, const lines & l, const ggml_tensor * q, int64_t token, int64_t t, int64_t h_kv, int64_t span);

// the second one. least: [n_lines], not known yet where it is negative
void attend_span(const warm_view & warm, const shape & s, const lines & l, const float * lse, float * least, const ggml_tensor * q, int64_t token, int64_t t, int64_t h_kv, int64_t span);

// the logarithm of the sum of a line's weights, as far as it is known by the codes
float estimate_lse(const shape & s, const lines & l, int64_t r, float sink);

// What a thread has to add to warm_counts
struct counted {
    int64_t n_lines  = 0;
    int64_t by_codes = 0;
    int64_t worst    = 0;

    void add_to(warm_counts & counts) const {
        counts.n_lines  += n_lines;
        counts.by_codes += by_codes;

        int64_t most = counts.worst;
        while (most < worst && !counts.worst.compare_exchange_weak(most, worst)) {
        }
    }
};

// one line's attention of its parts: out [n_v]. lse: what those of the warm cells are relative to
void join_line(const shape & s, const lines & l, int64_t r, float sink, float lse, float * out, counted * counts = nullptr);

} // namespace refreekv

#endif
