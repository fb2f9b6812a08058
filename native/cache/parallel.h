#pragma once

#include <cstdint>
#include <functional>

namespace refreekv {

// f(i, thread) for i from 0 to n - 1 on up to n_threads threads, of which this is one; thread numbers them. f returns a
// refreekv_status, and does for an i what it would do whatever the threads are. The first failure that is seen ends it; its
// status is returned, and its error is this thread's.
int32_t run_parallel(uint32_t n, uint32_t n_threads, const std::function<int32_t(uint32_t i, uint32_t thread)> & f);

} // namespace refreekv
