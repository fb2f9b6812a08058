// Part of ggml's CPU backend (CMakeLists.txt).

#include "kernels/lines.h"

#ifdef REFREEKV_LANES

#include <algorithm>
#include <cmath>

namespace refreekv {

void judge_span(const warm_view & warm, const shape & s, const lines & l, const ggml_tensor * q, int64_t token, int64_t t, int64_t h_kv, int64_t span) {
    const float * queries[REFREEKV_WARM_GQA];
    warm_judged   judged [REFREEKV_WARM_GQA];

    for (int64_t i = 0; i < s.n_gqa; ++i) {
        queries[i] = query_of(q, token, h_kv*s.n_gqa + i);
        judged [i] = l.judged(t*s.n_head + h_kv*s.n_gqa + i);

        for (int64_t b = l.n_blocks; b < l.n_padded && span == l.n_spans - 1; ++b) {
            judged[i].tops  [b] = -INFINITY;
            judged[i].totals[b] = 0.0f;
            judged[i].excess[b] = 0.0f;
        }
    }
    warm_judge(warm, token, h_kv, s.n_gqa, span, queries, judged);
}

void attend_span(const warm_view & warm, const shape & s, const lines & l, const float * lse, float * least, const ggml_tensor * q, int64_t token, int64_t t, int64_t h_kv, int64_t span) {
    const float * queries[REFREEKV_WARM_GQA];
    warm_judged   judged [REFREEKV_WARM_GQA];
    float *       out    [REFREEKV_WARM_GQA];

    for (int64_t i = 0; i < s.n_gqa; ++i) {
        const int64_t r = t*s.n_head + h_kv*s.n_gqa + i;

        queries[i] = query_of(q, token, h_kv*s.n_gqa + i);
        judged [i] = l.judged(r);
        out    [i] = l.spans + (span*l.n_lines + r)*s.n_part;

        if (warm.max_error > 0.0f && least[r] < 0.0f) {
            least[r] = warm_least(warm, token, judged[i], lse[r]);
        }
    }
    const int64_t first = t*s.n_head + h_kv*s.n_gqa;

    warm_attend(warm, token, h_kv, s.n_gqa, span, queries, judged, lse + first, least + first, out);
}

float estimate_lse(const shape & s, const lines & l, int64_t r, float sink) {
    const warm_judged judged = l.judged(r);

    lanes most = sink - lanes {};
    for (int64_t b = 0; b < l.n_padded; b += N_LANES) {
        most = max(load(judged.tops + b), most);
    }
    float top = -INFINITY;
    for (int i = 0; i < N_LANES; ++i) {
        top = std::max(top, most[i]);
    }
    for (int64_t c = 0; c < s.n_chunks; ++c) {
        top = std::max(top, l.parts[(c*l.n_lines + r)*s.n_part + s.n_v]);
    }
    if (top == -INFINITY) {
        return 0.0f; // it sees nothing
    }

    lanes sums = {};
    for (int64_t b = 0; b < l.n_padded; b += N_LANES) {
        sums += load(judged.totals + b)*exp_neg(load(judged.tops + b) - top);
    }
    float total = sum(sums) + expf(sink - top);
    for (int64_t c = 0; c < s.n_chunks; ++c) {
        const float * part = l.parts + (c*l.n_lines + r)*s.n_part + s.n_v;

        total += part[1]*expf(part[0] - top);
    }

    return top + logf(total);
}

void join_line(const shape & s, const lines & l, int64_t r, float sink, float lse, float * out, counted * counts) {
    float top = l.n_spans > 0 ? lse : sink;
    for (int64_t c = 0; c < s.n_chunks; ++c) {
        top = std::max(top, l.parts[(c*l.n_lines + r)*s.n_part + s.n_v]);
    }

    float total = sink > -INFINITY ? expf(sink - top) : 0.0f;

    std::fill_n(out, s.n_v, 0.0f);

    const auto add = [&](const float * part, float w, float weights) {
        total += w*weights;
        for (int64_t d = 0; d < s.n_v; d += N_LANES) {
            store(out + d, load(out + d) + w*load(part + d));
        }
    };
    for (int64_t c = 0; c < s.n_chunks; ++c) {
        const float * part = l.parts + (c*l.n_lines + r)*s.n_part;

        if (part[s.n_v] > -INFINITY) { // else there is nothing that this token may see
            add(part, expf(part[s.n_v] - top), part[s.n_v + 1]);
        }
    }
    float by_codes = 0.0f;
    float excess   = 0.0f;
    for (int64_t i = 0; i < l.n_spans; ++i) {
        const float * part = l.spans + (i*l.n_lines + r)*s.n_part;
        const float   w    = expf(lse - top);

        add(part, w, part[s.n_v + WARM_WEIGHTS]);

        by_codes += w*part[s.n_v + WARM_BY_CODES];
        excess   += w*part[s.n_v + WARM_EXCESS];
    }
    if (counts && total > 0.0f) {
        counts->n_lines++;
        counts->by_codes += (int64_t) (by_codes/total*warm_counts::UNIT);
        counts->worst     = std::max(counts->worst, (int64_t) (std::min(excess/total, 1.0f)*warm_counts::UNIT));
    }
    for (int64_t d = 0; total > 0.0f && d < s.n_v; d += N_LANES) {
        store(out + d, load(out + d)/total);
    }
}

} // namespace refreekv

#endif
