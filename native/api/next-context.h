#pragma once

#include "refreekv.h"

// Which policy the next context of this thread gets. llama.h passes its structs by value through ctypes, so they have no
// room for one: it reaches the constructors through variables of the thread.
namespace refreekv {

// what refreekv_next_context() has set, else the environment's; nullptr: no policy
const refreekv_params * next_params();

void set_next_params(const refreekv_params * params); // nullptr: none, whatever the environment says
void forget_next_params();

// whether next_params() is the environment's. A context that cannot have that goes without: skip_forced(true)
bool next_is_forced();
void skip_forced(bool skip);

} // namespace refreekv
