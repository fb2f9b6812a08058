#pragma once

#include "llama-kv-cache.h"

#include <atomic>

namespace refreekv {

// A llama_kv_cache without a policy. It is upstream's, but for the number of its tokens, which any thread may read.
class full_cache final : public llama_kv_cache {
public:
    using llama_kv_cache::llama_kv_cache;

    // the one in a memory; nullptr: there is none
    static full_cache * of(llama_memory_t mem);

    // after the last batch or operation that has ended; any thread
    uint32_t n_tokens() const { return published; }

    // As long as it is there, its thread changes the cells. It publishes their number at the end of the outermost change: a state that is
    // read, for example, removes a sequence first. nullptr: changes nothing
    class change {
    public:
        explicit change(full_cache * kv);
        ~change();

        change(const change &) = delete;

    private:
        full_cache * const kv;
    };

    void clear   (bool data) override;
    bool seq_rm  (llama_seq_id seq_id,                              llama_pos p0, llama_pos p1) override;
    void seq_cp  (llama_seq_id seq_id_src, llama_seq_id seq_id_dst, llama_pos p0, llama_pos p1) override;
    void seq_keep(llama_seq_id seq_id) override;
    void seq_add (llama_seq_id seq_id, llama_pos p0, llama_pos p1, llama_pos shift) override;
    void seq_div (llama_seq_id seq_id, llama_pos p0, llama_pos p1, int d) override;

    void state_read(llama_io_read_i & io, llama_seq_id seq_id = -1, llama_state_seq_flags flags = 0) override;

private:
    uint32_t              n_changes = 0; // that have begun and not ended, one in the other; the owner's
    std::atomic<uint32_t> published { 0 };
};

} // namespace refreekv
