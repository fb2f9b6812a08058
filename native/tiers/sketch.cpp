#include "tiers/sketch.h"

#include <algorithm>
#include <cmath>

void refreekv_sketch::reset(int64_t n_embd) {
    this->n_embd = n_embd;

    blocks.clear();
    all_channels.clear();
    all_codes.clear();
}

void refreekv_sketch::reserve(size_t n_more) {
    blocks      .reserve( blocks.size() + n_more);
    all_channels.reserve((blocks.size() + n_more)*n_embd);
    all_codes   .reserve((blocks.size() + n_more)*n_embd*n_cells/2);
}

void refreekv_sketch::add(const std::vector<uint32_t> & cells, const float * keys) {
    GGML_ASSERT(!cells.empty() && cells.size() <= n_cells);

    const size_t n = cells.size();

    blocks.push_back({ cells, ~0ull >> (64 - n) });

    std::vector<float> least(keys, keys + n_embd);
    std::vector<float> most (keys, keys + n_embd);
    for (size_t j = 1; j < n; ++j) {
        for (int64_t d = 0; d < n_embd; ++d) {
            least[d] = std::min(least[d], keys[j*n_embd + d]);
            most [d] = std::max(most [d], keys[j*n_embd + d]);
        }
    }

    // codes are those of the numbers as f16 has them
    std::vector<float> inverse(n_embd);
    for (int64_t d = 0; d < n_embd; ++d) {
        const channel c = { ggml_fp32_to_fp16(least[d]), ggml_fp32_to_fp16((most[d] - least[d])/15.0f) };
        all_channels.push_back(c);

        const float step = ggml_fp16_to_fp32(c.step);

        least  [d] = ggml_fp16_to_fp32(c.least);
        inverse[d] = step > 0.0f ? 1.0f/step : 0.0f;
    }

    const size_t first = all_codes.size();
    all_codes.resize(first + n_embd*n_cells/2, 0);

    for (size_t j = 0; j < n; ++j) {
        const float * key = keys + j*n_embd;
        uint8_t * codes   = &all_codes[first + j % (n_cells/2)];
        const int shift   = j < n_cells/2 ? 0 : 4;

        for (int64_t d = 0; d < n_embd; ++d) {
            const float code = std::clamp((key[d] - least[d])*inverse[d] + 0.5f, 0.0f, 15.0f);

            codes[d*n_cells/2] |= (uint8_t) code << shift;
        }
    }
}

void refreekv_sketch::copy(uint32_t first_src, uint32_t first_dst, uint32_t n) {
    const size_t n_codes = n_embd*n_cells/2;

    for (size_t i = 0, n_blocks = blocks.size(); i < n_blocks; ++i) {
        block b = blocks[i];

        if (b.cells[0] < first_src || b.cells[0] - first_src >= n) {
            continue;
        }
        for (uint32_t & cell : b.cells) {
            cell = cell - first_src + first_dst;
        }
        blocks.push_back(std::move(b));

        all_channels.resize(all_channels.size() + n_embd);
        all_codes   .resize(all_codes   .size() + n_codes);
        std::copy_n(&all_channels[i*n_embd],  n_embd,  all_channels.end() - n_embd);
        std::copy_n(&all_codes   [i*n_codes], n_codes, all_codes   .end() - n_codes);
    }
}

size_t refreekv_sketch::bytes() const {
    return all_codes.size() + all_channels.size()*sizeof(channel) + blocks.size()*(sizeof(block) + n_cells*sizeof(uint32_t));
}

void refreekv_sketch::drop_empty() {
    const size_t n_codes = n_embd*n_cells/2;

    size_t n = 0;
    for (size_t i = 0; i < blocks.size(); ++i) {
        if (blocks[i].there == 0) {
            continue;
        }
        if (n < i) {
            blocks[n] = std::move(blocks[i]);
            std::copy_n(&all_channels[i*n_embd],  n_embd,  &all_channels[n*n_embd]);
            std::copy_n(&all_codes   [i*n_codes], n_codes, &all_codes   [n*n_codes]);
        }
        n++;
    }
    blocks.resize(n);
    all_channels.resize(n*n_embd);
    all_codes.resize(n*n_codes);

    blocks.shrink_to_fit();
    all_channels.shrink_to_fit();
    all_codes.shrink_to_fit();
}
