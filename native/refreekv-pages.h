#pragma once

#include <cstddef>
#include <memory>

// Zeroed memory straight from the operating system: what is freed leaves the process at once. malloc keeps blocks of
// the size of one layer's rows (glibc raises its mmap threshold up to 32 MiB as they are freed).

struct refreekv_pages_deleter {
    size_t size;
    void operator()(void * ptr) const;
};

using refreekv_pages_ptr = std::unique_ptr<void, refreekv_pages_deleter>;

// nullptr when there is no memory
refreekv_pages_ptr refreekv_pages_alloc(size_t size);

// the memory behind the first `size` bytes goes back to the system, and those stay where they are. false: this system cannot do
// that, and nothing has changed
bool refreekv_pages_shrink(refreekv_pages_ptr & pages, size_t size);

// give back what malloc keeps of memory that was freed (the scratch of an eviction), where it can be told to
void refreekv_pages_trim();
