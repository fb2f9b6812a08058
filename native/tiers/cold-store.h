#pragma once

#include "cache/pages.h"

#include <cstddef>
#include <cstdint>
#include <map>
#include <mutex>
#include <string>

namespace refreekv {

// Where the bytes of evicted cells wait until they are wanted again: an address space of which only what was written takes
// room. In host memory, or in a file that has no name: no other process can open it (it is readable by its owner alone
// while it has one), and it is gone when the process ends, however it ends.
//
// A process that was forked off from this one finds nothing in it, and writes nothing.
//
// The file is written and read, not mapped: a full disk or a file that was cut is an error then, and no signal.
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

    // try_read() does not wait for a disk. LATE: these bytes are not in memory; the operating system has been asked for them, so that
    // they are there the next time. (Where the operating system has no such read, it waits.) It does not check readable(), which is a system
    // call: callers check that once per batch. It is called from several threads
    enum result { THERE, LATE, LOST };

    bool   readable() const;
    result try_read(uint64_t offset, void * data, size_t size) const;

    // forget everything, and give its room back
    void clear();

    bool is_file() const { return fd >= 0; }

private:
    int     fd    = -1;
    int64_t owner = 0; // a process that was forked off has the same file, and must leave it alone

    std::map<uint64_t, pages_ptr> pages; // by offset/REFREEKV_COLD_PAGE
    std::mutex pages_mutex;

    bool   get    (uint64_t offset, void * data, size_t size) const;
    char * page_at(uint64_t offset); // made when it is not there; nullptr: no memory
};

} // namespace refreekv
