#pragma once

#include "kernels/device/numbers.h"

#include <cstddef>

namespace refreekv { namespace device {

constexpr int CELLS = 64; // of a block
constexpr int SPAN  = 8;  // blocks whose part in the attention one team sums up
constexpr int LINES = 4;  // query heads that share what is read of a KV head at a time

// bits of the codes (tiers/warm-tier.cpp)
constexpr int BITS_K = 4;
constexpr int BITS_V = 2;

// numbers behind the weighted sum of V of a span
enum part { PART_WEIGHTS, PART_ROWS_READ, PART_SIZE = 4 };

// The attention of some tokens to one layer's cells: to those that it has in codes (kernels/codes.h), and to those that it holds. Their
// logits have one order, which is that of the mask: first n_coded places for codes, then n_held cells. Both are multiples of CELLS.
//
// A query head of a token is called a line. A line attends to a place unless the mask has -infinity there.
struct call {
    int32_t n_tokens;
    int32_t n_head_kv;
    int32_t n_gqa; // query heads that share a KV head
    int32_t n_k;   // channels of a head, a multiple of 16
    int32_t n_v;
    int32_t n_coded;
    int32_t n_held;

    // What becomes of the logits: times pre_scale, soft-capped (0: not), times post_scale
    float pre_scale;
    float soft_cap;
    float post_scale;

    float theta; // the part of a line's attention at which a cell's exact row takes the place of its codes; infinity: none is read

    const float * q; // distances in numbers
    int64_t       next_head_q;
    int64_t       next_token_q;

    const uint8_t * mask; // a number for each place
    number          mask_type;
    int64_t         next_token_mask; // bytes

    const float * sinks; // [n_head]; nullptr: none

    rows k;
    rows v;

    const uint8_t * codes_k; // [n_head_kv][n_coded/CELLS] blocks
    const uint8_t * codes_v;

    // Where the exact row of each place is: [n_coded] addresses that the device can read, also in host memory; 0: it has none. A row has K
    // and V of each KV head beside each other (tiers/record.h)
    const uint64_t * exact;
    number           exact_type_k;
    number           exact_type_v;
    int32_t          exact_k;    // bytes of K of a head
    int32_t          exact_head; // and of K and V

    float *    out;    // [n_tokens][n_head][n_v]
    uint64_t * n_read; // [n_head_kv] to which the number of rows that were read is added; nullptr: it is not counted
    float *    scratch;

    REFREEKV_DEVICE int n_head()   const { return n_head_kv*n_gqa; }
    REFREEKV_DEVICE int n_places() const { return n_coded + n_held; }
    REFREEKV_DEVICE int n_blocks() const { return n_places()/CELLS; }
    REFREEKV_DEVICE int n_part()   const { return n_v + PART_SIZE; }

    // spans of codes, and behind them those of cells that are held
    REFREEKV_DEVICE int n_coded_spans() const { return (n_coded/CELLS + SPAN - 1)/SPAN; }
    REFREEKV_DEVICE int n_spans()       const { return n_coded_spans() + (n_held/CELLS + SPAN - 1)/SPAN; }

    REFREEKV_DEVICE int64_t line(int token, int head) const { return (int64_t) token*n_head() + head; }

    // The scratch, by lines: weights within each block; of each block its largest logit and the sum of its weights; the logarithm of the
    // sum of all e^logit, by the codes; and the parts of the spans, whose weights are relative to it
    REFREEKV_DEVICE int64_t n_lines() const { return (int64_t) n_tokens*n_head(); }
    REFREEKV_DEVICE float * weights(int64_t r) const { return scratch + r*n_places(); }
    REFREEKV_DEVICE float * tops   (int64_t r) const { return scratch + n_lines()*n_places() + r*n_blocks(); }
    REFREEKV_DEVICE float * sums   (int64_t r) const { return scratch + n_lines()*(n_places() + n_blocks()) + r*n_blocks(); }
    REFREEKV_DEVICE float * lse    (int64_t r) const { return scratch + n_lines()*(n_places() + 2*n_blocks()) + r; }
    REFREEKV_DEVICE float * part   (int64_t r, int span) const { return scratch + n_lines()*(n_places() + 2*n_blocks() + 1) + (r*n_spans() + span)*n_part(); }

    // numbers that it takes for each token
    REFREEKV_DEVICE int64_t scratch_size() const { return (int64_t) n_head()*(n_places() + 2*n_blocks() + 1 + n_spans()*n_part()); }

    REFREEKV_DEVICE const float * query(int token, int head) const { return q + token*next_token_q + head*next_head_q; }

    REFREEKV_DEVICE float masked(int token, int place) const { return number_of(mask_type, mask + token*next_token_mask, place); }

    REFREEKV_DEVICE float sink(int head) const { return sinks ? sinks[head] : NONE; }

    REFREEKV_DEVICE float finished(float logit) const {
        const float x = logit*pre_scale;

        return (soft_cap > 0.0f ? tanhf(x)*soft_cap : x)*post_scale;
    }

    // rows that a token reads of a span at most, as on the CPU (warm_budget)
    REFREEKV_DEVICE int budget() const {
        const float n = 0.1f/theta;

        return n < 16.0f ? 16 : n > SPAN*CELLS ? SPAN*CELLS : (int) n;
    }

    // the same call for tokens first .. first + n - 1
    call of_tokens(int first, int n) const {
        call res = *this;

        res.n_tokens = n;
        res.q    += first*next_token_q;
        res.mask += first*next_token_mask;
        res.out  += (int64_t) first*n_head()*n_v;

        return res;
    }
};

}} // namespace refreekv::device
