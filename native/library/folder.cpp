#include "library/folder.h"

#include "api/error.h"
#include "api/process.h"
#include "library/block.h"
#include "tiers/file.h"

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <filesystem>
#include <random>
#include <stdexcept>

namespace refreekv {

namespace fs = std::filesystem;

static const char * const BLOCK     = ".block";
static const char * const STATE     = ".state";
static const char * const TEMPORARY = ".tmp";

static const auto LEFT_BEHIND = std::chrono::hours(1); // after which a temporary file of another machine is

// of a file's name; several fields, divided by '-'. Empty: it is none of ours
static std::vector<std::string> fields_of(const std::string & name, const char * suffix, size_t n_fields) {
    const size_t n_suffix = strlen(suffix);
    if (name.size() <= n_suffix || name.compare(name.size() - n_suffix, n_suffix, suffix) != 0) {
        return {};
    }
    std::vector<std::string> res(1);
    for (const char c : name.substr(0, name.size() - n_suffix)) {
        if (c == '-') {
            res.emplace_back();
        } else if ((c >= '0' && c <= '9') || (c >= 'a' && c <= 'f')) {
            res.back() += c;
        } else {
            return {};
        }
    }
    const bool ours = res.size() == n_fields && std::none_of(res.begin(), res.end(), [](const std::string & s) { return s.empty(); });

    return ours ? res : std::vector<std::string>();
}

// ... that begin with two keys
static std::vector<std::string> keyed_fields(const std::string & name, const char * suffix, size_t n_fields) {
    const auto res = fields_of(name, suffix, n_fields);

    return !res.empty() && res[0].size() == REFREEKV_KEY_DIGITS && res[1].size() == REFREEKV_KEY_DIGITS ? res : std::vector<std::string>();
}

static std::vector<std::string> block_fields(const std::string & name) { return keyed_fields(name, BLOCK, 2); }
static std::vector<std::string> state_fields(const std::string & name) { return keyed_fields(name, STATE, 3); }

static std::string this_host() {
    return hash_of(host_name()).substr(0, 8);
}

template <typename F>
void folder::for_files(F && f) const {
    for (const auto & name : list_folder(path)) {
        f(name);
    }
}

folder::folder(const std::string & path, uint64_t limit) : path(path), limit(limit) {
    make_folder(path);
    remove_left_behind();
}

// temporary files of processes that have died
void folder::remove_left_behind() const {
    for_files([&](const std::string & name) {
        const auto fields = name[0] == '.' ? fields_of(name.substr(1), TEMPORARY, 3) : std::vector<std::string>();
        if (fields.empty() || fields[0].size() != 8 || fields[2].size() != 8) {
            return;
        }
        std::error_code err;
        const auto written = fs::last_write_time(fs::u8path(path + "/" + name), err);
        const bool old     = !err && fs::file_time_type::clock::now() - written > LEFT_BEHIND;

        if (old || (fields[0] == this_host() && !process_runs(strtoll(fields[1].c_str(), nullptr, 10)))) {
            remove_file(path + "/" + name);
        }
    });
}

std::string folder::path_of(const text_block & block) const {
    return path + "/" + block.parent + "-" + block.key + BLOCK;
}

std::string folder::path_of_state(const text_block & block) const {
    return path + "/" + block.parent + "-" + block.key + "-" + std::to_string(block.end()) + STATE;
}

bool folder::has(const std::string & path) const {
    std::error_code err;
    return fs::exists(fs::u8path(path), err);
}

uint64_t folder::size(const std::string & path) const {
    std::error_code err;
    const auto res = fs::file_size(fs::u8path(path), err);
    return err ? 0 : res;
}

std::map<std::string, std::vector<std::string>> folder::children() const {
    std::map<std::string, std::vector<std::string>> res;

    for_files([&](const std::string & name) {
        const auto fields = block_fields(name);
        if (!fields.empty()) {
            res[fields[0]].push_back(fields[1]);
        }
    });
    return res;
}

std::map<std::string, std::set<uint32_t>> folder::states() const {
    std::map<std::string, std::set<uint32_t>> res;

    for_files([&](const std::string & name) {
        const auto fields = state_fields(name);
        if (!fields.empty()) {
            res[fields[0]].insert(strtoul(fields[2].c_str(), nullptr, 10));
        }
    });
    return res;
}

bool folder::read_block(const std::string & parent, const std::string & key, uint32_t first, const std::string & salt, text_block & res) const {
    const std::string its = path + "/" + parent + "-" + key + BLOCK;
    try {
        const auto said = read_label(open_block(its).label, first);
        for (const auto & kind : { std::string(), salt }) {
            res = make_block(parent, kind, first, said.tokens);
            if (res.key == key) {
                return true;
            }
        }
        if (said.key == key && said.parent == parent) {
            return false; // read with other options
        }
    } catch (const std::runtime_error &) {
    }
    remove_damaged(its);

    return false;
}

void folder::remove_damaged(const std::string & path) const {
    std::string why;
    if (!check_or_remove(path, nullptr, why)) {
        set_error("%s", why.c_str());
    }
}

// of a state's file
struct state_header {
    uint32_t magic;
    uint32_t version;
    uint64_t sum; // of the key and of what follows
};

static const uint32_t REFREEKV_STATE_MAGIC   = 0x534b4652; // "RFKS"
static const uint32_t REFREEKV_STATE_VERSION = 2;

static state_header head_of(const std::string & key, const void * data, size_t size) {
    const std::string bytes = key + std::string((const char *) data, size);

    return { REFREEKV_STATE_MAGIC, REFREEKV_STATE_VERSION, checksum(bytes.data(), bytes.size()) };
}

static std::string read_checked_state(const std::string & path, const std::string & key) {
    const auto in   = file::open(path);
    const auto size = in ? in->size() : -1;
    if (size < 0) {
        throw std::runtime_error(path + ": " + strerror(errno));
    }
    state_header head = {};
    std::string  res(std::max<int64_t>(0, size - (int64_t) sizeof(head)), '\0');

    if (size < (int64_t) sizeof(head) || !in->read(0, &head, sizeof(head)) || !in->read(sizeof(head), &res[0], res.size())) {
        throw std::runtime_error(path + ": cut off, or cannot be read");
    }
    const auto expected = head_of(key, res.data(), res.size());
    if (head.magic != expected.magic || head.version != expected.version || head.sum != expected.sum) {
        throw std::runtime_error(path + ": damaged, or of another version");
    }
    return res;
}

void check_file(const std::string & path) {
    const auto name   = fs::u8path(path).filename().u8string();
    const auto fields = state_fields(name);
    if (!fields.empty()) {
        read_checked_state(path, fields[1]);
        return;
    }
    const auto b    = open_block(path);
    const auto said = read_label(b.label, b.header.first);
    if (block_fields(name) != std::vector<std::string> { said.parent, said.key }) {
        throw std::runtime_error(path + ": it is another block than its name says");
    }
    check_sections(b, path);
}

bool check_or_remove(const std::string & path, const text_block * block, std::string & why) {
    try {
        check_file(path);
        if (block && open_block(path).label != block->label()) {
            throw std::runtime_error(path + ": a block of another text");
        }
        return true;
    } catch (const std::runtime_error & err) {
        why = err.what();
        // else it is gone, or what is wrong is not the file, such as too many open ones
        if (file::open(path)) {
            remove_file(path);
            why = "the library has a damaged file, which is removed: " + why;
        }
    }
    return false;
}

bool folder::read_state(const text_block & block, std::string & res) const {
    const auto its = path_of_state(block);
    try {
        res = read_checked_state(its, block.key);
        touch({ its });
        return true;
    } catch (const std::runtime_error &) {
        remove_damaged(its);
    }
    return false;
}

void folder::write_state(const text_block & block, const void * data, size_t size) const {
    const auto head = head_of(block.key, data, size);
    const auto its  = temporary();

    try {
        const auto out = file::make(its);
        if (!out || cold_failure.now() || !out->write(0, &head, sizeof(head)) || !out->write(sizeof(head), data, size)) {
            throw std::runtime_error(its + ": " + strerror(errno));
        }
        rename(its, path_of_state(block));
    } catch (...) {
        remove_file(its);
        throw;
    }
}

std::string folder::temporary() const {
    char number[9];
    snprintf(number, sizeof(number), "%08x", (unsigned) std::random_device{}());

    return path + "/." + this_host() + "-" + std::to_string(process_id()) + "-" + number + TEMPORARY;
}

void folder::rename(const std::string & temporary, const std::string & path) const {
    std::error_code err;
    fs::rename(fs::u8path(temporary), fs::u8path(path), err);
    if (err) {
        throw std::runtime_error(path + ": " + err.message());
    }
}

void folder::touch(const std::vector<std::string> & paths) const {
    const auto now = fs::file_time_type::clock::now();

    for (size_t i = 0; i < paths.size(); ++i) {
        std::error_code err; // it may be gone
        fs::last_write_time(fs::u8path(paths[i]), now - std::chrono::microseconds(i), err);
    }
}

void folder::trim() const {
    struct entry {
        std::string       name;
        fs::file_time_type used;
        uint64_t          bytes;
    };
    std::vector<entry> files;
    uint64_t n_bytes = 0;

    for_files([&](const std::string & name) {
        if (block_fields(name).empty() && state_fields(name).empty()) {
            return;
        }
        std::error_code err, err_size;
        const auto its   = fs::u8path(path + "/" + name);
        const auto used  = fs::last_write_time(its, err);
        const auto bytes = fs::file_size(its, err_size);
        if (!err && !err_size) {
            files.push_back({ name, used, bytes });
            n_bytes += bytes;
        }
    });
    std::sort(files.begin(), files.end(), [](const entry & a, const entry & b) { return a.used < b.used; });

    std::set<std::string> parents; // of blocks that stay
    for (const auto & [name, used, bytes] : files) {
        if (n_bytes > limit) {
            remove_file(path + "/" + name);
            n_bytes -= bytes;
        } else if (const auto fields = block_fields(name); !fields.empty()) {
            parents.insert(fields[0]);
        }
    }
    for_files([&](const std::string & name) {
        const auto fields = state_fields(name);
        if (!fields.empty() && parents.count(fields[0]) == 0) {
            remove_file(path + "/" + name);
        }
    });
}

} // namespace refreekv
