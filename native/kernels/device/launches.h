#pragma once

#include "kernels/device/attend.h"

namespace refreekv { namespace tiles {

// The four launches of a call on a GPU, one after the other, since each reads what the one before has written to the scratch
enum pass { JUDGE, MERGE, ATTEND, JOIN, N_PASSES };

// threads of a team
REFREEKV_CONSTANT int JUDGES  = CELLS;
REFREEKV_CONSTANT int MERGERS = MERGED;
REFREEKV_CONSTANT int OTHERS  = 128;

struct launch_size {
    int     teams[3]; // which tiles there are: judge(), merge(), attend() and join() take their numbers in this order
    int     threads;  // of a team
    int64_t bytes;    // of memory that a team shares
};

inline launch_size size_of(pass p, const sizes & s) {
    const int64_t number = sizeof(float);

    switch (p) {
        case JUDGE:  return { { s.n_blocks(), s.n_head_kv,  s.n_tokens }, JUDGES,  number*judge_room(s)        };
        case MERGE:  return { { s.n_head(),   s.n_tokens,   1          }, MERGERS, number*2*MERGED             };
        case ATTEND: return { { s.n_spans(),  s.n_head_kv,  s.n_tokens }, OTHERS,  number*attend_room::size(s) };
        default:     return { { s.n_head(),   s.n_tokens,   1          }, OTHERS,  0                           };
    }
}

// what the passes need at most
inline int64_t team_bytes(const sizes & s) {
    int64_t res = 0;
    for (int p = 0; p < N_PASSES; ++p) {
        const int64_t n = size_of((pass) p, s).bytes;
        res = n > res ? n : res;
    }
    return res;
}

}} // namespace refreekv::tiles
