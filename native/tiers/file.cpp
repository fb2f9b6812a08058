#include "tiers/file.h"

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <new>
#include <stdexcept>

#if defined(_WIN32)
#define WIN32_LEAN_AND_MEAN
#ifndef NOMINMAX
#define NOMINMAX
#endif
#include <windows.h>
#include <winioctl.h>
#include <fcntl.h>
#include <direct.h>
#include <io.h>
#include <share.h>
#include <sys/stat.h>
#include <mutex>
#include <random>
#else
#include <dirent.h>
#include <fcntl.h>
#include <signal.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>
#include <cstdlib>
#endif

namespace refreekv {

static int     open_unnamed(const std::string & dir); // -1: errno says why not
static int     open_path(const std::string & path, bool is_new, bool own);
static bool    set_file_size(int fd);
static int64_t file_size(int fd);
static int64_t write_at(int fd, const void * data, size_t size, uint64_t offset);
static int64_t read_at(int fd, void * data, size_t size, uint64_t offset);
static int64_t read_now(int fd, void * data, size_t size, uint64_t offset); // without waiting; or one of these:
static void    close_file(int fd);
static bool    make_one_folder(const std::string & path);

static const int64_t REFREEKV_NOT_NOW = -2; // it would have to wait; the system has been asked for the bytes
static const int64_t REFREEKV_NO_SUCH = -3; // the system or the file system has no such read

std::unique_ptr<file> file::of(int fd) {
    if (fd < 0) {
        return nullptr;
    }
    std::unique_ptr<file> res(new (std::nothrow) file(fd));
    if (!res) {
        close_file(fd);
        errno = ENOMEM;
    }
    return res;
}

std::unique_ptr<file> file::make_unnamed(const std::string & dir) {
    return of(open_unnamed(dir));
}

std::unique_ptr<file> file::make(const std::string & path) {
    return of(open_path(path, true, true));
}

std::unique_ptr<file> file::open(const std::string & path, bool own) {
    return of(open_path(path, false, own));
}

file::~file() {
    close_file(fd);
}

bool file::write(uint64_t offset, const void * data, size_t size) {
    for (const char * src = (const char *) data; size > 0;) {
        const int64_t n = write_at(fd, src, size, offset);
        if (n <= 0) {
            return false;
        }
        src    += n;
        offset += n;
        size   -= n;
    }
    return true;
}

bool file::read(uint64_t offset, void * data, size_t size) const {
    for (char * dst = (char *) data; size > 0;) {
        const int64_t n = read_at(fd, dst, size, offset);
        if (n <= 0) {
            return false;
        }
        dst    += n;
        offset += n;
        size   -= n;
    }
    return true;
}

file::result file::try_read(uint64_t offset, void * data, size_t size) const {
    const int64_t n = read_now(fd, data, size, offset);

    return n == (int64_t) size ? THERE : n == REFREEKV_NOT_NOW ? LATE : read(offset, data, size) ? THERE : LOST;
}

void make_folder(const std::string & path) {
    namespace fs = std::filesystem;

    std::error_code err;
    fs::create_directories((fs::u8path(path)/".").parent_path().parent_path(), err);
    if (!make_one_folder(path) || !fs::is_directory(fs::u8path(path), err)) {
        throw std::runtime_error(path + ": " + (errno == EEXIST ? "it is not a folder" : strerror(errno)));
    }
}

int64_t file::size() const {
    return file_size(fd);
}

bool file::empty() {
    return set_file_size(fd);
}

#if defined(_WIN32)

// of UTF-8
static std::wstring wide(const std::string & path) {
    std::wstring res(path.size(), L'\0');
    res.resize(MultiByteToWideChar(CP_UTF8, 0, path.data(), (int) path.size(), &res[0], (int) res.size()));

    return res;
}

static int open_path(const std::string & path, bool is_new, bool) {
    int fd = -1;
    errno = _wsopen_s(&fd, wide(path).c_str(), _O_BINARY | _O_NOINHERIT | (is_new ? _O_RDWR | _O_CREAT | _O_EXCL : _O_RDONLY), _SH_DENYNO, _S_IREAD | _S_IWRITE);

    return errno == 0 ? fd : -1;
}

static int64_t file_size(int fd) {
    return _filelengthi64(fd);
}

void remove_file(const std::string & path) {
    _wremove(wide(path).c_str());
}

static int open_unnamed(const std::string & dir) {
    const std::wstring name = L"\\refreekv-" + std::to_wstring(std::random_device{}()) + L".cold";

    int fd = -1;
    // deleted when it is closed, which the system does for a process that dies
    errno = _wsopen_s(&fd, (wide(dir) + name).c_str(), _O_RDWR | _O_CREAT | _O_EXCL | _O_BINARY | _O_TEMPORARY | _O_NOINHERIT, _SH_DENYRW, _S_IREAD | _S_IWRITE);

    if (errno != 0) {
        return -1;
    }

    DWORD n = 0; // what was not written takes no room
    DeviceIoControl((HANDLE) _get_osfhandle(fd), FSCTL_SET_SPARSE, nullptr, 0, nullptr, 0, &n, nullptr);

    return fd;
}

std::vector<std::string> list_folder(const std::string & path) {
    namespace fs = std::filesystem;

    std::vector<std::string> res;

    std::error_code err;
    for (fs::directory_iterator it(fs::u8path(path), err), end; !err && it != end; it.increment(err)) {
        try {
            res.push_back(it->path().filename().u8string());
        } catch (const std::system_error &) {
            // its name is no text, and none of ours
        }
    }
    return res;
}

static bool make_one_folder(const std::string & path) {
    return _wmkdir(wide(path).c_str()) == 0 || errno == EEXIST;
}

int64_t process_id() {
    return GetCurrentProcessId();
}

bool process_runs(int64_t id) {
    const HANDLE process = OpenProcess(PROCESS_QUERY_LIMITED_INFORMATION, FALSE, (DWORD) id);
    if (!process) {
        return GetLastError() == ERROR_ACCESS_DENIED;
    }
    CloseHandle(process);

    return true;
}

std::string host_name() {
    char  res[MAX_COMPUTERNAME_LENGTH + 1] = {};
    DWORD n = sizeof(res);
    GetComputerNameA(res, &n);

    return res;
}

static bool set_file_size(int fd) {
    return _chsize_s(fd, 0) == 0;
}

// where it is read and written next is the file's, not the call's, and several threads read
static std::mutex g_at;

static int64_t write_at(int fd, const void * data, size_t size, uint64_t offset) {
    std::lock_guard<std::mutex> lock(g_at);

    return _lseeki64(fd, offset, SEEK_SET) < 0 ? -1 : _write(fd, data, (unsigned) std::min<size_t>(size, 1 << 30));
}

static int64_t read_at(int fd, void * data, size_t size, uint64_t offset) {
    std::lock_guard<std::mutex> lock(g_at);

    return _lseeki64(fd, offset, SEEK_SET) < 0 ? -1 : _read(fd, data, (unsigned) std::min<size_t>(size, 1 << 30));
}

static int64_t read_now(int, void *, size_t, uint64_t) {
    return REFREEKV_NO_SUCH;
}

static void close_file(int fd) {
    _close(fd);
}

#else

template <typename F>
static int64_t repeat_interrupted(F && f) {
    int64_t n;
    do {
        n = f();
    } while (n < 0 && errno == EINTR);

    return n;
}

static int open_unnamed(const std::string & dir) {
#if defined(O_TMPFILE)
    const int res = repeat_interrupted([&]() { return ::open(dir.c_str(), O_TMPFILE | O_RDWR | O_CLOEXEC, 0600); });
    if (res >= 0) {
        return res;
    }
#endif
    // file systems that cannot: it has a name for a moment
    std::string path = dir + "/refreekv-XXXXXX";

    const int fd = mkstemp(&path[0]);
    if (fd >= 0) {
        unlink(path.c_str());
        fcntl(fd, F_SETFD, FD_CLOEXEC);
    }
    return fd;
}

// Whether it is a file of this user's with one name, and not what somebody else has put in its place: a link, a pipe, a device
static bool is_own(int fd) {
    struct stat info;
    return fstat(fd, &info) == 0 && S_ISREG(info.st_mode) && info.st_nlink <= 1 && (info.st_uid == geteuid() || info.st_uid == 0);
}

static int open_path(const std::string & path, bool is_new, bool own) {
    if (is_new) {
        return repeat_interrupted([&]() { return ::open(path.c_str(), O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600); });
    }
    // a pipe would wait for its writer
    const int fd = repeat_interrupted([&]() { return ::open(path.c_str(), O_RDONLY | O_NONBLOCK | O_CLOEXEC | (own ? O_NOFOLLOW : 0)); });
    if (fd < 0 || !own || is_own(fd)) {
        return fd;
    }
    close(fd);
    errno = EPERM;

    return -1;
}

static int64_t file_size(int fd) {
    struct stat info;
    return fstat(fd, &info) == 0 ? (int64_t) info.st_size : -1;
}

void remove_file(const std::string & path) {
    unlink(path.c_str());
}

std::vector<std::string> list_folder(const std::string & path) {
    std::vector<std::string> res;

    const std::unique_ptr<DIR, int (*)(DIR *)> dir(opendir(path.c_str()), closedir);
    while (const dirent * entry = dir ? readdir(dir.get()) : nullptr) {
        res.push_back(entry->d_name);
    }
    return res;
}

static bool make_one_folder(const std::string & path) {
    return mkdir(path.c_str(), 0700) == 0 || errno == EEXIST;
}

int64_t process_id() {
    return getpid();
}

bool process_runs(int64_t id) {
    return kill((pid_t) id, 0) == 0 || errno == EPERM;
}

std::string host_name() {
    char res[256] = {};
    gethostname(res, sizeof(res) - 1);

    return res;
}

static bool set_file_size(int fd) {
    return ftruncate(fd, 0) == 0;
}

static int64_t write_at(int fd, const void * data, size_t size, uint64_t offset) {
    return repeat_interrupted([&]() { return pwrite(fd, data, size, offset); });
}

static int64_t read_at(int fd, void * data, size_t size, uint64_t offset) {
    return repeat_interrupted([&]() { return pread(fd, data, size, offset); });
}

static int64_t read_now(int fd, void * data, size_t size, uint64_t offset) {
#if defined(RWF_NOWAIT)
    static std::atomic<bool> none { false };

    if (!none) {
        iovec to = { data, size };

        const int64_t n = repeat_interrupted([&]() { return preadv2(fd, &to, 1, offset, RWF_NOWAIT); });

        if ((n < 0 && errno == EAGAIN) || (n > 0 && n < (int64_t) size)) {
            posix_fadvise(fd, offset, size, POSIX_FADV_WILLNEED);
            return REFREEKV_NOT_NOW;
        }
        if (n >= 0) {
            return n;
        }
        none = errno == EOPNOTSUPP || errno == ENOSYS || errno == EINVAL;
    }
#endif
    return REFREEKV_NO_SUCH;
}

static void close_file(int fd) {
    close(fd);
}

#endif

} // namespace refreekv
