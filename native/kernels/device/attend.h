#pragma once

#include "kernels/device/judge.h"

namespace refreekv { namespace tiles {

REFREEKV_CONSTANT float NOTHING = 1e-5f; // a block that gets less than this of the attention of each line adds nothing to their sums of V
REFREEKV_CONSTANT int   READ    = 8;     // exact rows that are read at a time
REFREEKV_CONSTANT int   COUNTED = 32;    // cells that one thread counts

// a span of blocks, either of codes or of cells that are held
struct span {
    int  first; // place
    int  n;     // places
    bool coded;

    REFREEKV_DEVICE span(in<call> c, int i) {
        coded = i < c.s.n_coded_spans();

        const int behind = coded ? i : i - c.s.n_coded_spans();

        first = (coded ? 0 : c.s.n_coded) + behind*SPAN*CELLS;
        n     = lesser(SPAN*CELLS, (coded ? c.s.n_coded : c.s.n_places()) - first);
    }
};

// the memory that the team shares
struct attend_room {
    team_ptr<float>    factors; // [n_gqa][SPAN] from weights within a block to weights relative to all; then the sums of these
    team_ptr<float>    best;    // [SPAN*CELLS] the most that a line gives a cell whose exact row there is; -1: that row has been read
    team_ptr<float>    dots;    // [READ][LINES][GROUPS]
    team_ptr<float>    weights; // [READ][LINES] of exact rows
    team_ptr<int32_t>  counts;  // [SPAN*CELLS/COUNTED]
    team_ptr<int32_t>  chosen;  // [SPAN*CELLS] cells of the span
    team_ptr<uint32_t> rows;    // [READ] heads of exact rows

    REFREEKV_DEVICE attend_room(in<call> c, team_ptr<float> memory) {
        factors = memory;
        best    = factors + c.s.n_gqa*SPAN;
        dots    = best    + SPAN*CELLS;
        weights = dots    + READ*LINES*GROUPS;
        counts  = (team_ptr<int32_t>) (weights + READ*LINES);
        chosen  = counts + SPAN*CELLS/COUNTED;
        rows    = (team_ptr<uint32_t>) (chosen + SPAN*CELLS);
    }

    // in numbers of 4 bytes
    REFREEKV_DEVICE static int row_size(in<sizes> s) { return (s.exact_head + 3)/4; }

    REFREEKV_DEVICE static int64_t size(in<sizes> s) {
        return s.n_gqa*SPAN + 2*SPAN*CELLS + READ*LINES*GROUPS + READ*LINES + SPAN*CELLS/COUNTED + READ*row_size(s);
    }
};

// Which cells' exact rows are read: those that a line gives theta of its attention, or, where these are too many for the budget, twice as
// much, and so on. Returns their number
template <typename Team>
REFREEKV_DEVICE int choose(in<Team> team, in<call> c, in<span> cells, in<attend_room> room) {
    const int n_counts = cells.n/COUNTED;

    float theta = c.s.theta;
    int   n     = 0;
    while (true) {
        for (int i = team.rank; i < n_counts; i += team.size) {
            room.counts[i] = 0;
            for (int j = 0; j < COUNTED; ++j) {
                room.counts[i] += room.best[i*COUNTED + j] >= theta;
            }
        }
        team.sync();

        n = 0;
        for (int i = 0; i < n_counts; ++i) {
            n += room.counts[i];
        }
        if (n <= c.s.budget() || theta > 1.0f) {
            break;
        }
        theta *= 2.0f;
        team.sync();
    }

    for (int i = team.rank; i < n_counts && n > 0; i += team.size) {
        int at = 0;
        for (int j = 0; j < i; ++j) {
            at += room.counts[j];
        }
        for (int j = i*COUNTED; j < (i + 1)*COUNTED; ++j) {
            if (room.best[j] >= theta) {
                room.chosen[at++] = j;
                room.best[j] = -1.0f;
            }
        }
    }
    team.sync();

    return n;
}

// the heads of some exact rows to the memory of the team: neighbouring threads read neighbouring words, as reads over a bus want
template <typename Team>
REFREEKV_DEVICE void read_rows(in<Team> team, in<call> c, in<span> cells, in<attend_room> room, int first, int n, int h_kv) {
    const int size = attend_room::row_size(c.s);

    for (int i = team.rank; i < n*size; i += team.size) {
        const int at = i%size*4; // byte

        const device_ptr<const uint8_t> src = (device_ptr<const uint8_t>) c.exact[cells.first + room.chosen[first + i/size]] + (int64_t) h_kv*c.s.exact_head + at;

        if (c.s.exact_head%4 == 0) {
            room.rows[i] = load<uint32_t>(src);
        } else { // the sizes of all types are even
            room.rows[i] = load<uint16_t>(src) | (at + 2 < c.s.exact_head ? (uint32_t) load<uint16_t>(src + 2) << 16 : 0);
        }
    }
}

// The exact rows that were chosen: their part of the weighted sums of V, which are 0 before
template <typename Team>
REFREEKV_DEVICE void attend_exact(in<Team> team, in<call> c, in<span> cells, in<attend_room> room, int n_chosen, int i_span, int h_kv, int token) {
    const int size = attend_room::row_size(c.s);

    for (int from = 0; from < n_chosen; from += READ) {
        const int n_rows = lesser(READ, n_chosen - from);

        read_rows(team, c, cells, room, from, n_rows, h_kv);

        for (int first = 0; first < c.s.n_gqa; first += LINES) {
            const int     n    = lesser(LINES, c.s.n_gqa - first);
            const int     head = h_kv*c.s.n_gqa + first;
            const int64_t r    = c.s.line(token, head);

            team.sync();
            for (int i = team.rank; i < n_rows*n*GROUPS; i += team.size) {
                const team_ptr<const uint8_t> k = (team_ptr<const uint8_t>) (room.rows + i/(n*GROUPS)*size);
                const device_ptr<const float> q = c.query(token, head + i/GROUPS%n);

                room.dots[i] = 0.0f;
                for (int d = i%GROUPS; d < c.s.n_k; d += GROUPS) {
                    room.dots[i] += q[d]*number_of(c.s.exact_type_k, k, d);
                }
            }
            team.sync();
            for (int i = team.rank; i < n_rows*n; i += team.size) {
                float dot = 0.0f;
                for (int j = 0; j < GROUPS; ++j) {
                    dot += room.dots[i*GROUPS + j];
                }
                room.weights[i] = expf(c.s.finished(dot) - *c.lse(r + i%n));
            }
            team.sync();
            for (int i = team.rank; i < n*(c.s.n_v + 1); i += team.size) {
                const int d    = i%(c.s.n_v + 1);
                const int line = i/(c.s.n_v + 1);

                float sum = 0.0f;
                for (int j = 0; j < n_rows; ++j) {
                    const team_ptr<const uint8_t> v = (team_ptr<const uint8_t>) (room.rows + j*size) + c.s.exact_k;

                    sum += room.weights[j*n + line]*(d < c.s.n_v ? number_of(c.s.exact_type_v, v, d) : 1.0f); // the last is the sum of weights
                }
                c.part(r + line, i_span)[d] += sum;
            }
        }
        team.sync();
    }
}

// The weights of a span's places become those of all the attention, but for cells whose exact rows took part. Their sums by blocks go to
// room.factors
template <typename Team>
REFREEKV_DEVICE void weigh(in<Team> team, in<call> c, in<span> cells, in<attend_room> room, int h_kv, int token) {
    const int64_t r = c.s.line(token, h_kv*c.s.n_gqa);

    for (int i = team.rank; i < c.s.n_gqa*cells.n; i += team.size) {
        const int   cell   = i%cells.n;
        const int   line   = i/cells.n;
        const float factor = room.factors[line*SPAN + cell/CELLS];

        const device_ptr<float> weight = c.weights(r + line) + cells.first + cell;
        *weight = factor > 0.0f && room.best[cell] >= 0.0f ? *weight*factor : 0.0f;
    }
    team.sync();

    for (int i = team.rank; i < c.s.n_gqa*SPAN; i += team.size) {
        const int     block   = i%SPAN;
        const device_ptr<const float> weights = c.weights(r + i/SPAN) + cells.first + block*CELLS;

        float sum = 0.0f;
        for (int j = 0; j < CELLS && block*CELLS < cells.n; ++j) {
            sum += weights[j];
        }
        room.factors[i] = sum;
    }
    team.sync();
}

// the weighted sum of V of a span in some lines of a channel
REFREEKV_DEVICE void add_v(in<call> c, in<span> cells, team_ptr<const float> sums, int h_kv, int channel, own_ptr<const device_ptr<const float>> weights,
        own_ptr<const int> lines, own_ptr<float> out) {
    for (int block = 0; block < cells.n/CELLS; ++block) {
        bool any = false;
        for (int i = 0; i < c.s.n_gqa; ++i) {
            any = any || sums[i*SPAN + block] >= NOTHING;
        }
        if (!any) {
            continue;
        }
        device_ptr<const float> its[LINES];
        for (int i = 0; i < LINES; ++i) {
            its[i] = weights[i] + block*CELLS;
        }
        if (cells.coded) {
            const device_ptr<const uint8_t> codes = c.codes_v + ((int64_t) h_kv*(c.s.n_coded/CELLS) + cells.first/CELLS + block)*block_bytes(c.s.n_v, BITS_V);

            float by_code[LINES];
            add_codes<BITS_V>(codes, c.s.n_v, channel, its, by_code);

            const float least = least_of(codes, channel);
            const float step  = step_of (codes, c.s.n_v, channel);
            for (int i = 0; i < LINES; ++i) {
                out[i] += least*sums[lines[i]*SPAN + block] + step*by_code[i];
            }
        } else {
            for (int cell = 0; cell < CELLS; ++cell) {
                if (its[0][cell] == 0.0f && its[1][cell] == 0.0f && its[2][cell] == 0.0f && its[3][cell] == 0.0f) {
                    continue; // the rows of free slots may have anything in them
                }
                const float x = c.held_v(h_kv, cells.first - c.s.n_coded + block*CELLS + cell, channel);

                for (int i = 0; i < LINES; ++i) {
                    out[i] += its[i][cell]*x;
                }
            }
        }
    }
}

// Second pass: the part of one span of cells in the attention of the lines of one KV head. memory: [attend_room::size()]
template <typename Team>
REFREEKV_DEVICE void attend(in<Team> team, in<call> c, int i_span, int h_kv, int token, team_ptr<float> memory) {
    const attend_room room(c, memory);
    const span        cells(c, i_span);
    const int64_t     r = c.s.line(token, h_kv*c.s.n_gqa);

    for (int i = team.rank; i < c.s.n_gqa*SPAN; i += team.size) {
        const int   block = i%SPAN;
        const float top   = block*CELLS < cells.n ? c.tops(r + i/SPAN)[cells.first/CELLS + block] : NONE;

        room.factors[i] = top > NONE ? expf(top - *c.lse(r + i/SPAN)) : 0.0f;
    }
    for (int i = team.rank; i < c.s.n_gqa*c.s.n_part(); i += team.size) {
        c.part(r + i/c.s.n_part(), i_span)[i%c.s.n_part()] = 0.0f;
    }
    team.sync();

    for (int cell = team.rank; cell < cells.n; cell += team.size) {
        room.best[cell] = 0.0f;
        for (int i = 0; cells.coded && i < c.s.n_gqa && c.exact && c.exact[cells.first + cell]; ++i) {
            const float factor = room.factors[i*SPAN + cell/CELLS];

            room.best[cell] = factor > 0.0f ? fmaxf(room.best[cell], c.weights(r + i)[cells.first + cell]*factor) : room.best[cell];
        }
    }
    team.sync();

    if (cells.coded && c.exact) {
        const int n = choose(team, c, cells, room);

        attend_exact(team, c, cells, room, n, i_span, h_kv, token);
        if (team.rank == 0) {
            c.part(r, i_span)[c.s.n_v + PART_ROWS_READ] = n;
        }
    }
    weigh(team, c, cells, room, h_kv, token);

    const int n_groups = (c.s.n_gqa + LINES - 1)/LINES;

    for (int i = team.rank; i < n_groups*c.s.n_v; i += team.size) {
        const int d     = i%c.s.n_v;
        const int first = i/c.s.n_v*LINES;

        int                     lines  [LINES]; // the last one in place of those behind it, which are not written
        device_ptr<const float> weights[LINES];
        for (int j = 0; j < LINES; ++j) {
            lines  [j] = lesser(first + j, c.s.n_gqa - 1);
            weights[j] = c.weights(r + lines[j]) + cells.first;
        }
        float sums[LINES] = {};
        add_v(c, cells, room.factors, h_kv, d, weights, lines, sums);

        for (int j = 0; j < LINES && first + j < c.s.n_gqa; ++j) {
            c.part(r + first + j, i_span)[d] += sums[j];
        }
    }
    for (int i = team.rank; i < c.s.n_gqa; i += team.size) {
        float total = 0.0f;
        for (int block = 0; block < SPAN; ++block) {
            total += room.factors[i*SPAN + block];
        }
        c.part(r + i, i_span)[c.s.n_v + PART_WEIGHTS] += total;
    }
}

// Last, the attention of a line: its parts together
template <typename Team>
REFREEKV_DEVICE void join(in<Team> team, in<call> c, int head, int token) {
    const int64_t r = c.s.line(token, head);

    float total = c.sink(head) > NONE ? expf(c.sink(head) - *c.lse(r)) : 0.0f;
    for (int i = 0; i < c.s.n_spans(); ++i) {
        total += c.part(r, i)[c.s.n_v + PART_WEIGHTS];
    }
    for (int d = team.rank; d < c.s.n_v; d += team.size) {
        float sum = 0.0f;
        for (int i = 0; i < c.s.n_spans(); ++i) {
            sum += c.part(r, i)[d];
        }
        c.out[r*c.s.n_v + d] = total > 0.0f ? sum/total : 0.0f;
    }

    if (c.n_read && token == 0 && head%c.s.n_gqa == 0 && team.rank == 0) {
        uint64_t n = 0;
        for (int t = 0; t < c.s.n_tokens; ++t) {
            for (int i = 0; i < c.s.n_coded_spans(); ++i) {
                n += (uint64_t) c.part(c.s.line(t, head), i)[c.s.n_v + PART_ROWS_READ];
            }
        }
        c.n_read[head/c.s.n_gqa] += n;
    }
}

}} // namespace refreekv::tiles
