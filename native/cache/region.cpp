#include "cache/region.h"

#include <algorithm>
#include <cstdint>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif
#if defined(_WIN32)
#define WIN32_LEAN_AND_MEAN
#ifndef NOMINMAX
#define NOMINMAX
#endif
#include <windows.h>
#else
#include <sys/mman.h>
#include <unistd.h>
#if !defined(MAP_NORESERVE)
#define MAP_NORESERVE 0
#endif
#endif

namespace refreekv {

bool region::resize(size_t size) {
    GGML_ASSERT(size <= max);

    const size_t now  = bytes();
    const size_t then = bytes_for(size);

    if (then > now && !map(now, then)) {
        return false;
    }
    mark(size);
    if (then < now) {
        unmap(then, now);
    }
    n = size;

    return true;
}

// Host memory

static const size_t REFREEKV_HUGE_PAGE = 2 << 20; // one fault in place of 512; where the system has none, nothing is lost

class region_host : public refreekv::region {
public:
    explicit region_host(size_t n) {
        page = system_page();
        max  = (n + page - 1)/page*page;
        addr = (char *) ((reserve(max + REFREEKV_HUGE_PAGE) + REFREEKV_HUGE_PAGE - 1)/REFREEKV_HUGE_PAGE*REFREEKV_HUGE_PAGE);
        if (reserved) {
            buf.reset(ggml_backend_cpu_buffer_from_ptr(addr, max));
        }
    }

    ~region_host() override {
        mark(max);
        release();
    }

private:
    void * reserved = nullptr;

    static size_t system_page();

    // addresses that cannot be touched; 0: there are none
    uintptr_t reserve(size_t n);
    void      release();

    bool map  (size_t begin, size_t end) override;
    void unmap(size_t begin, size_t end) override;
    void mark (size_t size) override;
};

std::unique_ptr<refreekv::region> region::make(ggml_backend_buffer_type_t buft, size_t max) {
    if (buft != ggml_backend_cpu_buffer_type()) {
        return region_cuda(buft, max);
    }
    auto res = std::make_unique<region_host>(max);

    return res->buffer() ? std::move(res) : nullptr;
}

#if defined(__SANITIZE_ADDRESS__)

void region_host::mark(size_t size) {
    ASAN_UNPOISON_MEMORY_REGION(addr, size);
    ASAN_POISON_MEMORY_REGION(addr + size, max - size);
}

#else

void region_host::mark(size_t) {}

#endif

#if defined(_WIN32)

size_t region_host::system_page() {
    SYSTEM_INFO info;
    GetSystemInfo(&info);
    return info.dwPageSize;
}

uintptr_t region_host::reserve(size_t n) {
    reserved = VirtualAlloc(nullptr, n, MEM_RESERVE, PAGE_NOACCESS);
    return (uintptr_t) reserved;
}

void region_host::release() {
    if (reserved) {
        VirtualFree(reserved, 0, MEM_RELEASE);
    }
}

bool region_host::map(size_t begin, size_t end) {
    return VirtualAlloc(addr + begin, end - begin, MEM_COMMIT, PAGE_READWRITE);
}

void region_host::unmap(size_t begin, size_t end) {
    VirtualFree(addr + begin, end - begin, MEM_DECOMMIT);
}

#else

#if defined(__linux__)
#if !defined(MADV_POPULATE_WRITE)
#define MADV_POPULATE_WRITE 23 // Linux 5.14
#endif
#if !defined(MADV_COLLAPSE)
#define MADV_COLLAPSE 25 // Linux 6.1
#endif
#endif

static const int REFREEKV_NO_MEMORY = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;

size_t region_host::system_page() {
    return sysconf(_SC_PAGESIZE);
}

uintptr_t region_host::reserve(size_t n) {
    void * ptr = mmap(nullptr, n, PROT_NONE, REFREEKV_NO_MEMORY, -1, 0);
    reserved = ptr == MAP_FAILED ? nullptr : ptr;
    return (uintptr_t) reserved;
}

void region_host::release() {
    if (reserved) {
        munmap(reserved, max + REFREEKV_HUGE_PAGE);
    }
}

bool region_host::map(size_t begin, size_t end) {
    if (mprotect(addr + begin, end - begin, PROT_READ | PROT_WRITE) != 0) {
        return false;
    }
#if defined(__linux__)
    // Where rows are written one by one, single faults take most of the time. What cannot be done here, they do later
    const size_t huge = end/REFREEKV_HUGE_PAGE*REFREEKV_HUGE_PAGE; // up to here pages of that size fit
    const size_t from = begin/REFREEKV_HUGE_PAGE*REFREEKV_HUGE_PAGE;

    madvise(addr + from, end - from, MADV_HUGEPAGE);
    if (huge > from && madvise(addr + from, huge - from, MADV_COLLAPSE) == 0) {
        begin = std::max(begin, huge);
    }
    if (end > begin) {
        madvise(addr + begin, end - begin, MADV_POPULATE_WRITE);
    }
#endif
    return true;
}

// mapped anew, since what madvise(MADV_DONTNEED) does is another thing on each system
void region_host::unmap(size_t begin, size_t end) {
    mmap(addr + begin, end - begin, PROT_NONE, REFREEKV_NO_MEMORY | MAP_FIXED, -1, 0);
}

#endif

} // namespace refreekv
