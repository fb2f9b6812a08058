#include "cache/parallel.h"

#include "hooks.h"
#include "refreekv.h"
#include "api/error.h"

#include <atomic>
#include <cstdio>
#include <exception>
#include <future>
#include <vector>

namespace refreekv {

int32_t run_parallel(uint32_t n, uint32_t n_threads, const std::function<int32_t(uint32_t i, uint32_t thread)> & f) {
    struct result {
        int32_t status = REFREEKV_OK;
        char    error[256];
    };

    std::atomic<uint32_t> next { 0 };

    const auto work = [&](uint32_t thread) -> result {
        for (uint32_t i = next++; i < n; i = next++) {
            const int32_t status = guard([&]() { return f(i, thread); });
            if (status != REFREEKV_OK) {
                next = n;
                result res = { status, {} };
                snprintf(res.error, sizeof(res.error), "%s", last_error());
                return res;
            }
        }
        return {};
    };

    std::vector<std::future<result>> others;
    others.reserve(n_threads); // nothing is thrown once a thread is at work
    for (uint32_t t = 1; t < n_threads && t < n; ++t) {
        try {
            others.push_back(std::async(std::launch::async, work, t));
        } catch (const std::exception &) {
            break; // no more threads or memory to be had: those that are there do it
        }
    }

    result res = work(0);
    for (auto & other : others) {
        const result r = other.get();
        if (res.status == REFREEKV_OK && r.status != REFREEKV_OK) {
            res = r;
            take_error(res.error);
        }
    }

    return res.status;
}

} // namespace refreekv
