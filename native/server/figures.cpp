#include "server/figures.h"

#include "server/options.h"
#include "server/server.h"

#include <algorithm>
#include <mutex>

#if defined(__linux__)
#include <unistd.h>

#include <fstream>
#elif defined(__APPLE__)
#include <mach/mach.h>
#endif

namespace refreekv::server {

struct sequence {
    llama_pos            pos_max  = -1;
    llama_pos            pruned   = -1;
    llama_pos            noted_at = -1; // its last position when `kept` was written down; each token since is in all layers
    std::vector<int32_t> kept;          // [n_layers]
    double               prune_ms = 0.0;
};

struct figures {
    refreekv_stats                   stats = {};
    std::vector<refreekv_layer_info> layers; // empty: no policy
    std::vector<sequence>            seqs;   // [n_seq_max]
    double                           bytes_resident = 0.0; // of this process
    int64_t                          resident_us    = 0;   // when that was looked up
};

static std::mutex g_mutex;
static figures    g_figures;

// of memory, in this process now; 0: the platform does not say
static double resident_bytes() {
#if defined(__linux__)
    std::ifstream statm("/proc/self/statm");

    int64_t n_pages = 0;
    int64_t n_resident = 0;
    if (statm >> n_pages >> n_resident) {
        return (double) n_resident*sysconf(_SC_PAGESIZE);
    }
#elif defined(__APPLE__)
    mach_task_basic_info info;
    mach_msg_type_number_t n = MACH_TASK_BASIC_INFO_COUNT;
    if (task_info(mach_task_self(), MACH_TASK_BASIC_INFO, (task_info_t) &info, &n) == KERN_SUCCESS) {
        return (double) info.resident_size;
    }
#endif
    return 0.0;
}

void forget_figures(llama_context * ctx, llama_seq_id seq_id) {
    std::lock_guard<std::mutex> lock(g_mutex);

    if (seq_id < (llama_seq_id) g_figures.seqs.size()) {
        g_figures.seqs[seq_id]        = {};
        g_figures.seqs[seq_id].pruned = refreekv_pruned_pos(ctx, seq_id);
    }
}

void note_decoded(llama_context * ctx) {
    if (!has_policy(ctx)) {
        return;
    }
    std::lock_guard<std::mutex> lock(g_mutex);
    auto & f = g_figures;

    const int64_t prune_us = f.stats.prune_us;

    f.layers.resize(std::max(0, refreekv_get_stats(ctx, &f.stats, nullptr, 0)));
    refreekv_get_stats(ctx, &f.stats, f.layers.data(), f.layers.size());
    f.seqs.resize(llama_n_seq_max(ctx));
    const int64_t now_us = ggml_time_us();
    if (now_us - f.resident_us > 1000*1000) { // not with every token
        f.bytes_resident = resident_bytes();
        f.resident_us    = now_us;
    }

    std::vector<sequence *> pruned; // since the batch before
    for (llama_seq_id s = 0; s < (llama_seq_id) f.seqs.size(); ++s) {
        auto & seq = f.seqs[s];

        const llama_pos pos = refreekv_pruned_pos(ctx, s);
        if (pos >= 0 && pos != seq.pruned) {
            pruned.push_back(&seq);
        }
        const llama_pos pos_max = llama_memory_seq_pos_max(llama_get_memory(ctx), s);
        if (pos != seq.pruned || seq.kept.empty() || pos_max < seq.noted_at) {
            seq.kept.resize(f.layers.size());
            for (size_t i = 0; i < f.layers.size(); ++i) {
                seq.kept[i] = refreekv_get_kept(ctx, s, i, nullptr, 0);
            }
            seq.noted_at = pos_max;
        }
        seq.pruned  = pos;
        seq.pos_max = pos_max;
    }
    for (auto * seq : pruned) {
        seq->prune_ms += (f.stats.prune_us - prune_us)/1000.0/pruned.size();
    }
}

// of a layer, now
static int32_t n_kept(const sequence & seq, size_t i_layer) {
    return seq.kept[i_layer] + seq.pos_max - seq.noted_at;
}

static receipt make_receipt(const figures & f, llama_seq_id seq_id) {
    receipt res;

    if (f.layers.empty() || seq_id >= (llama_seq_id) f.seqs.size() || f.seqs[seq_id].kept.size() != f.layers.size()) {
        return res;
    }
    const auto & seq = f.seqs[seq_id];

    int64_t n_cells = 0;
    res.n_tokens = seq.pos_max + 1;
    res.prune_ms = seq.prune_ms;
    for (size_t i = 0; i < f.layers.size(); ++i) {
        n_cells        += n_kept(seq, i);
        res.bytes_kept += n_kept(seq, i)*f.layers[i].row_bytes;
        res.bytes_full += res.n_tokens*f.layers[i].row_bytes;
    }
    res.cells_kept = n_cells/f.layers.size();

    return res;
}

receipt get_receipt(llama_seq_id seq_id) {
    std::lock_guard<std::mutex> lock(g_mutex);

    return make_receipt(g_figures, seq_id);
}

static common_json to_json(const receipt & r) {
    return {
        { "n_tokens",   r.n_tokens   },
        { "cells_kept", r.cells_kept },
        { "bytes_kept", r.bytes_kept },
        { "bytes_full", r.bytes_full },
        { "prune_ms",   r.prune_ms   },
    };
}

void receipt::add_to(common_json & timings) const {
    if (n_tokens < 0) {
        return;
    }
    const auto fields = to_json(*this);
    for (const auto & [name, value] : fields.items()) {
        timings["kv_" + name] = value;
    }
}

void add_to_slot(common_json & json, llama_seq_id seq_id) {
    std::lock_guard<std::mutex> lock(g_mutex);

    const auto r = make_receipt(g_figures, seq_id);
    if (r.n_tokens < 0) {
        return;
    }
    auto kv     = to_json(r);
    auto layers = common_json::array();
    for (size_t i = 0; i < g_figures.layers.size(); ++i) {
        const int32_t n = n_kept(g_figures.seqs[seq_id], i);

        layers.push_back({
            { "layer",        g_figures.layers[i].il },
            { "cells_kept",   n },
            { "cells_evicted", std::max(0, r.n_tokens - n) }, // an image with M-RoPE has more cells than positions
        });
    }
    kv["layers"] = layers;
    json["kv"] = kv;
}

std::vector<metric> get_counters() {
    std::lock_guard<std::mutex> lock(g_mutex);

    const auto & s = g_figures.stats;
    if (g_figures.layers.empty()) {
        return {};
    }
    return {
        { "kv_prunes_total",          "Prunings of the KV cache",                             (double) s.n_prunes   },
        { "kv_prune_seconds_total",   "Time spent pruning the KV cache",                      s.prune_us/1e6        },
        { "kv_restores_total",        "Times that evicted rows were brought back",            (double) s.n_restores },
        { "kv_restore_seconds_total", "Time spent bringing them back",                        s.restore_us/1e6      },
        { "kv_rows_read_total",       "Evicted rows that decoding read from the cold store",  (double) s.n_rows_read },
        { "kv_rows_left_total",       "Those it wanted, whose codes had to do",               (double) s.n_rows_left },
        { "kv_turns_failed_total",    "Prunings that were due and failed",                    (double) s.n_turns_failed },
    };
}

std::vector<metric> get_gauges() {
    std::lock_guard<std::mutex> lock(g_mutex);

    const auto & s = g_figures.stats;
    if (g_figures.layers.empty()) {
        return {};
    }
    return {
        { "kv_tokens",      "Tokens in the KV cache, all slots",                        (double) s.n_tokens    },
        { "kv_bytes",       "K and V in memory, as allocated",                          (double) s.bytes       },
        { "kv_bytes_full",  "What the full KV cache of these tokens would take",        (double) s.bytes_full  },
        { "kv_bytes_codes", "Codes of evicted rows",                                    (double) s.bytes_codes },
        { "kv_bytes_cold",  "Evicted rows in the cold store",                           (double) s.bytes_cold  },
        { "kv_bytes_disk",  "Of these, in a file",                                      s.cold == REFREEKV_COLD_FILE ? (double) s.bytes_cold : 0.0 },
        { "process_resident_bytes", "Memory of this process, resident at most a second before the end of the last batch", g_figures.bytes_resident },
    };
}

} // namespace refreekv::server
