#include "server/options.h"

#include "server/server.h"

#include "common.h"
#include "log.h"

#include <cstdlib>
#include <map>
#include <stdexcept>

namespace refreekv::server {

static options g_options;
static bool    g_is_set = false; // a context has them

const options & get_options() {
    return g_options;
}

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

    auto & o = g_options;

    o = {};
    o.params = refreekv_params_default();

    const auto given = common_json::parse(text);

    for (const auto & [name, value] : given.items()) {
        if (name == "evicted") {
            const auto it = kinds.find(value.get<std::string>());
            if (it == kinds.end()) {
                throw std::invalid_argument("evicted must be one of keep, restore, recompute, drop");
            }
            o.when_evicted = it->second;
        } else if (name == "cold_dir") {
            o.cold_dir        = value.get<std::string>();
            o.params.cold_dir = o.cold_dir.c_str();
        } else if (name == "protect" && value.is_array()) {
            for (size_t i = 0; i < value.size(); ++i) {
                o.protect.emplace_back(value.at(i).at(0).get<int32_t>(), value.at(i).at(1).get<int32_t>());
            }
        } else if (name == "library") {
            o.library = { value.at("folder").get<std::string>(), value.at("limit").get<uint64_t>(), value.at("evicts_with").get<std::string>() };
        } else if (!set_param(o.params, name, value)) {
            throw std::invalid_argument("there is no option " + name);
        }
    }
    // the cache prunes by itself; what comes back before a prompt is decided by begin_prompt()
    o.params.turns = o.params.policy == REFREEKV_POLICY_ELASTIC ? REFREEKV_TURNS_NONE : REFREEKV_TURNS_DROP;
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
    g_is_set = refreekv_next_context(&g_options.params) == REFREEKV_OK; // which logs what is wrong

    return g_is_set;
}

bool has_policy(llama_context * ctx) {
    static llama_context * asked = nullptr;
    static bool            res   = false;

    if (ctx != asked) { // once, since the answer "no" is an error that is logged
        asked = ctx;
        res   = g_is_set || (std::getenv("REFREEKV_NATIVE_POLICY") && refreekv_pruned_pos(ctx, 0) >= -1);
    }
    return res;
}

bool evicts(llama_context * ctx) {
    return has_policy(ctx) && g_options.params.policy != REFREEKV_POLICY_ELASTIC;
}

} // namespace refreekv::server
