#pragma once

#include "kernels/device/codes.h"

namespace refreekv { namespace tiles {

REFREEKV_CONSTANT int GROUPS = 8; // parts in which a sum over a block or over channels is made

// numbers of memory that the team shares
REFREEKV_DEVICE int64_t judge_room(in<sizes> s) { return LINES*s.n_k + 2*LINES*GROUPS + LINES*CELLS + CELLS; }

// First pass: of one block of cells in one KV head, the logits of its lines, as weights relative to the block's largest
template <typename Team>
REFREEKV_DEVICE void judge(in<Team> team, in<call> c, int block, int h_kv, int token, team_ptr<float> room) {
    const team_ptr<float> q      = room;                   // [LINES][n_k] of codes times their steps
    const team_ptr<float> base   = q      + LINES*c.s.n_k; // [LINES][GROUPS] what the least numbers of the channels make of q
    const team_ptr<float> some   = base   + LINES*GROUPS;  // [LINES][GROUPS] maxima, then sums
    const team_ptr<float> logits = some   + LINES*GROUPS;  // [LINES][CELLS], then weights
    const team_ptr<float> mask   = logits + LINES*CELLS;   // [CELLS]

    const bool coded = block < c.s.n_coded/CELLS;

    const device_ptr<const uint8_t> codes = coded ? c.codes_k + ((int64_t) h_kv*(c.s.n_coded/CELLS) + block)*block_bytes(c.s.n_k, BITS_K) : nullptr;

    for (int i = team.rank; i < CELLS; i += team.size) {
        mask[i] = c.masked(token, block*CELLS + i);
    }
    team.sync();

    bool any = false;
    for (int i = 0; i < CELLS; ++i) {
        any = any || mask[i] > NONE;
    }

    for (int first = 0; first < c.s.n_gqa; first += LINES) {
        const int     n = lesser(LINES, c.s.n_gqa - first);
        const int64_t r = c.s.line(token, h_kv*c.s.n_gqa + first);

        if (!any) {
            for (int i = team.rank; i < n; i += team.size) {
                c.tops(r + i)[block] = NONE;
                c.sums(r + i)[block] = 0.0f;
            }
            continue;
        }

        for (int i = team.rank; i < LINES*c.s.n_k; i += team.size) {
            const int   d = i%c.s.n_k;
            const float x = i/c.s.n_k < n ? c.query(token, h_kv*c.s.n_gqa + first + i/c.s.n_k)[d] : 0.0f;

            q[i] = coded ? x*step_of(codes, c.s.n_k, d) : x;
        }
        for (int i = team.rank; i < n*GROUPS; i += team.size) {
            const device_ptr<const float> its = c.query(token, h_kv*c.s.n_gqa + first + i/GROUPS);

            base[i] = 0.0f;
            for (int d = i%GROUPS; coded && d < c.s.n_k; d += GROUPS) {
                base[i] += its[d]*least_of(codes, d);
            }
        }
        team.sync();

        for (int cell = team.rank; cell < CELLS; cell += team.size) {
            float sums[LINES] = {};
            if (coded) {
                dot_codes<BITS_K>(codes, c.s.n_k, cell, q, sums);
            } else {
                for (int d = 0; d < c.s.n_k; ++d) {
                    const float x = c.held_k(h_kv, block*CELLS - c.s.n_coded + cell, d);

                    for (int i = 0; i < LINES; ++i) {
                        sums[i] += q[i*c.s.n_k + d]*x;
                    }
                }
            }
            for (int i = 0; i < n; ++i) {
                for (int j = 0; j < GROUPS; ++j) {
                    sums[i] += base[i*GROUPS + j];
                }
                logits[i*CELLS + cell] = mask[cell] > NONE ? c.s.finished(sums[i]) + mask[cell] : NONE; // a free slot may have anything in it
            }
        }
        team.sync();

        for (int i = team.rank; i < n*GROUPS; i += team.size) {
            const team_ptr<const float> its = logits + i*(CELLS/GROUPS);

            some[i] = its[0];
            for (int j = 1; j < CELLS/GROUPS; ++j) {
                some[i] = fmaxf(some[i], its[j]);
            }
        }
        team.sync();

        for (int i = team.rank; i < n*CELLS; i += team.size) {
            float top = NONE;
            for (int j = 0; j < GROUPS; ++j) {
                top = fmaxf(top, some[i/CELLS*GROUPS + j]);
            }
            logits[i] = expf(logits[i] - top);

            c.weights(r + i/CELLS)[block*CELLS + i%CELLS] = logits[i];
            if (i%CELLS == 0) {
                c.tops(r + i/CELLS)[block] = top;
            }
        }
        team.sync();

        for (int i = team.rank; i < n*GROUPS; i += team.size) {
            some[i] = 0.0f;
            for (int j = 0; j < CELLS/GROUPS; ++j) {
                some[i] += logits[i*(CELLS/GROUPS) + j];
            }
        }
        team.sync();

        for (int i = team.rank; i < n; i += team.size) {
            float total = 0.0f;
            for (int j = 0; j < GROUPS; ++j) {
                total += some[i*GROUPS + j];
            }
            c.sums(r + i)[block] = total;
        }
        team.sync();
    }
}

REFREEKV_CONSTANT int MERGED = 32; // parts in which the sum over all blocks is made

// Between the passes: the logarithm of the sum of all e^logit of a line, with its sink. room: [2*MERGED]
template <typename Team>
REFREEKV_DEVICE void merge(in<Team> team, in<call> c, int head, int token, team_ptr<float> room) {
    const int64_t r = c.s.line(token, head);

    const team_ptr<float> tops = room;
    const team_ptr<float> sums = room + MERGED;

    for (int i = team.rank; i < MERGED; i += team.size) {
        tops[i] = NONE;
        for (int b = i; b < c.s.n_blocks(); b += MERGED) {
            tops[i] = fmaxf(tops[i], c.tops(r)[b]);
        }
    }
    team.sync();

    float top = c.sink(head);
    for (int i = 0; i < MERGED; ++i) {
        top = fmaxf(top, tops[i]);
    }

    for (int i = team.rank; i < MERGED; i += team.size) {
        sums[i] = 0.0f;
        for (int b = i; b < c.s.n_blocks(); b += MERGED) {
            if (c.tops(r)[b] > NONE) {
                sums[i] += c.sums(r)[b]*expf(c.tops(r)[b] - top);
            }
        }
    }
    team.sync();

    if (team.rank == 0) {
        float total = c.sink(head) > NONE ? expf(c.sink(head) - top) : 0.0f;
        for (int i = 0; i < MERGED; ++i) {
            total += sums[i];
        }
        *c.lse(r) = top > NONE ? top + logf(total) : 0.0f; // a line that sees nothing has no weights
    }
}

}} // namespace refreekv::tiles
