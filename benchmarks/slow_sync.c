/* A disk whose every sync takes some milliseconds more, for programs that are started with LD_PRELOAD.

   cc -shared -fPIC -O2 -o slow_sync.so slow_sync.c -ldl;  SLOW_SYNC_US=4000 LD_PRELOAD=./slow_sync.so program */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <unistd.h>

static void wait_as_a_slow_disk(void) {
    const char *text = getenv("SLOW_SYNC_US");
    if (text) usleep((useconds_t)atoi(text));
}

int fsync(int fd) {
    static int (*real)(int);
    if (!real) real = (int (*)(int))dlsym(RTLD_NEXT, "fsync");
    wait_as_a_slow_disk();
    return real(fd);
}

int fdatasync(int fd) {
    static int (*real)(int);
    if (!real) real = (int (*)(int))dlsym(RTLD_NEXT, "fdatasync");
    wait_as_a_slow_disk();
    return real(fd);
}
