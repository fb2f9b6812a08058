#pragma once

#include "ggml.h"

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>

namespace refreekv {

struct decode_softmax;

// What decoding has done with the warm cells of a layer. Parts of attention are in units of 1/UNIT, so that their sums do not depend on the
// order of threads
struct warm_counts {
    static constexpr float UNIT = 1 << 20;

    std::atomic<int64_t> n_read     { 0 }; // rows
    std::atomic<int64_t> n_left     { 0 }; // rows that were to be read, and that their codes stand for all the same
    std::atomic<int64_t> n_lines    { 0 }; // query heads of tokens that see warm cells
    std::atomic<int64_t> by_codes   { 0 }; // of all these, the part of attention that codes stood for
    std::atomic<int64_t> worst      { 0 }; // of one of these, the part of attention that is misplaced at most; only with max_error
};

// What decoding sees of the warm cells of one layer: the cells whose K and V are held in codes (kernels/codes.h). It attends to all of them
// by their codes. Where a query head gives a cell theta of its attention or more, estimated by the codes, the cell's exact K and V take
// their place, for all query heads of that KV head.
struct warm_view {
    const decode_softmax * softmax;

    int64_t n_head_kv;
    int64_t n_k;     // channels of a head
    int64_t n_v;
    int     bits_k;
    int     bits_v;
    float   theta;
    float   max_error; // the part of a head's attention that codes may misplace; 0: whatever it is

    const float * largest_steps; // [n_head_kv][n_k] of each channel of K, in all blocks

    int64_t                 n_blocks;
    // codes of K and V of a block in KV head 0; those of the next head are so many bytes further. Blocks of one head that are neighbours
    // mostly lie behind each other, since they are read in this order
    const uint8_t * const * blocks_k;
    const uint8_t * const * blocks_v; // unless v_in_k
    size_t                  next_head_k;
    size_t                  next_head_v;

    const uint64_t *        there;   // [n_blocks] bit i: cell i is warm
    const uint8_t *         visible; // [n_tokens][n_blocks] whether a token of the batch may see a block's cells

    bool v_in_k; // V of a cell is the beginning of its K: its exact rows and its codes are K alone, with 4 bits

    // Exact K and V of some cells of a block (bit i: its cell i) in one KV head: cell after cell, K and then V, in these types. Returns
    // those that could be had without waiting for a disk; rows has only them. From several threads
    ggml_type type_k;
    ggml_type type_v;
    uint64_t (*read)(const void * source, int64_t block, uint64_t cells, int64_t h_kv, uint8_t * rows);
    const void * source;

    warm_counts * counts;
};

static const int64_t REFREEKV_WARM_GQA = 128; // query heads that share a KV head, at most

// blocks that one thread takes at a time, for one KV head
static const int64_t REFREEKV_WARM_SPAN = 8;

static inline int64_t warm_spans(int64_t n_blocks) {
    return (n_blocks + REFREEKV_WARM_SPAN - 1)/REFREEKV_WARM_SPAN;
}

// Rows that a token reads of a span at most, if it sees as many cells as fill so many spans. One head can give theta to 1/theta rows: each
// span may have its share of these, and not less than a tenth of them. Beyond it the rows with the largest weights are read. Query heads that
// share a KV head share its rows, so they may want more together, and so may one head if all of its rows are in a few spans
static inline int64_t warm_budget(float theta, int64_t n_spans) {
    return std::clamp(std::max(0.1f, 1.0f/std::max<int64_t>(n_spans, 1))/theta, 16.0f, (float) (REFREEKV_WARM_SPAN*64));
}

// The lines of heads that a pass works on: line i is head h_kv*n_gqa + i of a token
struct warm_judged {
    float * weights; // [n_blocks*64] e^(logit - top)
    float * tops;    // [n_blocks, rounded up to N_LANES] the largest logit of each block; -infinity: none
    float * totals;  // of a block's weights
    float * excess;  // only with max_error: e^(bound on the error of a block's logits) - 1
};

// First pass: the weights of a span of blocks, within each block. q, out: of the n_gqa heads of the KV head
void warm_judge(const warm_view & warm, int64_t token, int64_t h_kv, int64_t n_gqa, int64_t span, const float * const * q, const warm_judged * out);

// Only with max_error. Where a logit by codes is off by b at most, its weight is off by at most (e^b - 1) times itself. The sum of these
// products bounds the part of a line's attention that codes misplace. Returns the least product whose row has to be read, so that the products
// of all rows that are not read add up to less than max_error
float warm_least(const warm_view & warm, int64_t token, const warm_judged & judged, float lse);

// numbers behind the weighted sum of V, all relative to e^lse
enum warm_part {
    WARM_WEIGHTS,  // the sum of all weights
    WARM_BY_CODES, // of the weights that codes stand for
    WARM_EXCESS,   // only with max_error: of the products above
};

// Second pass, once lse is known, the logarithm of the sum of all e^logit, hot and warm, of each line: out[i]: [n_v] the weighted sum
// of V, and behind it the numbers of warm_part. least: of warm_least(), [n_gqa]
void warm_attend(const warm_view & warm, int64_t token, int64_t h_kv, int64_t n_gqa, int64_t span, const float * const * q, const warm_judged * judged, const float * lse, const float * least, float * const * out);

} // namespace refreekv
