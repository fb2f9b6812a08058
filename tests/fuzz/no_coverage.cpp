// Calls that the compiler inserts to report coverage (-fsanitize-coverage) and that no runtime library of GCC has. They do nothing where a
// program without libFuzzer loads the library; libFuzzer's own take their place in a program of tests/fuzz.

#include <cstdint>

#define NOTHING extern "C" __attribute__((weak)) void

NOTHING __sanitizer_cov_trace_pc() {}
NOTHING __sanitizer_cov_trace_cmpf(float, float) {}
NOTHING __sanitizer_cov_trace_cmpd(double, double) {}
