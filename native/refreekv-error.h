#pragma once

// the last error of this thread (refreekv_last_error); also logged as an error
void refreekv_set_error(const char * format, ...)
#ifdef __GNUC__
    __attribute__((format(printf, 1, 2)))
#endif
    ;

void refreekv_clear_error();
