#pragma once

#include <cstdint>
#include <vector>

namespace refreekv {

// Which logical cells (upstream's llama_kv_cells) a layer still holds, and in which physical slot.
// Pure bookkeeping: it knows neither positions nor tensors.
//
// A slot is free, or belongs to one cell. Slots [0, n_slots()) have been handed out; free ones among them are reused
// lowest first, so that layers which start equal and see the same cells stay equal.
class residency {
public:
    void reset(uint32_t n_cells);

    uint32_t n_slots() const { return cell_of.size(); }
    uint32_t n_used()  const { return cell_of.size() - free.size(); }

    // -1: none
    int32_t slot(uint32_t cell)    const { return slot_of[cell]; }
    int32_t cell(uint32_t slot_id) const { return cell_of[slot_id]; }

    // hidden slots are still held, but no query may see them (mask_only)
    bool hidden(uint32_t slot_id) const { return !is_hidden.empty() && is_hidden[slot_id]; }
    void hide  (uint32_t slot_id);

    // slots of cells that queries may see
    uint32_t n_visible() const;

    // how many slots there will be once n_new cells without a slot have got one
    uint32_t n_slots_after(uint32_t n_new) const;

    // the slot of a cell that is about to be written
    uint32_t assign(uint32_t cell);

    // give back the slots for which dead(cell) holds; true when there were any
    template <typename F>
    bool release(F && dead) {
        bool any = false;
        for (uint32_t s = 0; s < cell_of.size(); ++s) {
            if (cell_of[s] >= 0 && dead((uint32_t) cell_of[s])) {
                slot_of[cell_of[s]] = -1;
                cell_of[s]          = -1;
                any                 = true;
            }
        }
        if (any) {
            trim();
        }
        return any;
    }

    // Memory for so many slots: arrange() and release() of no more of them then allocate nothing. Throws std::bad_alloc
    void reserve(uint32_t n_slots);

    // slot i is that of cells[i], and there are no others
    void arrange(const std::vector<uint32_t> & cells);

    // slot i becomes what slots[i] was, which ascend and have a cell each; everything else is evicted. It allocates nothing: the rows have moved
    void compact(const std::vector<uint32_t> & slots);

private:
    std::vector<int32_t>  slot_of;   // [n_cells]
    std::vector<int32_t>  cell_of;   // [n_slots]
    std::vector<uint8_t>  is_hidden; // [n_slots], or empty
    std::vector<uint32_t> free;      // free slots, highest first

    void trim();
};

} // namespace refreekv
