#pragma once

#include "cache/parts.h"
#include "evict/evict.h"
#include "tiers/restore.h"

#include <functional>
#include <set>
#include <vector>

namespace refreekv {

// What is done between graphs, in upstream's memory update: prunings and restores that the C API asks for, and those that a turn asks for
// before a batch.
class updates {
public:
    updates(parts & p, eviction & evict, restoration & restore) : p(p), evict(evict), restore(restore) {}

    // Called before every batch. True if graphs need another reservation, or run() has something to do
    bool begin(llama_context * lctx);
    bool run  (llama_context * lctx);

    // true: a turn has something to do before this batch. run() does it, and the batch comes again
    bool plan_turn(const std::vector<llama_ubatch> & ubatches);

    // a batch that failed: what was to be done before it is not done with another one
    void forget_jobs() { jobs.clear(); }

    // see refreekv.h; they run in an update of their own
    int64_t prune  (llama_context * lctx, llama_seq_id seq_id);
    int64_t keep   (llama_context * lctx, llama_seq_id seq_id, int32_t il, const std::vector<llama_pos> & pos);
    int64_t restore_seq(llama_context * lctx, llama_seq_id seq_id);

    // any other work on the rows, in an update of its own; it returns a refreekv_status or a count
    int64_t run_job(llama_context * lctx, std::function<int64_t()> && job);

    // sequences that a batch of several tokens added to; prune_read() prunes them (REFREEKV_NATIVE_PRUNE=tests)
    void note_read(const llama_ubatch & ubatch) { read.insert(ubatch.seq_id_unq, ubatch.seq_id_unq + ubatch.n_seqs_unq); }
    void prune_read(llama_context * lctx);

private:
    parts &       p;
    eviction &    evict;
    restoration & restore;

    std::vector<std::function<int64_t()>> jobs; // what the next run() does
    int64_t                job_result = 0;
    std::set<llama_seq_id> read;

    int64_t run_step(const turn::todo & todo); // a failure is counted, and the sequence goes on from what is there
};

} // namespace refreekv
