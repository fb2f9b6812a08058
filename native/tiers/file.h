#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace refreekv {

// An open file, which is closed with this object. It is read and written at offsets, not mapped: a full disk or a file that was cut is an
// error then, and no signal. Several threads may read and write it at once.
class file {
public:
    // nullptr: it cannot be had, and errno says why
    static std::unique_ptr<file> make_unnamed(const std::string & dir); // it is gone when it is closed, however the process ends
    static std::unique_ptr<file> make(const std::string & path);        // a new one, for its owner alone
    // to be read; own: not one that others may have put there (is_own)
    static std::unique_ptr<file> open(const std::string & path, bool own = true);

    ~file();

    file(const file &) = delete;
    file & operator=(const file &) = delete;

    // all of these bytes. false: no room, or they are not there (any more)
    bool write(uint64_t offset, const void * data, size_t size);
    bool read (uint64_t offset, void * data, size_t size) const;

    // Does not wait for a disk. LATE: these bytes are not in memory; the operating system has been asked for them, so that they are there
    // the next time. Where the operating system has no such read, this one waits
    enum result { THERE, LATE, LOST };
    result try_read(uint64_t offset, void * data, size_t size) const;

    int64_t size() const; // -1: it cannot be had
    bool    empty();      // gives its room back; false: it cannot

private:
    explicit file(int fd) : fd(fd) {}

    static std::unique_ptr<file> of(int fd); // -1: nullptr

    int fd;
};

void remove_file(const std::string & path);

// The names of what is in a folder; none where it cannot be read. Throws std::bad_alloc, where std::filesystem would end the process
std::vector<std::string> list_folder(const std::string & path);

// for its owner alone, if it is not there; and those above it as others are made. Throws std::runtime_error
void make_folder(const std::string & path);

// a process that was forked off from another has the same files
int64_t     process_id();
bool        process_runs(int64_t id); // of any user
std::string host_name();

} // namespace refreekv
