#pragma once

#include "kernels/device/attend.h"

#include <algorithm>
#include <vector>

namespace refreekv { namespace tiles {

// What decode.cu does on a GPU, on the host: the same grid, tile after tile. each(numbers, f) calls f(team, room) for all threads of a team,
// with so much memory that they share
template <typename Each>
void run(const call & c, Each && each) {
    for (int t = 0; t < c.s.n_tokens; ++t) {
        for (int h = 0; h < c.s.n_head_kv; ++h) {
            for (int b = 0; b < c.s.n_blocks(); ++b) {
                each(judge_room(c.s), [&](const auto & team, float * room) { judge(team, c, b, h, t, room); });
            }
        }
        for (int h = 0; h < c.s.n_head(); ++h) {
            each(2*MERGED, [&](const auto & team, float * room) { merge(team, c, h, t, room); });
        }
        for (int h = 0; h < c.s.n_head_kv; ++h) {
            for (int i = 0; i < c.s.n_spans(); ++i) {
                each(attend_room::size(c.s), [&](const auto & team, float * room) { attend(team, c, i, h, t, room); });
            }
        }
    }
    for (int t = 0; t < c.s.n_tokens; ++t) {
        for (int h = 0; h < c.s.n_head(); ++h) {
            each(0, [&](const auto & team, float *) { join(team, c, h, t); });
        }
    }
}

inline void run(const call & c) {
    std::vector<float> room(std::max({ judge_room(c.s), attend_room::size(c.s), (int64_t) 2*MERGED }));

    run(c, [&](int64_t, auto && f) { f(lone(), room.data()); });
}

}} // namespace refreekv::tiles
