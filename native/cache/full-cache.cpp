#include "cache/full-cache.h"

#include "cache/cache.h"

namespace refreekv {

full_cache * full_cache::of(llama_memory_t mem) {
    return dynamic_cast<full_cache *>(cache::part_of(mem));
}

full_cache::change::change(full_cache * kv) : kv(kv) {
    if (kv) {
        kv->n_changes++;
    }
}

full_cache::change::~change() {
    if (!kv || --kv->n_changes > 0) {
        return;
    }
    uint32_t n = 0;
    for (uint32_t s = 0; s < kv->get_n_stream(); ++s) {
        n += kv->get_cells(s).get_used(); // a stream is that of the sequence with its number
    }
    kv->published = n;
}

void full_cache::clear(bool data) {
    const change now(this);
    llama_kv_cache::clear(data);
}

bool full_cache::seq_rm(llama_seq_id seq_id, llama_pos p0, llama_pos p1) {
    const change now(this);
    return llama_kv_cache::seq_rm(seq_id, p0, p1);
}

void full_cache::seq_cp(llama_seq_id seq_id_src, llama_seq_id seq_id_dst, llama_pos p0, llama_pos p1) {
    const change now(this);
    llama_kv_cache::seq_cp(seq_id_src, seq_id_dst, p0, p1);
}

void full_cache::seq_keep(llama_seq_id seq_id) {
    const change now(this);
    llama_kv_cache::seq_keep(seq_id);
}

void full_cache::seq_add(llama_seq_id seq_id, llama_pos p0, llama_pos p1, llama_pos shift) {
    const change now(this);
    llama_kv_cache::seq_add(seq_id, p0, p1, shift);
}

void full_cache::seq_div(llama_seq_id seq_id, llama_pos p0, llama_pos p1, int d) {
    const change now(this);
    llama_kv_cache::seq_div(seq_id, p0, p1, d);
}

void full_cache::state_read(llama_io_read_i & io, llama_seq_id seq_id, llama_state_seq_flags flags) {
    const change now(this);
    llama_kv_cache::state_read(io, seq_id, flags);
}

} // namespace refreekv
