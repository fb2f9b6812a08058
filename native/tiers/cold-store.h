#pragma once

#include "tiers/file.h"

#include "ggml-backend.h"

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>

namespace refreekv {

// Where the bytes of evicted cells wait until they are wanted again: an address space of which only what was written takes
// room. In host memory, or in a file that has no name: no other process can open it (it is readable by its owner alone
// while it has one), and it is gone when the process ends, however it ends.
//
// A process that was forked off from this one finds nothing in it, and writes nothing.
//
// Ranges of it can be those of other files (attach), which are read there and never written.
class cold_store {
public:
    cold_store(); // host memory

    // throws std::runtime_error, naming the directory and what the system says
    explicit cold_store(const std::string & dir);

    ~cold_store();

    cold_store(const cold_store &) = delete;
    cold_store & operator=(const cold_store &) = delete;

    // false: no room; nothing is known of these bytes then. Several threads may write at the same time if their
    // ranges of bytes do not overlap
    bool write(uint64_t offset, const void * data, size_t size);

    // false: they cannot be read (any more). Several threads may read at once
    bool read(uint64_t offset, void * data, size_t size) const { return readable() && get(offset, data, size); }

    // see file::try_read(). It does not check readable(), which is a system call: callers check that once per batch. It is called from
    // several threads
    bool         readable() const;
    file::result try_read(uint64_t offset, void * data, size_t size) const;

    // These bytes are those of a file from `at` on, where nothing is attached yet. The file stays open until all of its ranges are
    // detached. No other thread may use the store meanwhile. Both throw std::bad_alloc, and nothing has changed then
    void attach(uint64_t offset, size_t size, const std::shared_ptr<const file> & in, uint64_t at);
    void detach(uint64_t offset, size_t size);

    // forget everything, and give its room back
    void clear();

    bool is_file() const { return own != nullptr; }

    // Host memory is allocated by this buffer type from now on, so that its device can read it. Where that has none, it is the system's
    // A graph may still read it when it is to be freed: wait() returns when none does
    void share_by(ggml_backend_buffer_type_t buft, std::function<void()> wait) {
        shared_by = buft;
        wait_for_readers = std::move(wait);
    }

    // Where these bytes of the store's own memory are; nullptr: they do not lie in one piece that a device can read. Not while another thread
    // writes
    const void * shared_address(uint64_t offset, size_t size) const;

private:
    struct range {
        size_t                      size;
        std::shared_ptr<const file> in;
        uint64_t                    at;
    };

    std::unique_ptr<file> own;
    int64_t               owner = 0; // a process that was forked off has the same file, and must leave it alone

    struct page {
        std::shared_ptr<void> data;
        bool                  is_shared; // a device can read it
    };
    std::map<uint64_t, page> pages; // by offset/REFREEKV_COLD_PAGE
    std::mutex pages_mutex;

    ggml_backend_buffer_type_t shared_by = nullptr;
    std::function<void()>      wait_for_readers;

    std::map<uint64_t, range> attached; // by offset; they do not overlap

    bool   get    (uint64_t offset, void * data, size_t size) const;
    bool   get_own(uint64_t offset, void * data, size_t size) const;
    char * page_at(uint64_t offset); // made when it is not there; nullptr: no memory
    page   make_page() const;

    // f(file, offset in it, destination, size) for the pieces of a range that lie in one place; file: nullptr: in this store's own. It
    // stops where f returns false
    template <typename F>
    bool for_places(uint64_t offset, void * data, size_t size, F && f) const;
};

} // namespace refreekv
