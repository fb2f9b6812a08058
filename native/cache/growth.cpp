#include "cache/growth.h"

#include "api/error.h"
#include "api/process.h"

#include <algorithm>

namespace refreekv {

bool growth::reserve(const slot_info_vec_t & sinfos) {
    hook_ran(HOOK_RESERVE);

    publishing publish(p);

    p.release_stale();

    p.emptied = false;

    uint32_t n_batch = 0;
    for (const auto & sinfo : sinfos) {
        p.logical.for_batch(sinfo, [&](uint32_t) { n_batch++; });
    }

    // upstream may try several divisions of a batch: n_expected goes down when its tokens are applied
    if (grow(sinfos, p.params.memory_limit == 0 ? p.n_expected - std::min(p.n_expected, n_batch) : 0)) {
        return true;
    }

    p.n_expected = 0;
    give_back();

    if (grow(sinfos, 0)) {
        clear_error();
        return true;
    }

    give_back(); // what the other layers have got for this batch

    return false;
}

// the room that removed sequences left behind
void growth::give_back() {
    p.mover.synchronize();

    for (auto & layer : p.layers) {
        const auto slots = layer.used_slots();

        if (p.layouts.padded(slots.size()) < layer.rows.capacity() && p.mover.move(layer, slots, p.layouts.padded(slots.size()))) {
            layer.res.compact(slots);
            p.layouts.make_stale();
        }
    }
}

// n_more: tokens that come after this batch
bool growth::grow(const slot_info_vec_t & sinfos, uint32_t n_more) {
    struct plan {
        uint32_t n_need;  // room for the batch, and those
        uint32_t n_tight; // without the holes that removed sequences left
        bool     shrink;
    };
    std::vector<plan> plans;

    uint64_t bytes = 0;

    for (auto & layer : p.layers) {
        uint32_t n_new = 0;
        for (const auto & sinfo : sinfos) {
            p.logical.for_batch(sinfo, [&](uint32_t cell) { n_new += layer.res.slot(cell) < 0; });
        }
        n_new += std::min(n_more, p.logical.size() - std::min(p.logical.size(), layer.res.n_used() + n_new));

        plan its;
        its.n_need  = p.layouts.padded(layer.res.n_slots_after(n_new));
        its.n_tight = p.layouts.padded(layer.res.n_used() + n_new);
        its.shrink  = layer.rows.capacity() >= 2*its.n_tight || (p.idle_rows && layer.rows.capacity() > its.n_tight);

        plans.push_back(its);
        bytes += layer.rows.bytes_for(its.shrink ? its.n_tight : std::max(its.n_need, layer.rows.capacity()));
    }

    if (!p.within_limit(bytes)) {
        return false;
    }

    bool synced = false;

    for (size_t i = 0; i < p.layers.size(); ++i) {
        auto & layer = p.layers[i];

        const auto & its = plans[i];

        if (its.n_need <= layer.rows.capacity() && !its.shrink) {
            continue;
        }
        if (!synced) {
            p.mover.synchronize();
            synced = true;
        }

        const auto slots = its.shrink ? layer.used_slots() : layer.all_slots();

        if (!p.mover.move(layer, slots, its.shrink ? its.n_tight : its.n_need)) {
            if (its.n_need <= layer.rows.capacity()) {
                continue; // there is room, only not less
            }
            set_error("layer %d: no memory to change the KV cache from %u to %u cells of %zu bytes; %zu MiB are held over all layers",
                    layer.il, layer.rows.capacity(), its.shrink ? its.n_tight : its.n_need, layer.rows.row_bytes(), (size_t) p.bytes() >> 20);
            return false;
        }
        if (its.shrink) {
            layer.res.compact(slots);
        }
        p.layouts.make_stale();
    }

    p.idle_rows = false;

    return true;
}

} // namespace refreekv
