#include "cache/residency.h"

#include <cassert>

namespace refreekv {

void residency::reset(uint32_t n_cells) {
    slot_of.assign(n_cells, -1);
    cell_of.clear();
    is_hidden.clear();
    free.clear();
}

void residency::hide(uint32_t slot_id) {
    is_hidden.resize(cell_of.size(), 0);
    is_hidden[slot_id] = 1;
}

uint32_t residency::n_visible() const {
    uint32_t res = n_used();
    for (uint32_t s = 0; s < is_hidden.size(); ++s) {
        res -= is_hidden[s] && cell_of[s] >= 0;
    }
    return res;
}

uint32_t residency::n_slots_after(uint32_t n_new) const {
    return n_slots() + (n_new > free.size() ? n_new - free.size() : 0);
}

uint32_t residency::assign(uint32_t cell) {
    assert(cell < slot_of.size());

    int32_t s = slot_of[cell];

    if (s < 0) {
        if (free.empty()) {
            s = cell_of.size();
            cell_of.push_back(-1);
            if (!is_hidden.empty()) {
                is_hidden.push_back(0);
            }
        } else {
            s = free.back();
            free.pop_back();
        }
        slot_of[cell] = s;
        cell_of[s]    = cell;
    }

    if (!is_hidden.empty()) {
        is_hidden[s] = 0;
    }

    return s;
}

void residency::reserve(uint32_t n_slots) {
    cell_of.reserve(n_slots);
    free.reserve(n_slots);
}

void residency::arrange(const std::vector<uint32_t> & cells) {
    std::vector<int32_t> hidden;
    for (uint32_t s = 0; s < is_hidden.size(); ++s) {
        if (is_hidden[s] && cell_of[s] >= 0) {
            hidden.push_back(cell_of[s]);
        }
    }

    reset(slot_of.size());

    for (uint32_t cell : cells) {
        slot_of[cell] = cell_of.size();
        cell_of.push_back(cell);
    }
    for (int32_t cell : hidden) {
        hide(slot_of[cell]);
    }
}

void residency::compact(const std::vector<uint32_t> & slots) {
    for (int32_t c : cell_of) {
        if (c >= 0) {
            slot_of[c] = -1;
        }
    }

    for (uint32_t i = 0; i < slots.size(); ++i) {
        assert(slots[i] >= i && cell_of[slots[i]] >= 0);

        cell_of[i]          = cell_of[slots[i]];
        slot_of[cell_of[i]] = i;
        if (!is_hidden.empty()) {
            is_hidden[i] = is_hidden[slots[i]];
        }
    }

    cell_of.resize(slots.size());
    if (!is_hidden.empty()) {
        is_hidden.resize(slots.size());
    }
    free.clear();
}

// drop trailing free slots and list the others
void residency::trim() {
    while (!cell_of.empty() && cell_of.back() < 0) {
        cell_of.pop_back();
    }
    if (!is_hidden.empty()) {
        is_hidden.resize(cell_of.size());
    }

    free.clear();
    for (uint32_t s = cell_of.size(); s-- > 0;) {
        if (cell_of[s] < 0) {
            free.push_back(s);
        }
    }
}

} // namespace refreekv
