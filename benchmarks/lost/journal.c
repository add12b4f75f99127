/* Preloaded into a process: writes down what it does to files under $LOST_ROOT, in $LOST_JOURNAL, and lets some of it
 * fail: $LOST_FAIL = "SEED FROM UNTIL PER_MILLE", of the changes counted from the start.
 *
 * A record: a kind, four 64-bit numbers (offset, lengths of two paths and of the data), then these. One lock is held over
 * each change and its record, so that the journal has the order in which the changes were made. An attempt to open
 * /lost-mark/NAME fails, and is written down: so a program says how far it is.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#define REAL(name) ((__typeof__(&name))real(#name))
#define PATH (2 * PATH_MAX)

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static int journal = -1;
static char root[PATH_MAX];
static unsigned seed;
static long from, until, per_mille, changes;

static void *real(const char *name) { return dlsym(RTLD_NEXT, name); }

__attribute__((constructor)) static void start(void) {
    const char *file = getenv("LOST_JOURNAL"), *where = getenv("LOST_ROOT"), *fail = getenv("LOST_FAIL");
    if (!file || !where || !realpath(where, root)) return;
    journal = syscall(SYS_openat, AT_FDCWD, file, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0666);
    if (fail) sscanf(fail, "%u %ld %ld %ld", &seed, &from, &until, &per_mille);
}

static int inside(const char *path) {
    size_t length = strlen(root);
    return journal >= 0 && !strncmp(path, root, length) && (!path[length] || path[length] == '/');
}

/* The path of a descriptor as it is now. */
static int path_of(int fd, char *out) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, out, PATH - 1);
    out[length < 0 ? 0 : length] = 0;
    return length > 0 && inside(out);
}

static int at(int directory, const char *path, char *out) {
    out[0] = 0;
    if (journal < 0 || !path) return 0;
    if (path[0] == '/') {
        snprintf(out, PATH, "%s", path);
    } else {
        if (directory == AT_FDCWD) {
            if (!getcwd(out, PATH_MAX)) return 0;
        } else {
            path_of(directory, out);
        }
        size_t length = strlen(out);
        snprintf(out + length, PATH - length, "/%s", path);
    }
    return inside(out);
}

static void record(char kind, int64_t offset, const char *one, const char *two, const void *data, size_t size) {
    char head[33] = {kind};
    int64_t numbers[4] = {offset, strlen(one), two ? strlen(two) : 0, size};
    memcpy(head + 1, numbers, sizeof numbers);
    struct iovec parts[4] = {{head, 33}, {(void *)one, numbers[1]}, {(void *)two, numbers[2]}, {(void *)data, size}};
    if (syscall(SYS_writev, journal, parts, 4) != (ssize_t)(33 + numbers[1] + numbers[2] + size)) abort();
}

/* 0, or an error; -1 for half a write. */
static int failing(int write) {
    long number = changes++;
    if (number < from || number >= until || rand_r(&seed) % 1000 >= per_mille) return 0;
    int kind = rand_r(&seed) % (write ? 3 : 2);
    return kind == 0 ? ENOSPC : kind == 1 ? EIO : -1;
}

#define FAIL_OR(call, write)                       \
    ({                                             \
        int error = failing(write);                \
        if (error > 0) errno = error;              \
        error > 0 ? -1 : (call);                   \
    })

/* What was written is read again: whoever asked for it may have handed over a file or many pieces. */
static void record_range(int fd, const char *path, off_t offset, ssize_t size) {
    if (size <= 0) return;
    char *data = malloc(size);
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    int again = syscall(SYS_openat, AT_FDCWD, link, O_RDONLY | O_CLOEXEC, 0);
    if (again < 0 || syscall(SYS_pread64, again, data, size, offset) != size) abort();
    syscall(SYS_close, again);
    record('w', offset, path, 0, data, size);
    free(data);
}

#define WRITE(fd, position, call, half)                                                    \
    do {                                                                                   \
        char path[PATH];                                                                   \
        if (journal < 0 || !path_of(fd, path)) return call;                                \
        pthread_mutex_lock(&lock);                                                         \
        path_of(fd, path);                                                                 \
        int error = failing(1);                                                            \
        ssize_t done = -1;                                                                 \
        if (error > 0) {                                                                   \
            errno = error;                                                                 \
        } else {                                                                           \
            done = error ? half : call;                                                    \
            int kept = errno;                                                              \
            off_t where = (position);                                                      \
            record_range(fd, path, where < 0 ? lseek(fd, 0, SEEK_CUR) - done : where, done);   \
            errno = kept;                                                                  \
        }                                                                                  \
        pthread_mutex_unlock(&lock);                                                       \
        return done;                                                                       \
    } while (0)

ssize_t write(int fd, const void *data, size_t size) {
    WRITE(fd, -1, REAL(write)(fd, data, size), REAL(write)(fd, data, (size + 1) / 2));
}
ssize_t pwrite(int fd, const void *data, size_t size, off_t offset) {
    WRITE(fd, offset, REAL(pwrite)(fd, data, size, offset), REAL(pwrite)(fd, data, (size + 1) / 2, offset));
}
ssize_t pwrite64(int fd, const void *data, size_t size, off64_t offset) { return pwrite(fd, data, size, offset); }
ssize_t writev(int fd, const struct iovec *parts, int count) {
    WRITE(fd, -1, REAL(writev)(fd, parts, count), REAL(write)(fd, parts->iov_base, parts->iov_len));
}
ssize_t pwritev(int fd, const struct iovec *parts, int count, off_t offset) {
    WRITE(fd, offset, REAL(pwritev)(fd, parts, count, offset), REAL(pwrite)(fd, parts->iov_base, parts->iov_len, offset));
}
ssize_t pwritev64(int fd, const struct iovec *parts, int count, off64_t o) { return pwritev(fd, parts, count, o); }
ssize_t sendfile(int fd, int in, off_t *offset, size_t size) {
    WRITE(fd, -1, REAL(sendfile)(fd, in, offset, size), REAL(sendfile)(fd, in, offset, (size + 1) / 2));
}
ssize_t sendfile64(int fd, int in, off64_t *offset, size_t size) { return sendfile(fd, in, (off_t *)offset, size); }
ssize_t copy_file_range(int in, off64_t *begin, int fd, off64_t *to, size_t size, unsigned flags) {
    off_t start = to ? *to : -1;
    WRITE(fd, start, REAL(copy_file_range)(in, begin, fd, to, size, flags),
          REAL(copy_file_range)(in, begin, fd, to, (size + 1) / 2, flags));
}

static int opened(const char *name, int directory, const char *path, int flags, mode_t mode) {
    char whole[PATH];
    int (*call)(int, const char *, int, ...) = real(name);
    if (path && journal >= 0 && !strncmp(path, "/lost-mark/", 11)) {
        record('!', 0, path + 11, 0, 0, 0);
        errno = ENOENT;
        return -1;
    }
    if (!(flags & (O_CREAT | O_TRUNC)) || !at(directory, path, whole)) return call(directory, path, flags, mode);
    struct stat before;
    pthread_mutex_lock(&lock);
    int there = !stat(whole, &before);
    int fd = FAIL_OR(call(directory, path, flags, mode), 0);
    if (fd >= 0 && !there) record('c', 0, whole, 0, 0, 0);
    if (fd >= 0 && there && flags & O_TRUNC) record('t', 0, whole, 0, 0, 0);
    pthread_mutex_unlock(&lock);
    return fd;
}

#define OPEN(name, directory_parameter, directory, through)                        \
    int name(directory_parameter const char *path, int flags, ...) {               \
        va_list rest;                                                              \
        va_start(rest, flags);                                                     \
        mode_t mode = flags & (O_CREAT | __O_TMPFILE) ? va_arg(rest, mode_t) : 0;  \
        va_end(rest);                                                              \
        return opened(through, directory, path, flags, mode);                      \
    }
#define COMMA ,
OPEN(open, , AT_FDCWD, "openat")
OPEN(open64, , AT_FDCWD, "openat64")
OPEN(openat, int directory COMMA, directory, "openat")
OPEN(openat64, int directory COMMA, directory, "openat64")
int creat(const char *path, mode_t mode) { return open(path, O_CREAT | O_WRONLY | O_TRUNC, mode); }
int creat64(const char *path, mode_t mode) { return creat(path, mode); }

/* A change of one name, or of two. */
#define CHANGE(kind, first, second, offset, call)                \
    do {                                                         \
        char one[PATH], two[PATH] = "";                          \
        int ours = (first);                                      \
        ours |= (second);                                        \
        if (!ours) return call;                                  \
        pthread_mutex_lock(&lock);                               \
        int done = FAIL_OR(call, 0), kept = errno;               \
        if (!done) record(kind, offset, one, two, 0, 0);         \
        pthread_mutex_unlock(&lock);                             \
        errno = kept;                                            \
        return done;                                             \
    } while (0)

int renameat2(int a, const char *x, int b, const char *y, unsigned flags) {
    CHANGE('r', at(a, x, one), at(b, y, two), 0, REAL(renameat2)(a, x, b, y, flags));
}
int renameat(int a, const char *x, int b, const char *y) { return renameat2(a, x, b, y, 0); }
int rename(const char *x, const char *y) { return renameat2(AT_FDCWD, x, AT_FDCWD, y, 0); }
int linkat(int a, const char *x, int b, const char *y, int flags) {
    CHANGE('l', at(a, x, one), at(b, y, two), 0, REAL(linkat)(a, x, b, y, flags));
}
int link(const char *x, const char *y) { return linkat(AT_FDCWD, x, AT_FDCWD, y, 0); }
int unlinkat(int a, const char *x, int flags) { CHANGE('u', at(a, x, one), 0, 0, REAL(unlinkat)(a, x, flags)); }
int unlink(const char *x) { return unlinkat(AT_FDCWD, x, 0); }
int rmdir(const char *x) { return unlinkat(AT_FDCWD, x, AT_REMOVEDIR); }
int remove(const char *x) { return unlink(x) && errno == EISDIR ? rmdir(x) : 0; }
int mkdirat(int a, const char *x, mode_t mode) { CHANGE('m', at(a, x, one), 0, 0, REAL(mkdirat)(a, x, mode)); }
int mkdir(const char *x, mode_t mode) { return mkdirat(AT_FDCWD, x, mode); }
int ftruncate(int fd, off_t size) { CHANGE('t', path_of(fd, one), 0, size, REAL(ftruncate)(fd, size)); }
int ftruncate64(int fd, off64_t size) { return ftruncate(fd, size); }
int truncate(const char *x, off_t size) { CHANGE('t', at(AT_FDCWD, x, one), 0, size, REAL(truncate)(x, size)); }
int truncate64(const char *x, off64_t size) { return truncate(x, size); }
int fsync(int fd) { CHANGE('s', path_of(fd, one), 0, 0, REAL(fsync)(fd)); }
int fdatasync(int fd) { CHANGE('s', path_of(fd, one), 0, 0, REAL(fdatasync)(fd)); }
