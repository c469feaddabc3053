/* Preloaded into the job's processes (ld.so(8), LD_PRELOAD): a disk that fails and a clock that jumps.

   TORTURE_IO is "RATE_PER_MILLION FOLDER": so often a write or fsync of a file below FOLDER fails with EIO or ENOSPC.
   TORTURE_CLOCK is "BEFORE AFTER WHEN": seconds added to the wall clock before and after the true time WHEN. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/time.h>
#include <sys/types.h>
#include <time.h>
#include <unistd.h>

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

static int (*true_clock_gettime)(clockid_t, struct timespec *);

static long jump(void) {
  const char *setting = getenv("TORTURE_CLOCK");
  long before, after;
  double when;
  struct timespec now;
  if (setting == NULL || sscanf(setting, "%ld %ld %lf", &before, &after, &when) != 3) return 0;
  true_clock_gettime(CLOCK_REALTIME, &now);
  return now.tv_sec < when ? before : after;
}

int clock_gettime(clockid_t clock, struct timespec *spec) {
  if (true_clock_gettime == NULL) true_clock_gettime = dlsym(RTLD_NEXT, "clock_gettime");
  int result = true_clock_gettime(clock, spec);
  if (result == 0 && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) spec->tv_sec += jump();
  return result;
}

time_t time(time_t *place) {
  struct timespec now;
  clock_gettime(CLOCK_REALTIME, &now);
  if (place != NULL) *place = now.tv_sec;
  return now.tv_sec;
}

int gettimeofday(struct timeval *restrict value, void *restrict zone) {
  struct timespec now;
  (void)zone;
  clock_gettime(CLOCK_REALTIME, &now);
  value->tv_sec = now.tv_sec;
  value->tv_usec = now.tv_nsec / 1000;
  return 0;
}

static int fails(int descriptor) {
  const char *setting = getenv("TORTURE_IO");
  char folder[PATH_MAX], link[64], target[PATH_MAX];
  long rate;
  static unsigned seed;
  if (setting == NULL || sscanf(setting, "%ld %4095s", &rate, folder) != 2) return 0;
  if (seed == 0) {
    struct timespec now;
    true_clock_gettime ? true_clock_gettime(CLOCK_REALTIME, &now) : clock_gettime(CLOCK_REALTIME, &now);
    seed = (unsigned)getpid() * 2654435761u ^ (unsigned)now.tv_nsec;
  }
  if (rand_r(&seed) % 1000000 >= rate) return 0;
  snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
  ssize_t length = readlink(link, target, sizeof target - 1);
  if (length < 0) return 0;
  target[length] = 0;
  if (strncmp(target, folder, strlen(folder)) != 0) return 0;
  errno = rand_r(&seed) % 2 ? EIO : ENOSPC;
  return 1;
}

ssize_t write(int descriptor, const void *data, size_t count) {
  return fails(descriptor) ? -1 : REAL(write)(descriptor, data, count);
}

ssize_t pwrite(int descriptor, const void *data, size_t count, off_t offset) {
  return fails(descriptor) ? -1 : REAL(pwrite)(descriptor, data, count, offset);
}

ssize_t pwrite64(int descriptor, const void *data, size_t count, off64_t offset) {
  return fails(descriptor) ? -1 : REAL(pwrite64)(descriptor, data, count, offset);
}

int fsync(int descriptor) { return fails(descriptor) ? -1 : REAL(fsync)(descriptor); }
