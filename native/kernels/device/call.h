#pragma once

#include "kernels/device/numbers.h"

namespace refreekv { namespace tiles {

REFREEKV_CONSTANT int CELLS = 64; // of a block
REFREEKV_CONSTANT int SPAN  = 8;  // blocks whose part in the attention one team sums up
REFREEKV_CONSTANT int LINES = 4;  // query heads that share what is read of a KV head at a time

// bits of the codes (tiers/warm-tier.cpp)
REFREEKV_CONSTANT int BITS_K = 4;
REFREEKV_CONSTANT int BITS_V = 2;

// numbers behind the weighted sum of V of a span
enum part { PART_WEIGHTS, PART_ROWS_READ, PART_SIZE = 4 };

// The attention of some tokens to one layer's cells: to those that it has in codes (kernels/codes.h), and to those that it holds. Their
// logits have one order, which is that of the mask: first n_coded places for codes, then n_held cells. Both are multiples of CELLS.
//
// A query head of a token is called a line. A line attends to a place unless the mask has -infinity there.

// The numbers of a call, which a GPU gets as bytes
struct sizes {
    int32_t n_tokens;
    int32_t n_head_kv;
    int32_t n_gqa; // query heads that share a KV head
    int32_t n_k;   // channels of a head, a multiple of 16
    int32_t n_v;
    int32_t n_coded;
    int32_t n_held;

    // What becomes of the logits: times pre_scale, soft-capped (0: not), times post_scale
    float   pre_scale;
    float   soft_cap;
    float   post_scale;
    int32_t has_sinks;

    float theta; // the part of a line's attention at which a cell's exact row takes the place of its codes; infinity: none is read

    int64_t next_head_q; // distances in numbers
    int64_t next_token_q;

    int64_t next_token_mask; // bytes
    number  mask_type;

    number  exact_type_k;
    number  exact_type_v;
    int32_t exact_k;    // bytes of K of a head
    int32_t exact_head; // and of K and V

    rows k;
    rows v;

    REFREEKV_DEVICE int n_head()   const { return n_head_kv*n_gqa; }
    REFREEKV_DEVICE int n_places() const { return n_coded + n_held; }
    REFREEKV_DEVICE int n_blocks() const { return n_places()/CELLS; }
    REFREEKV_DEVICE int n_part()   const { return n_v + PART_SIZE; }

    // spans of codes, and behind them those of cells that are held
    REFREEKV_DEVICE int n_coded_spans() const { return (n_coded/CELLS + SPAN - 1)/SPAN; }
    REFREEKV_DEVICE int n_spans()       const { return n_coded_spans() + (n_held/CELLS + SPAN - 1)/SPAN; }

    REFREEKV_DEVICE int64_t line(int token, int head) const { return (int64_t) token*n_head() + head; }
    REFREEKV_DEVICE int64_t n_lines() const { return (int64_t) n_tokens*n_head(); }

    // numbers of scratch that it takes for each token
    REFREEKV_DEVICE int64_t scratch_size() const { return (int64_t) n_head()*(n_places() + 2*n_blocks() + 1 + n_spans()*n_part()); }

    REFREEKV_DEVICE float finished(float logit) const {
        const float x = logit*pre_scale;

        return (soft_cap > 0.0f ? tanhf(x)*soft_cap : x)*post_scale;
    }

    // Rows that a token reads of a span at most. On the CPU (warm_budget) the spans are those that the token sees; here they are all that there
    // is room for, so that the budget can be smaller
    REFREEKV_DEVICE int budget() const {
        const float n = fmaxf(0.1f, 1.0f/n_coded_spans())/theta;

        return n < 16.0f ? 16 : n > SPAN*CELLS ? SPAN*CELLS : (int) n;
    }
};
static_assert(sizeof(sizes) == 160, "the same on the host and on a GPU");

struct call {
    sizes s;

    device_ptr<const float>   q;
    device_ptr<const uint8_t> mask;  // a number for each place
    device_ptr<const float>   sinks; // [n_head], where there are some

    device_ptr<const uint8_t> k; // of the cells that are held
    device_ptr<const uint8_t> v;

    device_ptr<const uint8_t> codes_k; // [n_head_kv][n_coded/CELLS] blocks
    device_ptr<const uint8_t> codes_v;

    // Where the exact row of each place is: [n_coded] addresses that the device can read, also in host memory; 0: it has none. A row has K
    // and V of each KV head beside each other (tiers/record.h). nullptr: there are none
    device_ptr<const uint64_t> exact;

    device_ptr<float>    out;    // [n_tokens][n_head][n_v]
    device_ptr<uint64_t> n_read; // [n_head_kv] to which the number of rows that were read is added; nullptr: it is not counted
    device_ptr<float>    scratch;

    // The scratch, by lines: weights within each block; of each block its largest logit and the sum of its weights; the logarithm of the
    // sum of all e^logit, by the codes; and the parts of the spans, whose weights are relative to it
    REFREEKV_DEVICE device_ptr<float> weights(int64_t r) const { return scratch + r*s.n_places(); }
    REFREEKV_DEVICE device_ptr<float> tops   (int64_t r) const { return scratch + s.n_lines()*s.n_places() + r*s.n_blocks(); }
    REFREEKV_DEVICE device_ptr<float> sums   (int64_t r) const { return scratch + s.n_lines()*(s.n_places() + s.n_blocks()) + r*s.n_blocks(); }
    REFREEKV_DEVICE device_ptr<float> lse    (int64_t r) const { return scratch + s.n_lines()*(s.n_places() + 2*s.n_blocks()) + r; }

    REFREEKV_DEVICE device_ptr<float> part(int64_t r, int span) const {
        return scratch + s.n_lines()*(s.n_places() + 2*s.n_blocks() + 1) + (r*s.n_spans() + span)*s.n_part();
    }

    REFREEKV_DEVICE device_ptr<const float> query(int token, int head) const { return q + token*s.next_token_q + head*s.next_head_q; }

    REFREEKV_DEVICE float masked(int token, int place) const { return number_of(s.mask_type, mask + token*s.next_token_mask, place); }

    REFREEKV_DEVICE float sink(int head) const { return s.has_sinks ? sinks[head] : NONE; }

    REFREEKV_DEVICE float held_k(int head, int64_t cell, int channel) const { return s.k.at(k, head, cell, channel); }
    REFREEKV_DEVICE float held_v(int head, int64_t cell, int channel) const { return s.v.at(v, head, cell, channel); }

#ifndef __METAL_VERSION__
    // the same call for tokens first .. first + n - 1
    call of_tokens(int first, int n) const {
        call res = *this;

        res.s.n_tokens = n;
        res.q    += first*s.next_token_q;
        res.mask += first*s.next_token_mask;
        res.out  += (int64_t) first*s.n_head()*s.n_v;

        return res;
    }
#endif
};

}} // namespace refreekv::tiles
