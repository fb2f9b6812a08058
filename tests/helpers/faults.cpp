// Lets the n-th call of a kind fail that our own code makes, or that touches a file in one folder: LD_PRELOAD this. tests/tools/faults.py drives
// it. Linux, x86-64 or another system whose calls have these names.
//
// Which code is ours is said by a table of functions: from the nearest caller outwards, those of the C++ library are passed over, and the
// first other one decides. Headers of the C library would declare what is defined here with attributes of their own: few are included.

#include <errno.h>
#include <execinfo.h>
#include <linux/fcntl.h>
#include <sys/syscall.h>

#include <atomic>
#include <cstdarg>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>

extern "C" {
long   syscall(long number, ...);
void * dlsym(void * handle, const char * name);
}

namespace {

enum kind : int { OTHER = 0, OURS = 1, PASSED = 2 };

struct range {
    uintptr_t begin;
    uintptr_t end;
    int64_t   kind;
};

enum what : int { MEMORY = 0, FILES = 1 };

const int SHORT = -1; // reads and writes do a part of what they were asked for

const range * g_ranges   = nullptr; // ascending
size_t        g_n_ranges = 0;

const long N_NOTED = 1 << 20;

char     g_types [N_NOTED]; // of the calls so far
uint64_t g_places[N_NOTED]; // of each, what tells its callers from those of others; only where no call fails

char g_folder[4096] = "";
bool g_is_inside[1 << 12];

std::atomic<int>  g_what { -1 };
std::atomic<long> g_n { 0 };
std::atomic<long> g_count { 0 };
std::atomic<bool> g_all { false };
std::atomic<int>  g_how { 0 };
std::atomic<int>  g_log { -1 };

thread_local bool g_busy = false;

int kind_of(const void * addr) {
    const uintptr_t at = (uintptr_t) addr - 1; // the call lies before what it returns to

    size_t low = 0, high = g_n_ranges; // the first range that begins behind it
    while (low < high) {
        const size_t middle = (low + high)/2;
        if (g_ranges[middle].begin <= at) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    return low > 0 && at < g_ranges[low - 1].end ? (int) g_ranges[low - 1].kind : OTHER;
}

bool is_ours(const void * caller) {
    const int kind = kind_of(caller);
    if (kind != PASSED) {
        return kind == OURS;
    }
    void * frames[32];
    const int n = backtrace(frames, 32);
    for (int i = 0; i < n; ++i) {
        const int its = kind_of(frames[i]);
        if (its != PASSED) {
            return its == OURS;
        }
    }
    return false;
}

// the same for calls that come the same way: a hash of the addresses of the nearest callers
uint64_t place() {
    void * frames[20];
    const int n = backtrace(frames, 20);
    uint64_t res = 14695981039346656037u; // FNV-1a
    for (int i = 0; i < n; ++i) {
        res = (res ^ (uint64_t) frames[i])*1099511628211u;
    }
    return res;
}

// whether this is the call that fails; type: what is called, a letter
bool now(what w, char type) {
    if (g_what != w) {
        return false;
    }
    const long n = ++g_count;
    if (n <= N_NOTED) {
        g_types[n - 1] = type;
        g_places[n - 1] = g_n == 0 ? place() : 0;
    }
    const bool after = g_all && n > g_n && type != 'u'; // what cannot be removed is left, of course
    if (g_n == 0 || (n != g_n && !after)) {
        return false;
    }
    if (n == g_n && g_log >= 0) {
        void * frames[48];
        const int n_frames = backtrace(frames, 48);
        syscall(SYS_write, g_log.load(), frames, n_frames*sizeof(frames[0]));
    }
    return true;
}

bool no_memory(const void * caller) {
    if (g_what != MEMORY || g_busy) {
        return false;
    }
    g_busy = true;
    const bool res = is_ours(caller) && now(MEMORY, 'm');
    g_busy = false;
    return res;
}

bool is_inside(const char * path) {
    return g_folder[0] && path && strncmp(path, g_folder, strlen(g_folder)) == 0;
}

bool is_inside(int fd) {
    return fd >= 0 && fd < (int) sizeof(g_is_inside) && g_is_inside[fd];
}

// a call on such a file fails: sets errno. waits: it may be interrupted
template <typename File>
bool fails(File file, char type, bool waits = false) {
    if (g_what != FILES || g_how == SHORT || (g_how == EINTR && !waits) || !is_inside(file) || !now(FILES, type)) {
        return false;
    }
    errno = g_how;
    return true;
}

// of a read or write
template <typename F>
long transfer(char type, int fd, size_t size, F && f) {
    if (g_what == FILES && is_inside(fd) && now(FILES, type)) {
        if (g_how != SHORT) {
            errno = g_how;
            return -1;
        }
        size = size > 1 ? size/2 : size;
    }
    return f(size);
}

int note(int fd, bool inside) {
    if (fd >= 0 && fd < (int) sizeof(g_is_inside)) {
        g_is_inside[fd] = inside;
    }
    return fd;
}

int open_at(int dir, const char * path, int flags, unsigned mode) {
    const bool inside = is_inside(path);
    if (inside && fails(path, 'o', true)) {
        return -1;
    }
    return note(syscall(SYS_openat, dir, path, flags, mode), inside);
}

void * get(size_t size, const void * caller) {
    void * res = no_memory(caller) ? nullptr : malloc(size ? size : 1);
    if (!res) {
        throw std::bad_alloc();
    }
    return res;
}

} // namespace

#define CALLER __builtin_return_address(0)

void * operator new  (size_t size)                                    { return get(size, CALLER); }
void * operator new[](size_t size)                                    { return get(size, CALLER); }
void * operator new  (size_t size, const std::nothrow_t &) noexcept   { return no_memory(CALLER) ? nullptr : malloc(size ? size : 1); }
void * operator new[](size_t size, const std::nothrow_t &) noexcept   { return no_memory(CALLER) ? nullptr : malloc(size ? size : 1); }

extern "C" {

void * mmap(void * addr, size_t size, int prot, int flags, int fd, long offset) {
    if (no_memory(CALLER)) {
        errno = ENOMEM;
        return (void *) -1;
    }
    return (void *) syscall(SYS_mmap, addr, size, prot, flags, fd, offset);
}

int mprotect(void * addr, size_t size, int prot) {
    if (no_memory(CALLER)) {
        errno = ENOMEM;
        return -1;
    }
    return syscall(SYS_mprotect, addr, size, prot);
}

int pthread_create(void * thread, const void * attributes, void * (*start)(void *), void * arg) {
    using function = int (*)(void *, const void *, void * (*)(void *), void *);
    static const function next = (function) dlsym((void *) -1l, "pthread_create"); // RTLD_NEXT

    return no_memory(CALLER) ? EAGAIN : next(thread, attributes, start, arg);
}

static int open_variadic(int dir, const char * path, int flags, va_list args) {
    const bool makes = (flags & O_CREAT) || (flags & 020200000) == 020200000; // O_TMPFILE
    return open_at(dir, path, flags, makes ? va_arg(args, unsigned) : 0);
}

#define OPEN(name)                                           \
    int name(const char * path, int flags, ...) {            \
        va_list args;                                        \
        va_start(args, flags);                               \
        const int res = open_variadic(AT_FDCWD, path, flags, args); \
        va_end(args);                                        \
        return res;                                          \
    }
OPEN(open)
OPEN(open64)

#define OPENAT(name)                                         \
    int name(int dir, const char * path, int flags, ...) {   \
        va_list args;                                        \
        va_start(args, flags);                               \
        const int res = open_variadic(dir, path, flags, args); \
        va_end(args);                                        \
        return res;                                          \
    }
OPENAT(openat)
OPENAT(openat64)

int mkstemp(char * path) {
    using function = int (*)(char *);
    static const function next = (function) dlsym((void *) -1l, "mkstemp");

    return fails((const char *) path, 'o') ? -1 : note(next(path), is_inside(path));
}

int close(int fd) {
    note(fd, false);
    return syscall(SYS_close, fd);
}

long read(int fd, void * data, size_t size) {
    return transfer('r', fd, size, [&](size_t n) { return syscall(SYS_read, fd, data, n); });
}
long write(int fd, const void * data, size_t size) {
    return transfer('w', fd, size, [&](size_t n) { return syscall(SYS_write, fd, data, n); });
}
long pread(int fd, void * data, size_t size, long offset) {
    return transfer('r', fd, size, [&](size_t n) { return syscall(SYS_pread64, fd, data, n, offset); });
}
long pread64(int fd, void * data, size_t size, long offset) {
    return transfer('r', fd, size, [&](size_t n) { return syscall(SYS_pread64, fd, data, n, offset); });
}
long pwrite(int fd, const void * data, size_t size, long offset) {
    return transfer('w', fd, size, [&](size_t n) { return syscall(SYS_pwrite64, fd, data, n, offset); });
}
long pwrite64(int fd, const void * data, size_t size, long offset) {
    return transfer('w', fd, size, [&](size_t n) { return syscall(SYS_pwrite64, fd, data, n, offset); });
}

struct io_vector {
    void * base;
    size_t size;
};
static long read_vectors(int fd, const io_vector * to, int n, long offset, int flags) {
    if (g_how == SHORT) { // it means that the rest is not in memory
        return syscall(SYS_preadv2, fd, to, n, offset, 0, flags);
    }
    return transfer('n', fd, to->size, [&](size_t size) {
        const io_vector one = { to->base, size };
        return syscall(SYS_preadv2, fd, n == 1 ? &one : to, n, offset, 0, flags);
    });
}
long preadv2  (int fd, const io_vector * to, int n, long offset, int flags) { return read_vectors(fd, to, n, offset, flags); }
long preadv64v2(int fd, const io_vector * to, int n, long offset, int flags) { return read_vectors(fd, to, n, offset, flags); }

int ftruncate  (int fd, long size) { return fails(fd, 't') ? -1 : syscall(SYS_ftruncate, fd, size); }
int ftruncate64(int fd, long size) { return fails(fd, 't') ? -1 : syscall(SYS_ftruncate, fd, size); }
int fsync      (int fd)            { return fails(fd, 's') ? -1 : syscall(SYS_fsync, fd); }

int rename(const char * from, const char * to) {
    return fails(from, 'm') ? -1 : syscall(SYS_renameat2, AT_FDCWD, from, AT_FDCWD, to, 0);
}
int unlink(const char * path) {
    return fails(path, 'u') ? -1 : syscall(SYS_unlinkat, AT_FDCWD, path, 0);
}
int mkdir(const char * path, unsigned mode) {
    return fails(path, 'd') ? -1 : syscall(SYS_mkdirat, AT_FDCWD, path, mode);
}

// for tests/tools/faults.py

// 1: ours; 2: passed over, as the C++ library is
void faults_table(const range * ranges, size_t n) {
    g_ranges   = ranges;
    g_n_ranges = n;
}

// of files that may fail
void faults_folder(const char * path) {
    strncpy(g_folder, path, sizeof(g_folder) - 1);
}

// From now on the n-th call fails (0: none), and all after it if `all`. what: memory and threads (0), or files (1). how: errno of a file's; -1: it does
// a part. log: the file that gets the addresses of its callers
void faults_arm(int what, long n, int how, bool all, int log) {
    void * frames[4];
    backtrace(frames, 4); // it allocates the first time
    g_count = 0;
    g_n     = n;
    g_how   = how;
    g_all   = all;
    g_log   = log;
    g_what  = what;
}

// a letter for each of these calls
const char * faults_types() {
    return g_types;
}

// and a number for each; they are the same where the callers are
const uint64_t * faults_places() {
    return g_places;
}

// how many calls there were since then
long faults_disarm() {
    g_what = -1;
    return g_count;
}

}
