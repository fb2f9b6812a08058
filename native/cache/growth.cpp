// How the rows of a refreekv::store grow with what is read, and shrink with what is gone.

#include "cache/store.h"

#include "api/error.h"
#include "api/process.h"

#include "llama-context.h"

#include <algorithm>
#include <cinttypes>
#include <numeric>

namespace refreekv {

bool store::reserve(const slot_info_vec_t & sinfos) {
    hook_ran(HOOK_RESERVE);

    publishing publish(this);

    release_stale();

    restoring = false;

    uint32_t n_batch = 0;
    for (const auto & sinfo : sinfos) {
        logical.for_batch(sinfo, [&](uint32_t) { n_batch++; });
    }

    // upstream may try several divisions of a batch: n_expected goes down when its tokens are applied
    if (grow(sinfos, params.memory_limit == 0 ? n_expected - std::min(n_expected, n_batch) : 0)) {
        return true;
    }

    n_expected = 0;
    give_back();

    if (grow(sinfos, 0)) {
        clear_error();
        return true;
    }

    give_back(); // what the other layers have got for this batch

    return false;
}

// bytes: of rows
bool store::within_limit(uint64_t bytes) const {
    for (const auto & layer : layers) {
        bytes += layer.warm ? layer.warm->bytes() : 0;
    }
    if (params.memory_limit == 0 || bytes <= params.memory_limit) {
        return true;
    }
    set_error("the KV cache would grow to %" PRIu64 " bytes; the limit is %" PRIu64, bytes, params.memory_limit);

    return false;
}

// the room that removed sequences left behind
void store::give_back() {
    mover.synchronize();

    for (auto & layer : layers) {
        const auto slots = layer.used_slots();

        if (layouts.padded(slots.size()) < layer.rows.capacity() && mover.move(layer, slots, layouts.padded(slots.size()))) {
            layer.res.compact(slots);
            layouts.make_stale();
        }
    }
}

// n_more: tokens that come after this batch
bool store::grow(const slot_info_vec_t & sinfos, uint32_t n_more) {
    struct plan {
        uint32_t n_need;  // room for the batch, and those
        uint32_t n_tight; // without the holes that removed sequences left
        bool     shrink;
    };
    std::vector<plan> plans;

    uint64_t bytes = 0;

    for (auto & layer : layers) {
        uint32_t n_new = 0;
        for (const auto & sinfo : sinfos) {
            logical.for_batch(sinfo, [&](uint32_t cell) { n_new += layer.res.slot(cell) < 0; });
        }
        n_new += std::min(n_more, logical.size() - std::min(logical.size(), layer.res.n_used() + n_new));

        plan p;
        p.n_need  = layouts.padded(layer.res.n_slots_after(n_new));
        p.n_tight = layouts.padded(layer.res.n_used() + n_new);
        p.shrink  = layer.rows.capacity() >= 2*p.n_tight || (idle_rows && layer.rows.capacity() > p.n_tight);

        plans.push_back(p);
        bytes += layer.rows.bytes_for(p.shrink ? p.n_tight : std::max(p.n_need, layer.rows.capacity()));
    }

    if (!within_limit(bytes)) {
        return false;
    }

    bool synced = false;

    for (size_t i = 0; i < layers.size(); ++i) {
        auto & layer = layers[i];

        const auto & p = plans[i];

        if (p.n_need <= layer.rows.capacity() && !p.shrink) {
            continue;
        }
        if (!synced) {
            mover.synchronize();
            synced = true;
        }

        const auto slots = p.shrink ? layer.used_slots() : layer.all_slots();

        if (!mover.move(layer, slots, p.shrink ? p.n_tight : p.n_need)) {
            if (p.n_need <= layer.rows.capacity()) {
                continue; // there is room, only not less
            }
            set_error("layer %d: no memory to change the KV cache from %u to %u cells of %zu bytes; %zu MiB are held over all layers",
                    layer.il, layer.rows.capacity(), p.shrink ? p.n_tight : p.n_need, layer.rows.row_bytes(), (size_t) stats().bytes >> 20);
            return false;
        }
        if (p.shrink) {
            layer.res.compact(slots);
        }
        layouts.make_stale();
    }

    idle_rows = false;

    return true;
}

// room for n cells more
bool store::make_room(layer & layer, uint32_t n) {
    const uint32_t n_need = layouts.padded(layer.res.n_slots_after(n));

    if (n_need <= layer.rows.capacity()) {
        return true;
    }
    if (!within_limit(stats().bytes + layer.rows.bytes_for(n_need) - layer.rows.bytes())) {
        return false;
    }
    if (!mover.move(layer, layer.all_slots(), n_need)) {
        set_error("no memory for %u cells in layer %d", n_need, layer.il);
        return false;
    }
    return true;
}

} // namespace refreekv
