#pragma once

#include "refreekv.h"

#include <atomic>
#include <cstdint>
#include <string>

namespace refreekv {

// What belongs to a process or to a thread, and to no context.

// The policy of the contexts that this thread creates from now on. llama.h passes its structs by value through ctypes, so they
// have no room for one: it reaches the constructors through variables of the thread.

// what refreekv_next_context() has set, else the environment's; nullptr: no policy
const refreekv_params * next_params();

void set_next_params(const refreekv_params * params); // nullptr: none, whatever the environment says
void forget_next_params();

// whether next_params() is the environment's; a context that cannot have that goes without
bool next_is_forced();

// While it exists, next_params() is nullptr: the context that is created goes without a policy
class without_policy {
public:
    without_policy();
    ~without_policy();
};

// Whether the llama_kv_cache that is constructed next on this thread can have a policy (cache/create.h).
class open_place {
public:
    open_place();
    ~open_place();

    static bool take(); // and closes it
};

// Failures that tests ask for: from the n-th time on, until another number is set; 0: none
class failure {
public:
    void from(int32_t n) { n_left = n; }
    bool now();

private:
    std::atomic<int32_t> n_left { 0 };
};
extern failure allocation_failure; // of rows (refreekv_fail_allocation)
extern failure cold_failure;       // of writes to a cold store (refreekv_fail_cold)

// What has run in this process, for refreekv_hooks_ran()
enum hook : uint32_t {
    HOOK_CREATE    = 1 << 0,
    HOOK_RESERVE   = 1 << 1,
    HOOK_APPLY     = 1 << 2,
    HOOK_ATTENTION = 1 << 3,
    HOOK_UPDATE    = 1 << 4,
};
void     hook_ran(hook h);
uint32_t hooks_ran();

} // namespace refreekv
