// How the rows of a refreekv_store grow with what is read, and shrink with what is gone.

#include "cache/store.h"

#include "api/error.h"

#include "llama-context.h"

#include <algorithm>
#include <cinttypes>
#include <numeric>

static const uint32_t REFREEKV_MAX_THREADS = 4;

ggml_backend_t refreekv_store::backend_of(const group & g) const {
    if (!lctx) {
        return nullptr;
    }

    auto * sched = lctx->get_sched();
    auto * buft  = g.rows.get_shape().buft;
    auto * dev   = ggml_backend_buft_get_device(buft); // nullptr for plain host memory

    for (int i = 0; i < ggml_backend_sched_get_n_backends(sched); ++i) {
        auto * backend = ggml_backend_sched_get_backend(sched, i);
        auto * owner   = ggml_backend_get_device(backend);

        if (owner == dev || (!dev && ggml_backend_dev_buffer_type(owner) == buft)) {
            return backend;
        }
    }

    return nullptr;
}

ggml_backend_t refreekv_store::host_backend() const {
    auto * sched = lctx->get_sched();

    return ggml_backend_sched_get_backend(sched, ggml_backend_sched_get_n_backends(sched) - 1); // ggml has it there
}

// whether the host may read and write rows where they are
bool refreekv_store::in_place(const group & g) const {
    return ggml_backend_buft_is_host(g.rows.get_shape().buft) && !params.by_graph;
}

// that may work on groups beside each other: much of the time goes into memory that was never touched, and into the system
uint32_t refreekv_store::n_threads() const {
    const bool on_host = std::all_of(groups.begin(), groups.end(), [&](const group & g) { return in_place(g); });

    return on_host && lctx ? std::clamp(lctx->n_threads_batch(), 1u, REFREEKV_MAX_THREADS) : 1;
}

bool refreekv_store::move(group & g, const std::vector<uint32_t> & slots, uint32_t capacity, const refreekv_rows::host_rows & in) {
    n_generation++;

    return g.rows.move(slots, capacity, backend_of(g), params.by_graph, in);
}

bool refreekv_store::reserve(const slot_info_vec_t & sinfos) {
    hook_ran(HOOK_RESERVE);

    refreekv_publishing publish(this);

    release_stale();

    restoring = false;

    uint32_t n_batch = 0;
    for (const auto & sinfo : sinfos) {
        for_cells(sinfo, [&](uint32_t) { n_batch++; });
    }

    // upstream may try several divisions of a batch: n_expected goes down when its tokens are applied
    if (grow(sinfos, params.memory_limit == 0 ? n_expected - std::min(n_expected, n_batch) : 0)) {
        return true;
    }

    n_expected = 0;
    give_back();

    if (grow(sinfos, 0)) {
        refreekv_clear_error();
        return true;
    }

    give_back(); // what the other groups have got for this batch

    return false;
}

bool refreekv_store::within_limit(uint64_t bytes) const {
    if (params.memory_limit == 0 || bytes <= params.memory_limit) {
        return true;
    }
    refreekv_set_error("the KV cache would grow to %" PRIu64 " bytes; the limit is %" PRIu64, bytes, params.memory_limit);

    return false;
}

// the room that removed sequences left behind
void refreekv_store::give_back() {
    synchronize();

    for (auto & g : groups) {
        const auto slots = used_slots(g);

        if (padded(slots.size()) < g.rows.capacity() && move(g, slots, padded(slots.size()))) {
            g.res.compact(slots);
            stale_layouts = true;
        }
    }
}

// n_more: tokens that come after this batch
bool refreekv_store::grow(const slot_info_vec_t & sinfos, uint32_t n_more) {
    struct plan {
        uint32_t n_need;  // room for the batch, and those
        uint32_t n_tight; // without the holes that removed sequences left
        bool     shrink;
    };
    std::vector<plan> plans;

    uint64_t bytes = 0;

    for (auto & g : groups) {
        uint32_t n_new = 0;
        for (const auto & sinfo : sinfos) {
            for_cells(sinfo, [&](uint32_t cell) { n_new += g.res.slot(cell) < 0; });
        }
        n_new += std::min(n_more, n_cells - std::min(n_cells, g.res.n_used() + n_new));

        plan p;
        p.n_need  = padded(g.res.n_slots_after(n_new));
        p.n_tight = padded(g.res.n_used() + n_new);
        p.shrink  = g.rows.capacity() >= 2*p.n_tight || (idle_rows && g.rows.capacity() > p.n_tight);

        plans.push_back(p);
        bytes += g.rows.bytes_for(p.shrink ? p.n_tight : std::max(p.n_need, g.rows.capacity()));
    }

    if (!within_limit(bytes)) {
        return false;
    }

    bool synced = false;

    for (size_t i = 0; i < groups.size(); ++i) {
        auto & g = groups[i];

        const auto & p = plans[i];

        if (p.n_need <= g.rows.capacity() && !p.shrink) {
            continue;
        }
        if (!synced) {
            synchronize();
            synced = true;
        }

        const auto slots = p.shrink ? used_slots(g) : all_slots(g);

        if (!move(g, slots, p.shrink ? p.n_tight : p.n_need)) {
            if (p.n_need <= g.rows.capacity()) {
                continue; // there is room, only not less
            }
            refreekv_set_error("layer %d: no memory to change the KV cache from %u to %u cells of %zu bytes; %zu MiB are held over all layers",
                    g.il, g.rows.capacity(), p.shrink ? p.n_tight : p.n_need, g.rows.row_bytes(), (size_t) stats().bytes >> 20);
            return false;
        }
        if (p.shrink) {
            g.res.compact(slots);
        }
        stale_layouts = true;
    }

    idle_rows = false;

    return true;
}

std::vector<uint32_t> refreekv_store::all_slots(const group & g) const {
    std::vector<uint32_t> res(g.res.n_slots());
    std::iota(res.begin(), res.end(), 0);
    return res;
}

std::vector<uint32_t> refreekv_store::used_slots(const group & g) const {
    std::vector<uint32_t> res;
    for (uint32_t s = 0; s < g.res.n_slots(); ++s) {
        if (g.res.cell(s) >= 0) {
            res.push_back(s);
        }
    }
    return res;
}

// room for n cells more
bool refreekv_store::make_room(group & g, uint32_t n) {
    const uint32_t n_need = padded(g.res.n_slots_after(n));

    if (n_need <= g.rows.capacity()) {
        return true;
    }
    if (!within_limit(stats().bytes + g.rows.bytes_for(n_need) - g.rows.bytes())) {
        return false;
    }
    if (!move(g, all_slots(g), n_need)) {
        refreekv_set_error("no memory for %u cells in layer %d", n_need, g.il);
        return false;
    }
    return true;
}
