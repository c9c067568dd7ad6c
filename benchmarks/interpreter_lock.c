/* CPU seconds during which each thread holds the interpreter lock: the two calls by which extensions let go of it and
   take it back are counted here before they are made. Preloaded; see interpreter_lock.py. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdatomic.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define MOST 65536

struct held { long thread; double seconds; };
static struct held every[MOST];
static atomic_int threads;
static __thread int own = -1;
static __thread double since;

static double cpu(void)
{
    struct timespec now;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
    return now.tv_sec + 1e-9 * now.tv_nsec;
}

void *PyEval_SaveThread(void)
{
    static void *(*next)(void);
    if (own < 0) {  /* a thread begins with the lock, and with a clock at zero */
        own = atomic_fetch_add(&threads, 1) % MOST;
        every[own].thread = syscall(SYS_gettid);
    }
    every[own].seconds += cpu() - since;
    if (!next) next = (void *(*)(void))dlsym(RTLD_NEXT, "PyEval_SaveThread");
    return next();
}

void PyEval_RestoreThread(void *state)
{
    static void (*next)(void *);
    if (!next) next = (void (*)(void *))dlsym(RTLD_NEXT, "PyEval_RestoreThread");
    since = cpu();
    next(state);
}

int held_by_threads(struct held *out, int most)
{
    int count = atomic_load(&threads);
    for (int i = 0; i < count && i < most; i++) out[i] = every[i];
    return count < most ? count : most;
}
