#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

namespace refreekv {

// Zeroed memory straight from the operating system: what is freed leaves the process at once. malloc keeps blocks of
// the size of one layer's rows (glibc raises its mmap threshold up to 32 MiB as they are freed).

struct pages_deleter {
    size_t size;
    void operator()(void * ptr) const;
};

using pages_ptr = std::unique_ptr<void, pages_deleter>;

// nullptr when there is no memory
pages_ptr pages_alloc(size_t size);

// Bytes in such memory. They are zero only when it is new.
class bytes {
public:
    bytes() = default;
    explicit bytes(size_t n) { resize(n); }

    // what was there is lost; memory is kept for the next time. Throws std::bad_alloc
    void resize(size_t n);

    uint8_t * data() const { return (uint8_t *) pages.get(); }
    size_t    size() const { return n; }
    bool      empty() const { return n == 0; }

private:
    pages_ptr pages { nullptr, { 0 } };
    size_t             n = 0;
};

// give back what malloc keeps of memory that was freed (the scratch of an eviction), where it can be told to
void pages_trim();

} // namespace refreekv
