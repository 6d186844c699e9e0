// Preloaded into a broker: while the file named by FAILING_SYNC exists, fsync and fdatasync of files whose path ends as
// its content says fail as they do on a disk that is broken. An empty content means every file.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static bool fails(int descriptor) {
    const char *flag = getenv("FAILING_SYNC");
    int file = flag ? open(flag, O_RDONLY | O_CLOEXEC) : -1;
    if (file < 0) return false;
    char end[64], link[32], path[4096];
    ssize_t wanted = read(file, end, sizeof end);
    close(file);
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t length = readlink(link, path, sizeof path);
    return wanted >= 0 && length >= wanted && memcmp(path + length - wanted, end, (size_t)wanted) == 0;
}

static int synced(const char *name, int descriptor) {
    if (fails(descriptor)) {
        errno = EIO;
        return -1;
    }
    int (*real)(int) = (int (*)(int))dlsym(RTLD_NEXT, name);
    return real(descriptor);
}

int fsync(int descriptor) { return synced("fsync", descriptor); }
int fdatasync(int descriptor) { return synced("fdatasync", descriptor); }
