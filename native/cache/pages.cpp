#include "cache/pages.h"

#include <algorithm>
#include <new>

#if defined(__GLIBC__)
#include <malloc.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <cstdlib>
#include <cstring>
#elif defined(_WIN32)
#define WIN32_LEAN_AND_MEAN
#include <windows.h>
#else
#include <sys/mman.h>
#endif

namespace refreekv {

void bytes::resize(size_t n) {
    if (n > 0 && (!pages || n > pages.get_deleter().size)) {
        pages.reset();
        pages = pages_alloc(n);
        if (!pages) {
            this->n = 0;
            throw std::bad_alloc();
        }
    }
    this->n = n;
}

void pages_trim() {
#if defined(__GLIBC__)
    malloc_trim(0);
#endif
}

#if defined(__SANITIZE_ADDRESS__)

// AddressSanitizer watches what malloc gives, and not what comes from the system

pages_ptr pages_alloc(size_t size) {
    void * ptr = nullptr;
    if (posix_memalign(&ptr, 4096, size) == 0) {
        // larger blocks are new pages of the system, which are zero. AddressSanitizer fills only their first bytes (max_malloc_fill_size)
        memset(ptr, 0, std::min<size_t>(size, 1 << 20));
    }

    return { ptr, { size } };
}

void pages_deleter::operator()(void * ptr) const {
    std::free(ptr);
}

#elif defined(_WIN32)

pages_ptr pages_alloc(size_t size) {
    return { VirtualAlloc(nullptr, size, MEM_RESERVE | MEM_COMMIT, PAGE_READWRITE), { size } };
}

void pages_deleter::operator()(void * ptr) const {
    VirtualFree(ptr, 0, MEM_RELEASE);
}

#else

pages_ptr pages_alloc(size_t size) {
    void * ptr = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (ptr == MAP_FAILED) {
        return { nullptr, { size } };
    }

#if defined(MADV_HUGEPAGE)
    madvise(ptr, size, MADV_HUGEPAGE); // a fault for 2 MiB in place of 512; where the system has none, nothing is lost
#endif

    return { ptr, { size } };
}

void pages_deleter::operator()(void * ptr) const {
    munmap(ptr, size);
}

#endif

} // namespace refreekv
