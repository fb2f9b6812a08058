#pragma once

#include "cache/parts.h"

namespace refreekv {

// How the rows of a cache grow with what is read, and shrink with what is gone.
class growth {
public:
    explicit growth(parts & p) : p(p) {}

    // Room for a batch: the only place where a decode allocates. false: no memory, or the limit; what was there is untouched
    bool reserve(const llama_kv_cache::slot_info_vec_t & sinfos);

private:
    using slot_info_vec_t = llama_kv_cache::slot_info_vec_t;

    parts & p;

    bool grow(const slot_info_vec_t & sinfos, uint32_t n_more);
    void give_back();
};

} // namespace refreekv
