/* Preloaded into a process, counts the system calls that change files under a folder, and at a chosen one kills the
 * process or makes the call fail. Nothing is imitated: the process really dies there, the file system is the real one. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

enum mode { COUNT, KILL, KILL_HALFWAY, FAIL, FAIL_FROM };

static char folder[4096];
static size_t folder_length;
static long next_call, chosen = -1;
static enum mode mode;
static int error_number, log_file = -1;

/* Watch `path` from now on; what happens at call number `at` is `how`; each call is a line of the file `log`. */
void arm(const char *path, long at, int how, int number, const char *log) {
    folder_length = strlen(path);
    memcpy(folder, path, folder_length + 1);
    next_call = 0, chosen = at, mode = how, error_number = number;
    log_file = syscall(SYS_openat, AT_FDCWD, log, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
}

static void die(void) {
    kill(getpid(), SIGKILL);
    for (;;) pause();
}

/* 0: carry on. 1: fail with errno. 2: do half of it, then die. */
static int meet(const char *call, const char *path) {
    if (!folder_length || strncmp(path, folder, folder_length)) return 0;
    long number = next_call++;
    char line[8192];
    int length = snprintf(line, sizeof line, "%s %s\n", call, path);
    syscall(SYS_write, log_file, line, length);
    if (mode == FAIL_FROM ? number < chosen : number != chosen) return 0;
    if (mode == KILL) die();
    if (mode == KILL_HALFWAY) return 2;
    if (mode == FAIL || mode == FAIL_FROM) {
        errno = error_number;
        return 1;
    }
    return 0;
}

static int meet_file(const char *call, int file) {
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return meet(call, path);
}

static int meet_at(const char *call, int directory, const char *name) {
    char link[64], path[8192];
    if (name[0] == '/' || directory == AT_FDCWD) return meet(call, name);
    snprintf(link, sizeof link, "/proc/self/fd/%d", directory);
    ssize_t length = readlink(link, path, 4096);
    if (length < 0) return 0;
    snprintf(path + length, sizeof path - length, "/%s", name);
    return meet(call, path);
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

ssize_t write(int file, const void *data, size_t size) {
    int verdict = meet_file("write", file);
    if (verdict == 1) return -1;
    ssize_t written = syscall(SYS_write, file, data, verdict == 2 ? size / 2 : size);
    if (verdict == 2) die();
    return written;
}

#define BY_FILE(name) \
    int name(int file) { return meet_file(#name, file) ? -1 : REAL(name)(file); }
BY_FILE(fsync)
BY_FILE(fdatasync)

#define BY_PATH(name) \
    int name(const char *path) { return meet(#name, path) ? -1 : REAL(name)(path); }
BY_PATH(unlink)
BY_PATH(rmdir)

int mkdir(const char *path, mode_t permissions) { return meet("mkdir", path) ? -1 : REAL(mkdir)(path, permissions); }
int rename(const char *from, const char *to) { return meet("rename", to) ? -1 : REAL(rename)(from, to); }
int unlinkat(int directory, const char *path, int flags) {
    return meet_at("unlink", directory, path) ? -1 : REAL(unlinkat)(directory, path, flags);
}

#define OPEN(name) \
    int name(const char *path, int flags, ...) { \
        va_list rest; \
        va_start(rest, flags); \
        int permissions = flags & O_CREAT ? va_arg(rest, int) : 0; \
        va_end(rest); \
        if (flags & O_CREAT && meet("create", path)) return -1; \
        return syscall(SYS_openat, AT_FDCWD, path, flags, permissions); \
    }
OPEN(open)
OPEN(open64)
