#pragma once

#include "cache/logical-cells.h"
#include "cache/row-mover.h"
#include "evict/attention-graph.h"
#include "evict/query-ring.h"
#include "graph/layouts.h"
#include "kernels/attention-cpu.h"
#include "tiers/transfer.h"
#include "tiers/warm-tier.h"

#include <atomic>
#include <memory>
#include <utility>
#include <vector>

struct llama_hparams;

namespace refreekv {

// a cell of one sequence that a layer holds
struct held {
    llama_pos pos;
    uint32_t  cell;
    uint32_t  slot;
    bool      stays; // another sequence needs it too, or it is protected
};

// positions that are kept whatever the policy, ends excluded
using span_list = std::vector<std::pair<llama_pos, llama_pos>>;

// The eviction of a sequence from one layer: what the policy may see of it, and what becomes of its answer. Works on several
// layers at once.
class evictor {
public:
    // spans: [n_seq_ids]
    evictor(const refreekv_params & params, const llama_hparams & hparams, const logical_cells & logical, const std::vector<layer> & layers,
            const std::vector<span_list> & spans, const query_ring & ring, const layouts & lay, row_mover & mover, cold_transfer & transfer, const warm_tier & warm) :
        params(params), hparams(hparams), logical(logical), layers(layers), spans(spans), ring(ring), lay(lay), mover(mover), transfer(transfer), warm(warm) {}

    // memory of one thread, for one layer after the other
    struct scratch {
        attention_scratch attention;
        cold_transfer::lane        lane;
    };

    // All cells of a sequence, without slots. Collected once for all layers, because walking upstream's tree of them is slow
    std::vector<held> cells_of(llama_seq_id seq_id) const;

    // of those, the ones that a layer holds and queries can see
    std::vector<held> held_by(const layer & layer, std::vector<held> all) const;

    // pos: what to keep; nullptr: the policy decides. n_evicted goes up by the cells that are evicted. A
    // refreekv_status
    int32_t evict(layer & layer, llama_seq_id seq_id, const std::vector<held> & all, const std::vector<llama_pos> * pos, scratch & memory, std::atomic<int64_t> & n_evicted);

    // the attention that a policy with these parameters looks at; a refreekv_status
    int32_t look(const layer & layer, llama_seq_id seq_id, const std::vector<held> & list, const refreekv_params & by, attention_scratch & memory, std::unique_ptr<refreekv::attention> & attn) const;

    // what was looked at counts in the figures
    void count(const refreekv::attention & attn);

    uint64_t bytes_read()    const { return n_bytes_read; }    // answers of the eviction graph
    uint64_t bytes_bounced() const { return n_bytes_bounced; } // K and queries that it could not look at where they are

private:
    const refreekv_params &        params;
    const llama_hparams &          hparams;
    const logical_cells &          logical;
    const std::vector<layer> &     layers;
    const std::vector<span_list> & spans;
    const query_ring &          ring;
    const layouts &                lay;
    row_mover &                    mover;
    cold_transfer &                transfer;
    const warm_tier &              warm;

    std::atomic<uint64_t> n_bytes_read    { 0 };
    std::atomic<uint64_t> n_bytes_bounced { 0 };

    int32_t select(const layer & layer, llama_seq_id seq_id, const std::vector<held> & list, attention_scratch & memory, std::vector<uint8_t> & keep);

    void code(layer & layer, const std::vector<uint32_t> & cells, const rows::host_rows * all);

    // false: no memory to move what stays
    bool take_out(layer & layer, const std::vector<held> & list, const std::vector<uint8_t> & keep, scratch & memory);
};

} // namespace refreekv
