#include "tiers/cold-store.h"

#include "api/process.h"

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <stdexcept>

#if defined(_WIN32)
#define WIN32_LEAN_AND_MEAN
#ifndef NOMINMAX
#define NOMINMAX
#endif
#include <windows.h>
#include <winioctl.h>
#include <fcntl.h>
#include <io.h>
#include <share.h>
#include <sys/stat.h>
#include <mutex>
#include <random>
#else
#include <fcntl.h>
#include <sys/uio.h>
#include <unistd.h>
#include <cstdlib>
#endif

namespace refreekv {

static const uint64_t REFREEKV_COLD_PAGE = 16 << 20; // as it is touched; the system has pages of 2 MiB for such

// a file without a name; -1: errno says why not
static int     open_unnamed(const std::string & dir);
static bool    set_file_size(int fd);
static int64_t write_at(int fd, const void * data, size_t size, uint64_t offset);
static int64_t read_at(int fd, void * data, size_t size, uint64_t offset);
static int64_t read_now(int fd, void * data, size_t size, uint64_t offset); // without waiting; or one of these:
static void    close_file(int fd);
static int64_t process_id();

static const int64_t REFREEKV_NOT_NOW = -2; // it would have to wait; the system has been asked for the bytes
static const int64_t REFREEKV_NO_SUCH = -3; // the system or the file system has no such read

cold_store::cold_store() = default;

cold_store::cold_store(const std::string & dir) : fd(open_unnamed(dir)), owner(process_id()) {
    if (fd < 0) {
        throw std::runtime_error("cold store: no file can be made in " + dir + ": " + strerror(errno));
    }
}

cold_store::~cold_store() {
    if (fd >= 0) {
        close_file(fd);
    }
}

bool cold_store::write(uint64_t offset, const void * data, size_t size) {
    if (cold_failure.now() || (fd >= 0 && process_id() != owner)) {
        return false;
    }

    const char * src = (const char *) data;

    while (size > 0) {
        int64_t n;

        if (fd >= 0) {
            n = write_at(fd, src, size, offset);
            if (n <= 0) {
                return false;
            }
        } else {
            char * page = page_at(offset);
            if (!page) {
                return false;
            }
            n = std::min<uint64_t>(size, REFREEKV_COLD_PAGE - offset%REFREEKV_COLD_PAGE);
            memcpy(page + offset%REFREEKV_COLD_PAGE, src, n);
        }

        src    += n;
        offset += n;
        size   -= n;
    }

    return true;
}

char * cold_store::page_at(uint64_t offset) {
    std::lock_guard<std::mutex> lock(pages_mutex);

    auto & page = pages[offset/REFREEKV_COLD_PAGE];
    if (!page) {
        page = pages_alloc(REFREEKV_COLD_PAGE);
    }

    return (char *) page.get();
}

bool cold_store::readable() const {
    return fd < 0 || process_id() == owner;
}

bool cold_store::get(uint64_t offset, void * data, size_t size) const {
    char * dst = (char *) data;

    while (size > 0) {
        int64_t n;

        if (fd >= 0) {
            n = read_at(fd, dst, size, offset);
            if (n <= 0) {
                return false;
            }
        } else {
            const auto it = pages.find(offset/REFREEKV_COLD_PAGE);
            if (it == pages.end() || !it->second) {
                return false;
            }
            n = std::min<uint64_t>(size, REFREEKV_COLD_PAGE - offset%REFREEKV_COLD_PAGE);
            memcpy(dst, (const char *) it->second.get() + offset%REFREEKV_COLD_PAGE, n);
        }

        dst    += n;
        offset += n;
        size   -= n;
    }

    return true;
}

cold_store::result cold_store::try_read(uint64_t offset, void * data, size_t size) const {
    if (fd >= 0) {
        const int64_t n = read_now(fd, data, size, offset);
        if (n == (int64_t) size) {
            return THERE;
        }
        if (n == REFREEKV_NOT_NOW) {
            return LATE;
        }
    }
    return get(offset, data, size) ? THERE : LOST;
}

void cold_store::clear() {
    pages.clear();
    if (fd >= 0 && process_id() == owner) {
        set_file_size(fd); // where it cannot, the room comes back at the end
    }
}

#if defined(_WIN32)

static int open_unnamed(const std::string & dir) {
    const std::wstring name = L"\\refreekv-" + std::to_wstring(std::random_device{}()) + L".cold";

    std::wstring path(dir.size(), L'\0'); // dir is UTF-8
    path.resize(MultiByteToWideChar(CP_UTF8, 0, dir.data(), (int) dir.size(), &path[0], (int) path.size()));

    int fd = -1;
    // deleted when it is closed, which the system does for a process that dies
    errno = _wsopen_s(&fd, (path + name).c_str(), _O_RDWR | _O_CREAT | _O_EXCL | _O_BINARY | _O_TEMPORARY | _O_NOINHERIT, _SH_DENYRW, _S_IREAD | _S_IWRITE);

    if (errno != 0) {
        return -1;
    }

    DWORD n = 0; // what was not written takes no room
    DeviceIoControl((HANDLE) _get_osfhandle(fd), FSCTL_SET_SPARSE, nullptr, 0, nullptr, 0, &n, nullptr);

    return fd;
}

static int64_t process_id() {
    return 0; // there is no fork
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

static int open_unnamed(const std::string & dir) {
#if defined(O_TMPFILE)
    const int res = open(dir.c_str(), O_TMPFILE | O_RDWR | O_CLOEXEC, 0600);
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

static int64_t process_id() {
    return getpid();
}

static bool set_file_size(int fd) {
    return ftruncate(fd, 0) == 0;
}

template <typename F>
static int64_t repeat_interrupted(F && f) {
    int64_t n;
    do {
        n = f();
    } while (n < 0 && errno == EINTR);

    return n;
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
