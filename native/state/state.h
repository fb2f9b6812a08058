#pragma once

#include "cache/parts.h"

class llama_io_read_i;
class llama_io_write_i;

namespace refreekv {

// Saving and loading what a cache holds: the counterpart of llama_kv_cache::state_write_data and state_read_data.
class states {
public:
    explicit states(parts & p) : p(p) {}

    void write(llama_io_write_i & io, uint32_t strm, const std::vector<std::pair<uint32_t, uint32_t>> & ranges);

    // false: the state is not one of this context, or is damaged; upstream then clears what was read and reports the failure
    bool read(llama_io_read_i & io, uint32_t cell_count, const llama_kv_cache::slot_info & sinfo);

    // a read failed: what it wrote must not be read, not even with weight 0
    void clear_rows(const llama_kv_cache::slot_info & sinfo);

private:
    parts & p;
};

// The parts of a state behind its rows. list: the cells of the state, in its order. read: false when the state is damaged

// evicted rows that are in the cold store (state-cold.cpp); where they cannot be read any more it throws std::runtime_error
void write_cold(const parts & p, llama_io_write_i & io, const std::vector<uint32_t> & list);
bool read_cold (parts & p, llama_io_read_i & io, const std::vector<uint32_t> & list);

// codes of evicted cells (state-warm.cpp)
void write_warm(const parts & p, llama_io_write_i & io, const std::vector<uint32_t> & list);
bool read_warm (parts & p, llama_io_read_i & io, const std::vector<uint32_t> & list);

// codes of cells that the cold store has and that came without
void code_missing(parts & p, const std::vector<uint32_t> & list);

} // namespace refreekv
