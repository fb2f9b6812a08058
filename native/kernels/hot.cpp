// Part of ggml's CPU backend (CMakeLists.txt).

#include "kernels/hot.h"

#include "kernels/tiles.h"

#ifdef REFREEKV_LANES

#include <algorithm>
#include <cmath>
#include <vector>

namespace refreekv {

void attend_chunk(const ggml_tensor * dst, const decode_softmax & by, int64_t chunk, int64_t t0, int64_t n_tokens, float * out) {
    const ggml_tensor * q    = dst->src[0];
    const ggml_tensor * k    = dst->src[1];
    const ggml_tensor * v    = dst->src[2];
    const ggml_tensor * mask = dst->src[3];

    const shape s(q, k, v);

    const int64_t n_rows_k = s.n_k*s.n_head_kv;
    const int64_t n_rows_v = s.n_v*s.n_head_kv;
    const int64_t n_lines  = s.n_head*n_tokens;

    const auto dot = dot_tile_of(s.n_k/N_LANES);
    const auto add = add_tile_of(s.n_v/N_LANES);

    thread_local std::vector<float> scratch;

    const int64_t n_tile = TILE*std::max({ n_rows_k, n_rows_v, CHUNK });

    float * tile    = aligned(scratch, n_tile + (n_lines + n_tokens)*CHUNK);
    float * weights = tile + n_tile;           // [n_tokens][n_head][CHUNK]
    float * masks   = weights + n_lines*CHUNK; // [n_tokens][CHUNK]

    const int64_t cell = chunk*CHUNK;

    // Tokens that see none of these cells, such as those of other sequences, are passed over
    thread_local std::vector<uint8_t> sees;
    sees.resize(n_tokens);

    for (int64_t t = 0; t < n_tokens; ++t) {
        float * its = masks + t*CHUNK;

        to_float(mask->type, (const char *) mask->data + (t0 + t)*mask->nb[1] + ggml_row_size(mask->type, cell), its, CHUNK);
        sees[t] = std::any_of(its, its + CHUNK, [](float x) { return x > -INFINITY; });
    }
    for (int64_t r = 0; r < n_lines; ++r) {
        float * line = out + r*s.n_part;

        std::fill_n(line, s.n_v, 0.0f);
        line[s.n_v]     = -INFINITY;
        line[s.n_v + 1] = 0.0f;
    }
    if (std::none_of(sees.begin(), sees.end(), [](uint8_t x) { return x; })) {
        return;
    }

    for (int64_t c = 0; c < CHUNK; c += TILE) {
        read_rows(k, cell + c, tile, n_rows_k);

        for (int64_t r = 0; r < n_lines; ++r) {
            if (sees[r/s.n_head]) {
                const int64_t h = r % s.n_head;
                dot(query_of(q, t0 + r/s.n_head, h), tile + h/s.n_gqa*s.n_k, n_rows_k, s.n_k/N_LANES, weights + r*CHUNK + c);
            }
        }
    }

    for (int64_t r = 0; r < n_lines; ++r) {
        if (sees[r/s.n_head]) {
            float * line = out + r*s.n_part;

            weigh(weights + r*CHUNK, CHUNK, masks + r/s.n_head*CHUNK, by, alibi_slope(by.max_bias, r % s.n_head, s.n_head), line[s.n_v], line[s.n_v + 1]);
        }
    }

    if (!is_trans(v)) {
        for (int64_t c = 0; c < CHUNK; c += TILE) {
            read_rows(v, cell + c, tile, n_rows_v);

            for (int64_t r = 0; r < n_lines; ++r) {
                if (!sees[r/s.n_head]) {
                    continue;
                }
                add(weights + r*CHUNK + c, tile + r % s.n_head/s.n_gqa*s.n_v, n_rows_v, s.n_v/N_LANES, out + r*s.n_part);
            }
        }
        return;
    }

    // lines of V are channels: [CHUNK] cells of TILE of them at a time
    for (int64_t line = 0; line < n_rows_v; line += TILE) {
        for (int64_t i = 0; i < TILE; ++i) {
            const char * src = (const char *) v->data + (line + i)*v->nb[2] + ggml_row_size(v->type, cell);

            prefetch(src + TILE*v->nb[2], ggml_row_size(v->type, CHUNK));
            to_float(v->type, src, tile + i*CHUNK, CHUNK);
        }
        for (int64_t t = 0; t < n_tokens; ++t) {
            for (int64_t g = 0; g < s.n_gqa && sees[t]; ++g) {
                const int64_t r = t*s.n_head + line/s.n_v*s.n_gqa + g;

                dot_tile<CHUNK/N_LANES>(weights + r*CHUNK, tile, CHUNK, 0, out + r*s.n_part + line % s.n_v);
            }
        }
    }
}

} // namespace refreekv

#endif
