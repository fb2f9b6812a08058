#pragma once

#include "tiers/file.h"

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace refreekv {

// A file of the library: what the cache has of some neighbouring positions of a text, in all layers.
//
//   block_header
//   label          which text it is of (text_block::label)
//   block_layer    of each layer
//   checksum       of all that
//   codes          of each layer in turn: of each group of 64 cells the K and V codes of each KV head (kernels/codes.h)
//   records        of each layer in turn: of each cell, as the cold store has them (tiers/record.h)
//
// Cells are in the order of their positions. The first n_before have no codes, nor have those behind the last whole group.
// Integers are those of the machine, which is little-endian. Checksums are XXH3, of 64 bits.

struct block_header {
    uint32_t magic;
    uint32_t version;
    uint32_t n_label; // bytes
    uint32_t n_layers;
    uint32_t first;   // position
    uint32_t n_cells;
    uint32_t n_before;
    uint32_t n_groups;
    uint32_t bits_k;
    uint32_t bits_v;
    uint64_t n_bytes; // of the file
};

struct block_layer {
    int32_t  il;
    int32_t  type_k; // of the records
    int32_t  type_v;
    uint32_t n_heads;
    uint64_t row_k;  // bytes
    uint64_t row_v;
    uint64_t head_k;
    uint64_t head_v;
    uint64_t codes_k; // bytes of the codes of one KV head in a group
    uint64_t codes_v;
    uint64_t codes_at;
    uint64_t records_at;
    uint64_t codes_sum; // checksums
    uint64_t records_sum;

    uint64_t record_bytes() const { return row_k + row_v; }
    uint64_t group_bytes()  const { return n_heads*(codes_k + codes_v); }

    // whether a layer has the same form, wherever it lies in the file
    bool alike(const block_layer & other) const;
};

struct block {
    block_header             header = {};
    std::string              label;
    std::vector<block_layer> layers;

    std::shared_ptr<refreekv::file> in;

    // sets where the sections lie, and the length of the file
    void lay_out();

    // Writes all but the sections, whose checksums are known. false: no room
    bool write_head();

    uint64_t codes_bytes  (const block_layer & l) const { return header.n_groups*l.group_bytes(); }
    uint64_t records_bytes(const block_layer & l) const { return header.n_cells*l.record_bytes(); }
};

uint64_t checksum(const void * data, size_t size);

// A block whose file is open to be read. What lies before its sections is what was written, and the file has its length. Throws
// std::runtime_error: it is damaged, is no such file, or cannot be opened
block open_block(const std::string & path);

// Throws std::runtime_error where one of its sections is not what was written
void check_sections(const block & b, const std::string & path);

} // namespace refreekv
