#pragma once

#include "cache/create.h"

#include "llama-kv-cache-iswa.h"
#include "llama-memory-hybrid.h"
#include "llama-memory-recurrent.h"

namespace refreekv {

// A memory that has a cache with a policy and another part beside it: what is refused in the one must not happen in the other.
template <typename Memory>
class composite final : public Memory {
public:
    using Memory::Memory;

    bool seq_rm(llama_seq_id seq_id, llama_pos p0, llama_pos p1) override {
        return may_seq_rm(this, seq_id, p0, p1) && Memory::seq_rm(seq_id, p0, p1);
    }

    void seq_cp(llama_seq_id seq_id_src, llama_seq_id seq_id_dst, llama_pos p0, llama_pos p1) override {
        part(*this).seq_cp(seq_id_src, seq_id_dst, p0, p1);

        if (refused_seq_cp(this)) {
            // the target may have been emptied for the copy
            other(*this).seq_rm(seq_id_dst, part(*this).seq_pos_max(seq_id_dst) + 1, -1);
        } else {
            other(*this).seq_cp(seq_id_src, seq_id_dst, p0, p1);
        }
    }

    void seq_add(llama_seq_id seq_id, llama_pos p0, llama_pos p1, llama_pos shift) override {
        part(*this).seq_add(seq_id, p0, p1, shift);

        if (!refused_shift(this)) {
            other(*this).seq_add(seq_id, p0, p1, shift);
        }
    }
    void seq_div(llama_seq_id seq_id, llama_pos p0, llama_pos p1, int d) override {
        part(*this).seq_div(seq_id, p0, p1, d);

        if (!refused_shift(this)) {
            other(*this).seq_div(seq_id, p0, p1, d);
        }
    }

    void state_read(llama_io_read_i & io, llama_seq_id seq_id = -1, llama_state_seq_flags flags = 0) override {
        try {
            Memory::state_read(io, seq_id, flags);
        } catch (...) {
            // the cache may have been restored already
            if ((flags & LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY) == 0) {
                part(*this).state_clear(seq_id);
            }
            throw;
        }
    }

private:
    static llama_kv_cache & part (llama_kv_cache_iswa & mem) { return *mem.get_base(); }
    static llama_kv_cache & part (llama_memory_hybrid & mem) { return *mem.get_mem_attn(); }
    static llama_memory_i & other(llama_kv_cache_iswa & mem) { return *mem.get_swa(); }
    static llama_memory_i & other(llama_memory_hybrid & mem) { return *mem.get_mem_recr(); }
};

// of the cache with a policy in a memory
bool may_seq_rm    (llama_memory_t mem, llama_seq_id seq_id, llama_pos p0, llama_pos p1);
bool refused_seq_cp(llama_memory_t mem); // the last one
bool refused_shift (llama_memory_t mem);

// hook of llama_model::create_memory: a memory that can have a policy, and has it if one was asked for
template <typename Memory, typename... Args>
llama_memory_i * new_memory(Args &&... args) {
    if constexpr (std::is_same_v<Memory, llama_kv_cache>) {
        if (!next_params()) {
            return new full_cache(std::forward<Args>(args)...);
        }
        return new cache(std::forward<Args>(args)...);
    } else {
        if (!next_params()) {
            return new Memory(std::forward<Args>(args)...);
        }
        const open_place open;

        return new composite<Memory>(std::forward<Args>(args)...);
    }
}

} // namespace refreekv
