#pragma once

#include "cache/parts.h"
#include "library/block.h"

#include <string>
#include <vector>

namespace refreekv {

// What a cache has of a text, in files (library/block.h), and back. A sequence that is opened is what it would be if the text had been read and
// pruned: rows of cells that stay are in the cache, and the cold store reads those of the others where they are, in the files.
class library {
public:
    explicit library(parts & p) : p(p) {}

    // nullptr: this cache can be written and opened, else why it cannot
    const char * refusal() const;

    // n positions of a sequence from `first` on, of which the first n_before get no codes. A refreekv_status; where it is no success, there
    // is no file
    int32_t write(llama_seq_id seq_id, llama_pos first, uint32_t n, uint32_t n_before, const std::string & label, const std::string & path);

    // The sequence becomes what these blocks have, from position 0 on. A refreekv_status or the number of positions. After an error, the
    // sequence is empty, or what it was where the blocks do not fit
    int64_t open(llama_seq_id seq_id, const std::vector<std::string> & paths);

private:
    parts & p;

    block_layer form_of(const layer & layer) const;

    int32_t write_layer(const layer & layer, const std::vector<uint32_t> & cells, const block & b, block_layer & l) const;
    int32_t open_layer (layer & layer, const std::vector<uint32_t> & cells, const std::vector<uint8_t> & hot, const std::vector<block> & blocks, size_t i_layer, rows::host_rows & in);
};

} // namespace refreekv
