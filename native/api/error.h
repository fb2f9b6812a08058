#pragma once

#include "refreekv.h"

#include <exception>
#include <new>
#include <string>

namespace refreekv {

// the last error of this thread (refreekv_last_error); also logged as an error
void set_error(const char * format, ...)
#ifdef __GNUC__
    __attribute__((format(printf, 1, 2)))
#endif
    ;

void clear_error();

const std::string & last_error(); // of this thread

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
