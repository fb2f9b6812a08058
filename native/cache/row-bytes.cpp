#include "cache/row-bytes.h"

#include "cache/runs.h"

#include <algorithm>
#include <cstring>
#include <numeric>

namespace refreekv {

// rows that are transposed together: few enough to stay in the first cache, and enough to fill its lines on the other side
static const size_t REFREEKV_ROW_BLOCK = 64;

// f(element of a line, element of a row) for all of n rows; lines: an element of all cells each, stride apart
template <typename T, typename F>
static void transpose(T * lines, size_t stride, size_t n_lines, const uint32_t * slots, size_t n, T * rows, F && f) {
    const size_t n_wide = n_lines - n_lines % 4;

    for (size_t i0 = 0; i0 < n; i0 += REFREEKV_ROW_BLOCK) {
        const size_t i1 = std::min(i0 + REFREEKV_ROW_BLOCK, n);

        for (size_t j = 0; j < n_wide; j += 4) {
            T * line = lines + j*stride;
            for (size_t i = i0; i < i1; ++i) {
                T * row = rows + i*n_lines + j;
                f(line[0*stride + slots[i]], row[0]);
                f(line[1*stride + slots[i]], row[1]);
                f(line[2*stride + slots[i]], row[2]);
                f(line[3*stride + slots[i]], row[3]);
            }
        }
        for (size_t j = n_wide; j < n_lines; ++j) {
            for (size_t i = i0; i < i1; ++i) {
                f(lines[j*stride + slots[i]], rows[i*n_lines + j]);
            }
        }
    }
}

// the types that V can be transposed in have 2 or 4 bytes
template <typename F>
static void transpose(uint8_t * base, size_t element, size_t stride, size_t n_lines, const uint32_t * slots, size_t n, uint8_t * rows, F && f) {
    if (element == sizeof(uint16_t)) {
        transpose((uint16_t *) base, stride/element, n_lines, slots, n, (uint16_t *) rows, f);
    } else {
        GGML_ASSERT(element == sizeof(uint32_t));
        transpose((uint32_t *) base, stride/element, n_lines, slots, n, (uint32_t *) rows, f);
    }
}

// f(i, n) for each run of n slots from the i-th on
template <typename F>
static void for_slots(const uint32_t * slots, size_t n_slots, F && f) {
    for_runs(slots, n_slots, [&](size_t i, size_t n) {
        f(i, n);
        return true;
    });
}

row_bytes::row_bytes(const ggml_tensor * t, bool trans, void * base) :
    base((uint8_t *) base), part(!t ? 0 : trans ? t->nb[0] : t->nb[1]), n_parts(t && trans ? t->ne[1] : 1), line(t ? t->nb[1] : 0) {
}

void row_bytes::get(const uint32_t * slots, size_t n, uint8_t * dst) const {
    if (trans()) {
        transpose(base, part, line, n_parts, slots, n, dst, [](auto & ours, auto & theirs) { theirs = ours; });
    } else if (part > 0) {
        for_slots(slots, n, [&](size_t i, size_t n_run) { memcpy(dst + i*part, at(slots[i]), n_run*part); });
    }
}

void row_bytes::set(const uint32_t * slots, size_t n, const uint8_t * src) {
    if (trans()) {
        transpose(base, part, line, n_parts, slots, n, const_cast<uint8_t *>(src), [](auto & ours, auto & theirs) { ours = theirs; });
    } else if (part > 0) {
        for_slots(slots, n, [&](size_t i, size_t n_run) { memcpy(at(slots[i]), src + i*part, n_run*part); });
    }
}

// f(i, slot) for those that have a source, in order; all have to say yes
template <typename F>
static bool all_slots(const std::vector<uint32_t> & slots, F && f) {
    int64_t last = -1;
    for (size_t i = 0; i < slots.size(); ++i) {
        if (slots[i] != row_bytes::none) {
            if (slots[i] <= last || !f(i, slots[i])) {
                return false;
            }
            last = slots[i];
        }
    }
    return true;
}

bool row_bytes::forward(const refreekv::row_bytes & src, const std::vector<uint32_t> & slots) const {
    return line <= src.line && all_slots(slots, [](size_t i, uint32_t slot) { return slot >= i; });
}

bool row_bytes::backward(const refreekv::row_bytes & src, const std::vector<uint32_t> & slots) const {
    return line >= src.line && all_slots(slots, [](size_t i, uint32_t slot) { return slot <= i; });
}

size_t row_bytes::spare(const refreekv::row_bytes & src, const std::vector<uint32_t> & slots) const {
    return forward(src, slots) || backward(src, slots) ? 0 : slots.size()*row();
}

row_moves::row_moves(const std::vector<uint32_t> & slots, bool with_spare) : slots(slots) {
    for_slots(slots.data(), slots.size(), [&](size_t i, size_t n) {
        if (slots[i] != row_bytes::none) {
            runs.push_back({ i, slots[i], n });
        } else {
            for (size_t j = i; j < i + n; ++j) {
                others.push_back(j);
            }
        }
    });
    if (with_spare) {
        places.resize(slots.size());
        std::iota(places.begin(), places.end(), 0);
    }
}

void row_bytes::copy(const refreekv::row_bytes & src, const row_moves & moves, const refreekv::bytes & spare) {
    const auto & slots = moves.slots;
    const auto & runs  = moves.runs;

    const auto move = [&](const row_moves::run & r, size_t p) {
        if (at(r.to, p) != src.at(r.from, p)) {
            memmove(at(r.to, p), src.at(r.from, p), r.n*part);
        }
    };

    if (base != src.base || forward(src, slots)) {
        for (size_t p = 0; p < n_parts; ++p) {
            for (auto r = runs.begin(); r != runs.end(); ++r) {
                move(*r, p);
            }
        }
    } else if (backward(src, slots)) {
        for (size_t p = n_parts; p-- > 0;) {
            for (auto r = runs.rbegin(); r != runs.rend(); ++r) {
                move(*r, p);
            }
        }
    } else {
        GGML_ASSERT(spare.size() >= slots.size()*row() && moves.places.size() == slots.size());

        uint8_t * rows = spare.data();
        for (const auto & r : runs) {
            src.get(slots.data() + r.to, r.n, rows + r.to*row());
        }
        for (const auto & r : runs) {
            set(moves.places.data() + r.to, r.n, rows + r.to*row());
        }
    }
}

} // namespace refreekv
