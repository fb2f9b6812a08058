#pragma once

#include "llama-kv-cells.h"
#include "llama-kv-cache.h"

#include <cstdint>
#include <vector>

namespace refreekv {

// a cell of one sequence
struct placed {
    llama_pos pos;
    uint32_t  cell;
};

// Upstream's tables of cells (position and sequences of each), read only. There is a table per stream (per sequence, unless
// kv_unified). All of them share the rows of a layer, so a cell is known here by one number: stream*stream_size() + index.
// Masks keep sequences apart, as in a unified cache.
class logical_cells {
public:
    // both belong to the llama_kv_cache
    logical_cells(const llama_kv_cells_vec & tables, const std::vector<uint32_t> & seq_to_stream) : tables(tables), seq_to_stream(seq_to_stream) {}

    uint32_t     stream_size() const { return tables[0].size(); }
    uint32_t     size()        const { return tables.size()*stream_size(); } // over all streams
    llama_seq_id n_seq_ids()   const { return seq_to_stream.size(); }

    uint32_t stream_of(llama_seq_id seq_id) const { return seq_to_stream[seq_id]; }
    uint32_t first_of (llama_seq_id seq_id) const { return stream_of(seq_id)*stream_size(); } // the first cell of its stream

    const llama_kv_cells & table_of    (uint32_t cell)       const { return tables[cell/stream_size()]; }
    uint32_t               index_of    (uint32_t cell)       const { return cell % stream_size(); }
    const llama_kv_cells & table_of_seq(llama_seq_id seq_id) const { return tables[stream_of(seq_id)]; }

    bool      is_empty(uint32_t cell)                 const { return table_of(cell).is_empty(index_of(cell)); }
    bool      seq_has (uint32_t cell, llama_seq_id s) const { return table_of(cell).seq_has (index_of(cell), s); }
    llama_pos pos_of  (uint32_t cell)                 const { return table_of(cell).pos_get (index_of(cell)); }
    bool      shared  (uint32_t cell)                 const { return table_of(cell).seq_count(index_of(cell)) > 1; }

    // whether a token of this sequence at this position may see it; for cells whose position no token of its batch has
    bool seen_by(uint32_t cell, llama_seq_id s, llama_pos pos) const { return seq_has(cell, s) && pos_of(cell) <= pos; }

    // of the same stream and the same sequences
    bool alike(uint32_t a, uint32_t b) const {
        return a/stream_size() == b/stream_size() && table_of(a).seq_get_all(index_of(a)) == table_of(b).seq_get_all(index_of(b));
    }

    uint32_t n_used() const {
        uint32_t res = 0;
        for (const auto & table : tables) {
            res += table.get_used();
        }
        return res;
    }

    // f(cell) for the cells of a batch, in the order of its tokens
    template <typename F>
    void for_batch(const llama_kv_cache::slot_info & sinfo, F && f) const {
        for (size_t s = 0; s < sinfo.n_stream(); ++s) {
            for (uint32_t i : sinfo.idxs[s]) {
                f(sinfo.strm[s]*stream_size() + i);
            }
        }
    }

    // in the order of positions, without positions p0 to p1 - 1
    std::vector<placed> of_seq(llama_seq_id seq_id, llama_pos p0 = -1, llama_pos p1 = -1) const {
        std::vector<placed> res;
        for (const auto & [pos, index] : table_of_seq(seq_id).seq_pos_get(seq_id)) {
            if (pos < p0 || pos >= p1) {
                res.push_back({ pos, first_of(seq_id) + index });
            }
        }
        return res;
    }

private:
    const llama_kv_cells_vec &    tables;
    const std::vector<uint32_t> & seq_to_stream;
};

} // namespace refreekv
