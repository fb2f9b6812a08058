#include "tiers/warm-cells.h"

#include "kernels/codes.h"
#include "tiers/cold-store.h"

#include <algorithm>
#include <cstring>
#include <new>
#include <numeric>

namespace refreekv {

static const size_t SLAB     = 16;      // blocks
static const size_t GAP      = 2 << 10; // bytes: reading them costs less than another read would
static const uint32_t N_READ = 16;      // neighbouring cells that one read covers at most

warm_cells::warm_cells(std::unique_ptr<code_tensors> its) :
    n_head_kv(its->n_heads()), bytes_k(its->head_bytes(false)), bytes_v(its->head_bytes(true)), tensors(std::move(its)) {
    update_view();
}

warm_cells::warm_cells(int64_t n_head_kv, int64_t n_k, int64_t n_v, int bits_k, int bits_v) :
    n_head_kv(n_head_kv), bytes_k(codes_bytes(n_k, bits_k)), bytes_v(bits_v > 0 ? codes_bytes(n_v, bits_v) : 0) {
    largest_steps.assign(n_head_kv*n_k, 0.0f);

    view.largest_steps = largest_steps.data();

    view.n_head_kv = n_head_kv;
    view.n_k       = n_k;
    view.n_v       = n_v;
    view.bits_k    = bits_k;
    view.bits_v    = bits_v;
    view.v_in_k    = bits_v == 0;
    view.counts    = &counts;
    view.source    = this;

    view.next_head_k = SLAB*bytes_k;
    view.next_head_v = SLAB*bytes_v;

    view.read = [](const void * source, int64_t block, uint64_t cells, int64_t h_kv, uint8_t * rows) {
        return ((const warm_cells *) source)->read(block, cells, h_kv, rows);
    };
}

// the kernels' view, after blocks have come or gone
void warm_cells::update_view() {
    visible.clear();

    view.n_blocks = blocks.size();
    view.blocks_k = codes_k.data();
    view.blocks_v = codes_v.data();
    view.there    = there.data();
    view.visible  = nullptr;
}

void warm_cells::clear() {
    blocks.clear();
    there.clear();
    codes_k.clear();
    codes_v.clear();
    slabs.clear();
    std::fill(largest_steps.begin(), largest_steps.end(), 0.0f);
    if (tensors) {
        tensors->arrange({});
    }
    update_view();
}

void warm_cells::reserve(size_t n) {
    if (tensors) {
        tensors->reserve(blocks.size() + n);
    }
}

void warm_cells::note_steps(uint32_t block) {
    for (int64_t h = 0; h < view.n_head_kv; ++h) {
        const auto * steps   = (const ggml_fp16_t *) codes_of(block, h, false) + view.n_k;
        float *      largest = largest_steps.data() + h*view.n_k;

        for (int64_t d = 0; d < view.n_k; ++d) {
            largest[d] = std::max(largest[d], ggml_fp16_to_fp32(steps[d]));
        }
    }
}

void warm_cells::add(const uint32_t * cells, size_t n, uint64_t there_bits) {
    const size_t n_blocks = blocks.size();
    const size_t in_slab  = n_blocks % SLAB;

    if (tensors) {
        tensors->reserve(n_blocks + 1);
    } else if (n_blocks == slabs.size()*SLAB) {
        auto slab = pages_alloc(SLAB*block_bytes());
        if (!slab) {
            throw std::bad_alloc();
        }
        slabs.push_back(std::move(slab));
    }
    try {
        blocks .reserve(n_blocks + SLAB);
        there  .reserve(n_blocks + SLAB);
        codes_k.reserve(n_blocks + SLAB);
        codes_v.reserve(n_blocks + SLAB);
    } catch (const std::bad_alloc &) {
        update_view(); // some of them may lie elsewhere now
        throw;
    }

    block b = { *std::min_element(cells, cells + n), {} };
    for (size_t i = 0; i < n; ++i) {
        b.behind[i] = cells[i] - b.lowest;
    }
    blocks.push_back(b);
    there .push_back(there_bits);
    if (!tensors) {
        uint8_t * slab = (uint8_t *) slabs.back().get();

        codes_k.push_back(slab + in_slab*bytes_k);
        codes_v.push_back(slab + view.n_head_kv*view.next_head_k + in_slab*bytes_v);
    }
    update_view();
}

// in this order
void warm_cells::copy_codes(const std::vector<uint32_t> & src, const std::vector<uint32_t> & dst) {
    if (tensors) {
        tensors->copy(src, dst);
        return;
    }
    for (size_t i = 0; i < src.size(); ++i) {
        for (int64_t h = 0; h < n_head_kv && src[i] != dst[i]; ++h) {
            memcpy(codes_k[dst[i]] + h*view.next_head_k, codes_k[src[i]] + h*view.next_head_k, bytes_k);
            memcpy(codes_v[dst[i]] + h*view.next_head_v, codes_v[src[i]] + h*view.next_head_v, bytes_v);
        }
    }
}

void warm_cells::get_codes(uint32_t block, uint8_t * dst) const {
    code_tensors::blocks one;
    if (tensors) {
        one = tensors->make(1);
        tensors->get(block, one);
    }
    for (int64_t h = 0; h < n_head_kv; ++h) {
        for (bool v : { false, true }) {
            memcpy(dst, tensors ? (v ? one.v : one.k).data() + h*head_bytes(v) : codes_of(block, h, v), head_bytes(v));
            dst += head_bytes(v);
        }
    }
}

void warm_cells::set_codes(uint32_t block, const uint8_t * src) {
    code_tensors::blocks one;
    if (tensors) {
        one = tensors->make(1);
    }
    for (int64_t h = 0; h < n_head_kv; ++h) {
        for (bool v : { false, true }) {
            memcpy(tensors ? (v ? one.v : one.k).data() + h*head_bytes(v) : (v ? codes_v : codes_k)[block] + h*(v ? view.next_head_v : view.next_head_k), src, head_bytes(v));
            src += head_bytes(v);
        }
    }
    if (tensors) {
        tensors->set(block, one);
    } else {
        note_steps(block);
    }
}

bool warm_cells::alike(const warm_cells & other) const {
    return there == other.there && blocks == other.blocks && (!tensors || (other.tensors && tensors->capacity() == other.tensors->capacity()));
}

void warm_cells::copy(uint32_t first_src, uint32_t first_dst, uint32_t n) {
    std::vector<uint32_t> src;
    std::vector<uint32_t> dst;

    for (size_t i = 0, n_blocks = blocks.size(); i < n_blocks; ++i) {
        if (blocks[i].lowest < first_src || blocks[i].lowest - first_src >= n) {
            continue;
        }
        uint32_t cells[64];
        for (int64_t j = 0; j < 64; ++j) {
            cells[j] = cell(i, j) - first_src + first_dst;
        }
        src.push_back(i);
        dst.push_back(blocks.size());
        add(cells, 64, there[i]);
    }
    copy_codes(src, dst);
}

std::vector<uint8_t> warm_cells::cells(uint32_t n_cells) const {
    std::vector<uint8_t> res(n_cells, 0);
    for (uint32_t b = 0; b < blocks.size(); ++b) {
        for (uint64_t left = there[b]; left; left &= left - 1) {
            res[cell(b, lowest_bit(left))] = 1;
        }
    }
    return res;
}

uint32_t warm_cells::n_cells() const {
    uint32_t res = 0;
    for (uint64_t bits : there) {
        for (; bits; bits &= bits - 1) {
            res++;
        }
    }
    return res;
}

void warm_cells::move_to_new(uint32_t block, uint64_t bits) {
    there[block] &= ~bits;

    uint32_t cells[64];
    for (int64_t i = 0; i < 64; ++i) {
        cells[i] = cell(block, i);
    }
    try {
        add(cells, 64, bits);
        copy_codes({ block }, { n_blocks() - 1 });
    } catch (const std::bad_alloc &) {
        // what is hidden is lost; what another sequence sees would be wrong
    }
}

size_t warm_cells::bytes() const {
    return (tensors ? tensors->bytes() : blocks.size()*(block_bytes() + 2*sizeof(codes_k[0]))) + blocks.size()*(sizeof(block) + sizeof(there[0]));
}

void warm_cells::drop_empty() {
    if (std::find(there.begin(), there.end(), 0) == there.end()) {
        return;
    }

    std::vector<uint32_t> stay;
    for (uint32_t i = 0; i < blocks.size(); ++i) {
        if (there[i] != 0) {
            stay.push_back(i);
        }
    }
    const size_t n = stay.size();

    std::vector<uint32_t> dst(n); // nothing may fail between the moves of blocks and of their codes
    std::iota(dst.begin(), dst.end(), 0);

    if (tensors) {
        tensors->arrange(stay);
    }
    for (size_t i = 0; i < n; ++i) {
        blocks[i] = blocks[stay[i]];
        there [i] = there [stay[i]];
    }
    blocks.resize(n);
    there .resize(n);

    if (!tensors) {
        copy_codes(stay, dst);

        codes_k.resize(n);
        codes_v.resize(n);
        slabs  .resize((n + SLAB - 1)/SLAB);

        std::fill(largest_steps.begin(), largest_steps.end(), 0.0f);
        for (uint32_t b = 0; b < n; ++b) {
            note_steps(b);
        }
    }

    blocks.shrink_to_fit();
    there .shrink_to_fit();
    codes_k.shrink_to_fit();
    codes_v.shrink_to_fit();
    update_view();
}

// Called by threads of a graph, during which no row moves. Rows that lie close together come with one read
uint64_t warm_cells::read(uint32_t block, uint64_t cells, uint32_t head, uint8_t * rows) const {
    const size_t   size  = exact.record.bytes();
    const size_t   part  = exact.record.head();
    const uint32_t n_gap = std::max<size_t>(1, GAP/size);

    // a read of what lies between two cells fails where the store has no row there
    const auto are_there = [&](uint32_t from, uint32_t to) { return std::find(exact.there + from, exact.there + to, 0) == exact.there + to; };

    thread_local std::vector<uint8_t> piece;

    if (!exact.readable) {
        is_lost = true;
        return 0;
    }
    for (uint64_t left = cells; left; left &= left - 1) {
        const int64_t i = lowest_bit(left);
        if (!exact.there[cell(block, i)]) {
            cells &= ~(1ull << i); // there was no room for it
        }
    }

    uint64_t had = cells;

    while (cells) {
        const uint32_t first = cell(block, lowest_bit(cells));

        uint64_t run = 0;
        uint32_t behind[N_READ]; // the run's cells, counted from the first
        uint32_t n = 0;

        do {
            const int64_t  i    = lowest_bit(cells);
            const uint32_t next = cell(block, i);
            if (n > 0 && (next < first || next - first - behind[n - 1] > n_gap || next - first >= N_READ || !are_there(first + behind[n - 1], next))) {
                break;
            }
            run |= 1ull << i;
            behind[n++] = next - first;
            cells &= cells - 1;
        } while (cells && n < N_READ);

        piece.resize(N_READ*size);

        const auto res = exact.store->try_read(exact.place + first*(uint64_t) size + head*part, piece.data(), behind[n - 1]*size + part);

        if (res != file::THERE) {
            is_lost = is_lost || res == file::LOST;
            had &= ~run;
            continue;
        }
        for (uint32_t i = 0; i < n; ++i, rows += part) {
            memcpy(rows, piece.data() + behind[i]*size, part);
        }
    }

    return had;
}

} // namespace refreekv
