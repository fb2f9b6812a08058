#include "api/process.h"

#include "hooks.h"
#include "api/environment.h"
#include "api/error.h"

#include "llama-impl.h"

#include <cstdarg>
#include <cstdio>

namespace refreekv {

enum next_state { NEXT_UNSET, NEXT_NONE, NEXT_PARAMS };

static thread_local next_state      g_state = NEXT_UNSET;
static thread_local refreekv_params g_params;
static thread_local bool            g_without = false;

const refreekv_params * next_params() {
    if (g_without) {
        return nullptr;
    }
    if (g_state == NEXT_PARAMS) {
        return &g_params;
    }
    return next_is_forced() ? &get_environment().params : nullptr;
}

bool next_is_forced() {
    return g_state == NEXT_UNSET && get_environment().has_policy;
}

without_policy::without_policy() {
    g_without = true;
}

without_policy::~without_policy() {
    g_without = false;
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

// places

static thread_local bool g_open = false;

open_place::open_place() {
    g_open = true;
}

open_place::~open_place() {
    g_open = false;
}

bool open_place::take() {
    const bool res = g_open;
    g_open = false;
    return res;
}

// failures

failure allocation_failure;
failure cold_failure;

bool failure::now() {
    int32_t n = n_left;
    while (n > 1 && !n_left.compare_exchange_weak(n, n - 1)) {
    }
    return n == 1;
}

// hooks

static std::atomic<uint32_t> g_hooks_ran { 0 };

void hook_ran(hook h) {
    if (!(g_hooks_ran.load(std::memory_order_relaxed) & h)) {
        g_hooks_ran |= h;
    }
}

uint32_t hooks_ran() {
    return g_hooks_ran;
}

// errors

static thread_local char g_error[512];

void set_error(const char * format, ...) {
    char buf[sizeof(g_error)]; // what is formatted may have the error of before in it

    va_list args;
    va_start(args, format);
    vsnprintf(buf, sizeof(buf), format, args);
    va_end(args);

    take_error(buf);

    LLAMA_LOG_ERROR("refreekv: %s\n", buf);
}

void take_error(const char * error) {
    snprintf(g_error, sizeof(g_error), "%s", error);
}

void clear_error() {
    g_error[0] = '\0';
}

const char * last_error() {
    return g_error;
}

} // namespace refreekv
