#include "server/server.h"

#include "common.h"
#include "log.h"

#include <algorithm>
#include <map>
#include <mutex>
#include <stdexcept>

#if defined(__linux__)
#include <unistd.h>

#include <fstream>
#elif defined(__APPLE__)
#include <mach/mach.h>
#endif

namespace refreekv::server {

// options

enum class evicted { KEEP, RESTORE, RECOMPUTE, DROP };

static refreekv_params g_params;
static std::string     g_cold_dir;
static evicted         g_evicted = evicted::DROP;

static std::vector<std::pair<llama_pos, llama_pos>> g_protect;

struct library {
    std::string folder; // "": there is none
    uint64_t    limit = 0;
    std::string evicts_with;
};
static library g_library;

template <typename T>
static bool set_field(const std::map<std::string, T refreekv_params::*> & fields, refreekv_params & params, const std::string & name, const common_json & value) {
    const auto it = fields.find(name);
    if (it == fields.end()) {
        return false;
    }
    params.*(it->second) = value.get<T>();

    return true;
}

#define FIELD(name) { #name, &refreekv_params::name }

static bool set_param(refreekv_params & params, const std::string & name, const common_json & value) {
    return
        set_field<int32_t>({
            FIELD(policy), FIELD(ranking), FIELD(rows), FIELD(measure), FIELD(pooling), FIELD(n_window), FIELD(window_step), FIELD(n_sink),
            FIELD(n_recent), FIELD(n_hot), FIELD(n_full_layers), FIELD(n_pool), FIELD(n_block), FIELD(n_min), FIELD(beta), FIELD(cold), FIELD(cold_type),
        }, params, name, value) ||
        set_field<float>   ({ FIELD(threshold), FIELD(mass_floor), FIELD(top_p), FIELD(theta), FIELD(max_error) }, params, name, value) ||
        set_field<double>  ({ FIELD(budget) }, params, name, value) ||
        set_field<uint64_t>({ FIELD(memory_limit), FIELD(cold_limit) }, params, name, value) ||
        set_field<bool>    ({ FIELD(sinks_in_measure), FIELD(cold_state) }, params, name, value);
}

#undef FIELD

static void read_options(const std::string & text) {
    const std::map<std::string, evicted> kinds = {
        { "keep", evicted::KEEP }, { "restore", evicted::RESTORE }, { "recompute", evicted::RECOMPUTE }, { "drop", evicted::DROP },
    };

    g_params  = refreekv_params_default();
    g_evicted = evicted::DROP;
    g_protect.clear();
    g_library = {};

    const auto options = common_json::parse(text);

    for (const auto & [name, value] : options.items()) {
        if (name == "evicted") {
            const auto it = kinds.find(value.get<std::string>());
            if (it == kinds.end()) {
                throw std::invalid_argument("evicted must be one of keep, restore, recompute, drop");
            }
            g_evicted = it->second;
        } else if (name == "cold_dir") {
            g_cold_dir        = value.get<std::string>();
            g_params.cold_dir = g_cold_dir.c_str();
        } else if (name == "protect" && value.is_array()) {
            for (size_t i = 0; i < value.size(); ++i) {
                g_protect.emplace_back(value.at(i).at(0).get<int32_t>(), value.at(i).at(1).get<int32_t>());
            }
        } else if (name == "library") {
            g_library = { value.at("folder").get<std::string>(), value.at("limit").get<uint64_t>(), value.at("evicts_with").get<std::string>() };
        } else if (!set_param(g_params, name, value)) {
            throw std::invalid_argument("there is no option " + name);
        }
    }
    // the cache prunes by itself; what comes back before a prompt is decided by begin_prompt()
    g_params.turns = g_params.policy == REFREEKV_POLICY_ELASTIC ? REFREEKV_TURNS_NONE : REFREEKV_TURNS_DROP;
}

bool set_policy(const std::string & text) {
    if (text.empty()) {
        return true;
    }
    try {
        read_options(text);
    } catch (const std::exception & err) {
        LOG_ERR("--kv-policy %s: %s\n", text.c_str(), err.what());
        return false;
    }
    return refreekv_next_context(&g_params) == REFREEKV_OK; // which logs what is wrong
}

// the library

// nullptr: a context can have one
static const char * library_refusal(llama_context * ctx, const common_params & params, bool has_draft) {
    const auto * model = llama_get_model(ctx);

    if (llama_model_is_recurrent(model) || llama_model_is_hybrid(model) || llama_model_n_swa(model) > 0) {
        return "the server keeps no states of recurrent layers and of layers with a window";
    }
    if (g_evicted == evicted::RECOMPUTE) {
        return "evicted is recompute: each prompt is read";
    }
    if (has_draft) {
        return "a draft model reads its prompts itself";
    }
    if (!params.lora_adapters.empty() || !params.control_vectors.empty() || !params.kv_overrides.empty()) {
        return "adapters, control vectors and other metadata change what is read";
    }
    return refreekv_library_refusal(ctx);
}

// of a model that may be divided into several
static std::vector<std::string> files_of(const llama_model * model, const std::string & path) {
    char text[4096] = "";
    llama_model_meta_val_str(model, "split.count", text, sizeof(text));

    const int32_t n = atoi(text);
    if (n < 2 || llama_split_prefix(text, sizeof(text), path.c_str(), 0, n) <= 0) {
        return { path };
    }
    const std::string prefix = text;

    std::vector<std::string> res;
    for (int32_t i = 0; i < n; ++i) {
        llama_split_path(text, sizeof(text), prefix.c_str(), i, n);
        res.push_back(text);
    }
    return res;
}

bool use_library(llama_context * ctx, const common_params & params, bool has_draft) {
    if (g_library.folder.empty()) {
        return false;
    }
    const char * why = library_refusal(ctx, params, has_draft);
    if (!why) {
        const auto files = files_of(llama_get_model(ctx), params.model.path);

        std::vector<const char *> paths;
        for (const auto & file : files) {
            paths.push_back(file.c_str());
        }
        if (refreekv_library_use(ctx, g_library.folder.c_str(), g_library.limit, paths.data(), paths.size(), "", g_library.evicts_with.c_str()) != REFREEKV_OK) {
            why = refreekv_last_error();
        }
    }
    if (why) {
        LOG_INF("what is read is not kept in the library: %s\n", why);
        g_library = {};
        return false;
    }
    LOG_INF("what is read is kept in %s (--no-library: it is not), and not in memory (--cache-ram)\n", g_library.folder.c_str());
    return true;
}

// without images
static bool is_text(const std::vector<llama_token> & tokens) {
    return std::find(tokens.begin(), tokens.end(), LLAMA_TOKEN_NULL) == tokens.end();
}

// as begin_prompt(). n_past where the library has no more
static int32_t open_from_library(llama_context * ctx, llama_seq_id seq_id, int32_t n_past, const std::vector<llama_token> & prompt) {
    if (g_library.folder.empty() || prompt.empty() || !is_text(prompt)) {
        return n_past;
    }
    const int32_t n = refreekv_library_find(ctx, seq_id, prompt.data(), prompt.size() - 1, n_past, false);
    if (n <= 0) {
        return n_past;
    }
    llama_memory_seq_rm(llama_get_memory(ctx), seq_id, -1, -1);
    for (const auto & [start, end] : g_protect) {
        refreekv_protect(ctx, seq_id, start, end);
    }
    if (refreekv_library_open(ctx, seq_id) != REFREEKV_OK) {
        LOG_INF("slot %d: %s; the prompt is read from its start\n", seq_id, refreekv_last_error());
        return 0;
    }
    return n;
}

// turns

// asked once for each context, since the answer "no" is an error that is logged
static bool has_policy(llama_context * ctx) {
    static llama_context * asked = nullptr;
    static bool            res   = false;

    if (ctx != asked) {
        asked = ctx;
        res   = refreekv_pruned_pos(ctx, 0) >= -1;
    }
    return res;
}

bool evicts(llama_context * ctx) {
    return has_policy(ctx) && g_params.policy != REFREEKV_POLICY_ELASTIC;
}

// whether a prompt needs back what was evicted: not where the cache goes on attending to it by codes
static bool restores(llama_context * ctx) {
    refreekv_stats stats = {};
    refreekv_get_stats(ctx, &stats, nullptr, 0);

    return g_evicted == evicted::RESTORE || (g_evicted == evicted::KEEP && stats.bytes_codes == 0);
}

static void forget_figures(llama_context * ctx, llama_seq_id seq_id);

int32_t begin_prompt(llama_context * ctx, llama_seq_id seq_id, int32_t n_past, llama_pos p_past, const std::vector<llama_token> & prompt, bool in_parts, bool may_open) {
    if (!has_policy(ctx)) {
        return n_past;
    }
    const int32_t n_prompt = prompt.size();

    const int32_t n_opened = may_open ? open_from_library(ctx, seq_id, n_past, prompt) : n_past;
    if (n_opened != n_past) {
        n_past = p_past = n_opened;
    }
    auto *     mem    = llama_get_memory(ctx);
    const bool pruned = refreekv_pruned_pos(ctx, seq_id) >= 0;

    if (pruned && g_evicted == evicted::RECOMPUTE) {
        n_past = p_past = 0;
    }
    if (!pruned || g_evicted != evicted::DROP) {
        const int32_t n_usable = refreekv_usable_prefix(ctx, seq_id, n_past, n_prompt);
        if (n_usable >= 0 && n_usable < n_past) {
            // a memory that has lost the beginning, such as layers with a window, cannot go back
            n_past = p_past = in_parts && llama_memory_seq_pos_min(mem, seq_id) == 0 ? n_usable : 0;
        }
    }
    if (!llama_memory_seq_rm(mem, seq_id, p_past, -1) || (pruned && n_past > 0 && restores(ctx) && refreekv_restore(ctx, seq_id) < 0)) {
        LOG_INF("slot %d: what was evicted cannot be had back, the prompt is read from its start\n", seq_id);
        llama_memory_seq_rm(mem, seq_id, -1, -1);
        n_past = 0;
    }

    for (const auto & [start, end] : g_protect) {
        refreekv_protect(ctx, seq_id, start, end);
    }
    refreekv_prompt(ctx, seq_id, n_prompt - n_past);
    forget_figures(ctx, seq_id);

    return n_past;
}

void end_turn(llama_context * ctx, llama_seq_id seq_id, const std::vector<llama_token> & tokens) {
    if (!has_policy(ctx)) {
        return;
    }
    if (refreekv_is_due(ctx, seq_id) > 0 && g_params.policy != REFREEKV_POLICY_ELASTIC) {
        refreekv_prune(ctx, seq_id);
    }
    refreekv_prompt(ctx, seq_id, -1); // one that was given up
    if (!g_library.folder.empty() && is_text(tokens)) {
        refreekv_library_keep(ctx, seq_id, tokens.data(), tokens.size(), nullptr, nullptr, nullptr, 0, false); // which logs what is wrong
    }
    note_decoded(ctx);
}

bool make_room(llama_context * ctx) {
    if (!has_policy(ctx) || g_params.memory_limit == 0 || g_params.policy == REFREEKV_POLICY_ELASTIC) {
        return false;
    }
    bool res = false;
    for (llama_seq_id s = 0; s < (llama_seq_id) llama_n_seq_max(ctx); ++s) {
        if (llama_memory_seq_pos_max(llama_get_memory(ctx), s) > refreekv_pruned_pos(ctx, s)) {
            res |= refreekv_prune(ctx, s) > 0;
        }
    }
    return res;
}

// figures

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
};

static std::mutex g_mutex;
static figures    g_figures;

static void forget_figures(llama_context * ctx, llama_seq_id seq_id) {
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

void receipt::add_to(common_json & json) const {
    if (n_tokens >= 0) {
        json["kv"] = to_json(*this);
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
        { "kv_turns_failed_total",    "Prunings that were due and failed",                    (double) s.n_turns_failed },
    };
}

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
        { "process_resident_bytes", "Memory of this process, resident now",             resident_bytes()       },
    };
}

} // namespace refreekv::server
