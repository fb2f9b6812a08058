#include "api/next-context.h"

#include "api/environment.h"

namespace refreekv {

enum next_state { NEXT_UNSET, NEXT_NONE, NEXT_PARAMS };

static thread_local next_state      g_state = NEXT_UNSET;
static thread_local refreekv_params g_params;
static thread_local bool            g_skip_forced = false;

const refreekv_params * next_params() {
    if (g_state == NEXT_PARAMS) {
        return &g_params;
    }
    return next_is_forced() ? &refreekv_get_environment().params : nullptr;
}

bool next_is_forced() {
    return g_state == NEXT_UNSET && !g_skip_forced && refreekv_get_environment().has_policy;
}

void skip_forced(bool skip) {
    g_skip_forced = skip;
}

void set_next_params(const refreekv_params * params) {
    g_state = params ? NEXT_PARAMS : NEXT_NONE;
    if (params) {
        g_params = *params;
    }
}

void forget_next_params() {
    g_state = NEXT_UNSET;
}

} // namespace refreekv
