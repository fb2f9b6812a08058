#pragma once

#include "refreekv.h"

#include <exception>
#include <new>

namespace refreekv {

// The last error of this thread (refreekv_last_error), cut off where it is very long; also logged as an error. It allocates nothing, since it
// may have to say that there is no memory
void set_error(const char * format, ...)
#ifdef __GNUC__
    __attribute__((format(printf, 1, 2)))
#endif
    ;

void clear_error();

const char * last_error(); // of this thread

// f()'s refreekv_status (or count); what it throws becomes one
template <typename F>
auto guard(F && f) -> decltype(f()) {
    try {
        return f();
    } catch (const std::bad_alloc &) {
        set_error("out of memory");
        return REFREEKV_ERR_MEMORY;
    } catch (const std::exception & err) {
        set_error("%s", err.what());
        return REFREEKV_ERR_STATE;
    }
}

} // namespace refreekv
