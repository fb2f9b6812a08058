#pragma once

#include "library/text.h"

#include <cstdint>
#include <map>
#include <set>
#include <string>
#include <vector>

namespace refreekv {

// The files of a library, in one folder:
//
//   <parent>-<key>.block            a block of a text (library/block.h)
//   <parent>-<key>-<tokens>.state   what recurrent layers and layers with a window hold behind so many tokens of a text. It has the name of a
//                                   block that would end there
//   .<host>-<process>-<number>.tmp  one that is being written
//
// Any number of processes may use a folder at once. A file is written under a temporary name, and then renamed; whoever reads one checks it
// first. Nothing waits for the disk (fsync): after a power cut a file may be damaged, which its checksums tell. Files of others in the
// folder are left alone.
class folder {
public:
    // It is made, for its owner alone, where it is not there. What processes that have died were writing is removed. limit: bytes of all files.
    // Throws std::runtime_error: it cannot be made
    folder(const std::string & path, uint64_t limit);

    std::string path_of      (const text_block & block) const;
    std::string path_of_state(const text_block & block) const;

    bool     has (const std::string & path) const;
    uint64_t size(const std::string & path) const; // bytes; 0: it is gone

    // by the key before them: the keys of blocks; the numbers of tokens of states
    std::map<std::string, std::vector<std::string>> children() const;
    std::map<std::string, std::set<uint32_t>>       states()   const;

    // the block of a file, by what that says; salt: as in make_block(). false: it depends on something else, or as read_state()
    bool read_block(const std::string & parent, const std::string & key, uint32_t first, const std::string & salt, text_block & res) const;

    // false: it is gone, or damaged; then it is removed, and the error says so
    bool read_state(const text_block & block, std::string & res) const;

    // throw std::runtime_error
    void        write_state(const text_block & block, const void * data, size_t size) const;
    std::string temporary() const;                                                  // a new name
    void        rename(const std::string & temporary, const std::string & path) const; // the temporary one stays where it fails

    // They were used now. Of several, the last ones are removed first
    void touch(const std::vector<std::string> & paths) const;

    // removes what was not used for longest until the rest is within the limit, and states of texts that are gone
    void trim() const;

    uint64_t get_limit() const { return limit; }

private:
    std::string path;
    uint64_t    limit;

    // f(name) for each file
    template <typename F>
    void for_files(F && f) const;

    void remove_left_behind() const;
    void remove_damaged(const std::string & path) const;
};

// A file of a library, of either kind. Throws std::runtime_error: it cannot be read, or is not what was written
void check_file(const std::string & path);

// Whether a file is what was written; block: that it has to be of. One that is damaged is removed; one that cannot be opened, or is not ours,
// is not. why: what is wrong. Any thread
bool check_or_remove(const std::string & path, const text_block * block, std::string & why);

} // namespace refreekv
