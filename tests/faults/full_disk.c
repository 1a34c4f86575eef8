/* Preloaded into a process: from the N-th call on that puts something into a folder, its disk is full.
 *
 * `arm` is called by the test, in the process; calls on other files, and all before, pass unchanged. A write that
 * meets the limit may put a part of its bytes on the disk first, as a real one does.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static char below[PATH_MAX];
static long calls, limit = LONG_MAX;

void arm(const char *folder, long first_to_fail) {
    snprintf(below, sizeof below, "%s", folder);
    calls = 0;
    limit = first_to_fail;
}

long calls_made(void) { return calls; }

static int is_full(const char *path) {
    size_t length = strlen(below);
    if (!length || strncmp(path, below, length)) return 0;
    return ++calls >= limit;
}

static int is_full_fd(int fd) {
    char link[64], path[PATH_MAX];
    if (!below[0]) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return is_full(path);
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define FAIL return errno = ENOSPC, -1

ssize_t write(int fd, const void *data, size_t size) {
    if (is_full_fd(fd)) {
        if (calls == limit && size > 1) return REAL(write)(fd, data, size / 2);
        FAIL;
    }
    return REAL(write)(fd, data, size);
}

ssize_t writev(int fd, const struct iovec *parts, int count) {
    if (is_full_fd(fd)) FAIL;
    return REAL(writev)(fd, parts, count);
}

ssize_t pwrite(int fd, const void *data, size_t size, off_t at) {
    if (is_full_fd(fd)) FAIL;
    return REAL(pwrite)(fd, data, size, at);
}

ssize_t pwrite64(int fd, const void *data, size_t size, off64_t at) {
    if (is_full_fd(fd)) FAIL;
    return REAL(pwrite64)(fd, data, size, at);
}

int fsync(int fd) {
    if (is_full_fd(fd)) FAIL;
    return REAL(fsync)(fd);
}

int ftruncate64(int fd, off64_t size) {
    if (is_full_fd(fd)) FAIL;
    return REAL(ftruncate64)(fd, size);
}

int mkdir(const char *path, mode_t mode) {
    if (is_full(path)) FAIL;
    return REAL(mkdir)(path, mode);
}

int rename(const char *from, const char *to) {
    if (is_full(to)) FAIL;
    return REAL(rename)(from, to);
}

#define OPENS(name)                                                    \
    int name(const char *path, int flags, ...) {                       \
        mode_t mode = 0;                                               \
        if (flags & O_CREAT) {                                         \
            va_list more;                                              \
            va_start(more, flags);                                     \
            mode = va_arg(more, mode_t);                               \
            va_end(more);                                              \
            if (access(path, F_OK) && is_full(path)) FAIL;             \
        }                                                              \
        return REAL(name)(path, flags, mode);                          \
    }
OPENS(open)
OPENS(open64)
