#pragma once

#include "refreekv.h"

#include <exception>
#include <new>
#include <string>

// the last error of this thread (refreekv_last_error); also logged as an error
void refreekv_set_error(const char * format, ...)
#ifdef __GNUC__
    __attribute__((format(printf, 1, 2)))
#endif
    ;

void refreekv_clear_error();

// f()'s refreekv_status (or count); what it throws becomes one
template <typename F>
auto refreekv_guard(F && f) -> decltype(f()) {
    try {
        return f();
    } catch (const std::bad_alloc &) {
        refreekv_set_error("out of memory");
        return REFREEKV_ERR_MEMORY;
    } catch (const std::exception & err) {
        refreekv_set_error("%s", err.what());
        return REFREEKV_ERR_STATE;
    }
}
