#pragma once

#include "cache/parts.h"
#include "library/block.h"

#include <string>
#include <vector>

namespace refreekv {

// Writes positions of a sequence to block files (library/block.h), and makes a sequence of such files. A sequence that is opened is what it
// would be if its text had been read and pruned: rows of cells that stay are in the cache, and the cold store reads those of the others
// where they are, in the files.
class block_io {
public:
    explicit block_io(parts & p) : p(p) {}

    // nullptr: this cache can be written and opened, else why it cannot
    const char * refusal() const;

    // n positions of a sequence from `first` on, of which the first n_before get no codes. A refreekv_status; where it is no success, there
    // is no file
    int32_t write(llama_seq_id seq_id, llama_pos first, uint32_t n, uint32_t n_before, const std::string & label, const std::string & path);

    // whether all rows of these positions came from block files, if there are any
    bool came_from_blocks(llama_seq_id seq_id, llama_pos first, uint32_t n) const;

    // The sequence becomes what these blocks have of its first n positions. A refreekv_status. After an error, the sequence is empty, or
    // what it was where the blocks do not fit
    int32_t open(llama_seq_id seq_id, const std::vector<std::string> & paths, uint32_t n);

private:
    parts & p;

    // a block, and how many of its first cells are opened
    struct part {
        block    of;
        uint32_t n_cells;
        uint32_t n_groups; // that are whole
    };

    block_layer form_of(const layer & layer) const;
    bool        fits(const block & b, uint32_t first) const;

    std::vector<uint8_t> kept(llama_seq_id seq_id, const std::vector<part> & blocks, uint32_t n) const;

    int32_t open(llama_seq_id seq_id, const llama_kv_cache::slot_info & slots, const std::vector<part> & blocks, uint32_t n);

    int32_t write_layer(const layer & layer, const std::vector<uint32_t> & cells, const block & b, block_layer & l) const;
    int32_t open_layer (layer & layer, const std::vector<uint32_t> & cells, const std::vector<uint8_t> & hot, const std::vector<part> & blocks, size_t i_layer, rows::host_rows & in);
};

} // namespace refreekv
