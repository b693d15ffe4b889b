/* Threads that help the one that runs passes. Each such thread has helpers of its own, made when they are first needed
 * and ended with it, so passes side by side share none.
 *
 * A pass takes those that are awake in time and waits for no other: a core that has slept since the last picture may
 * take milliseconds to wake, and a small network is through by then. Helpers are kept off the core of the thread that
 * they help: the system may wake a thread where its waker runs, which then stands still. */

#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <unistd.h>
#ifdef __linux__
#include <sched.h>
#include <sys/prctl.h>
#endif

enum {
    MOST_HELPERS = 1023,
    BETWEEN = 20,            /* the part of a pass's spins before helpers sleep: some hundred microseconds */
    INSIDE = MOST_HELPERS,   /* of a door: helpers that have gone in, */
    OPEN = INSIDE + 1,       /* whether others may, */
    ENDED = 2 * OPEN,        /* or are to end; above, the number of the pass */
    PASS = 2 * ENDED
};

typedef struct {
    Count door, left; /* helpers that have left it */
    void (*work)(const void *pass, int index);
    const void *pass;
    atomic_int wanted; /* helpers, at most */
    atomic_int spins;  /* of who waits in a pass; a part of them between two */
    int count;         /* helpers */
    int cores, core;   /* how many the thread may run on, and where it ran when that was asked */
#ifdef __linux__
    cpu_set_t allowed; /* those cores */
#endif
    pid_t process;     /* that has the helpers: a fork has none */
    pthread_t helpers[MOST_HELPERS];
} Pool;

static int may_enter(Pool *pool, unsigned door, unsigned seen) {
    if (door & ENDED) return 1;
    return door & OPEN && door / PASS != seen && (int)(door & INSIDE) < atomic_load(&pool->wanted);
}

static void *help(void *argument) {
    Pool *pool = argument;
#ifdef __linux__
    prctl(PR_SET_NAME, "parnet helper");
#endif
    for (unsigned seen = 0;;) {
        unsigned door = atomic_load(&pool->door.value);
        for (int i = atomic_load(&pool->spins) / BETWEEN; i && !may_enter(pool, door, seen); i--, pause_briefly())
            door = atomic_load(&pool->door.value);
        atomic_fetch_add(&pool->door.sleepers, 1);
        while (!may_enter(pool, door = atomic_load(&pool->door.value), seen)) sleep_while(&pool->door.value, door);
        atomic_fetch_sub(&pool->door.sleepers, 1);
        if (door & ENDED) return NULL;
        int expected = door;
        if (!atomic_compare_exchange_strong(&pool->door.value, &expected, door + 1)) continue;
        seen = door / PASS;
        pool->work(pool->pass, (door & INSIDE) + 1);
        count_up(&pool->left, 1);
    }
}

/* One helper more; false where the system has none to give. */
static int hire(Pool *pool) {
    sigset_t theirs, before; /* signals to the process are for the threads that the program knows of */
    sigfillset(&theirs);
    const int own[] = {SIGILL, SIGFPE, SIGBUS, SIGSEGV, SIGTRAP};
    for (int i = 0; i < 5; i++) sigdelset(&theirs, own[i]);
    pthread_sigmask(SIG_SETMASK, &theirs, &before);
    int failed = pthread_create(&pool->helpers[pool->count], NULL, help, pool);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pool->count += !failed;
    return !failed;
}

static pthread_once_t once = PTHREAD_ONCE_INIT;
static pthread_key_t key;

static void dismiss(void *argument) {
    Pool *pool = argument;
    if (pool->process == getpid()) {
        atomic_fetch_or(&pool->door.value, ENDED);
        wake(&pool->door.value, INT_MAX);
        for (int i = 0; i < pool->count; i++) pthread_join(pool->helpers[i], NULL);
    }
    free(pool);
}

static void make_key(void) { pthread_key_create(&key, dismiss); }

/* Where the thread has come to another core, may run on others, or has another helper: the cores that it may run on for
 * its helpers, all but its own where there is more than one. Asked at each pass, for 0.1 us: a thread that stays where
 * it is may have been taken off the others, which are somebody else's then. */
static void keep_off(Pool *pool) {
#ifdef __linux__
    int core = sched_getcpu();
    cpu_set_t cores;
    if (sched_getaffinity(0, sizeof cores, &cores)) return;
    if (core == pool->core && CPU_EQUAL(&cores, &pool->allowed)) return;
    pool->core = core, pool->allowed = cores, pool->cores = CPU_COUNT(&cores);
    if (pool->cores > 1) CPU_CLR(core, &cores);
    for (int i = 0; i < pool->count; i++) pthread_setaffinity_np(pool->helpers[i], sizeof cores, &cores);
#endif
}

/* The calling thread's, with what it takes for so many threads if that can be had; NULL for one, or without memory. */
static Pool *pool_of(int threads) {
    if (threads == 1) return NULL;
    pthread_once(&once, make_key);
    Pool *pool = pthread_getspecific(key);
    if (!pool || pool->process != getpid()) {
        free(pool);
        pool = calloc(1, sizeof *pool);
        pthread_setspecific(key, pool);
        if (!pool) return NULL;
        pool->process = getpid(), pool->cores = sysconf(_SC_NPROCESSORS_ONLN);
    }
    pool->wanted = least(threads - 1, MOST_HELPERS);
    while (pool->count < pool->wanted && hire(pool)) pool->core = -1;
    keep_off(pool);
    pool->spins = threads > pool->cores ? FEW_SPINS : SPINS;
    return pool;
}

/* work(pass, index) by this thread, with index 0, and by others; those that come late may find nothing left. */
static void run_pass(Pool *pool, void (*work)(const void *pass, int index), const void *pass) {
    unsigned number = atomic_load(&pool->door.value) / PASS + 1;
    pool->work = work, pool->pass = pass;
    atomic_store(&pool->left.value, 0);
    atomic_store(&pool->door.value, (int)(number * PASS | OPEN));
    if (atomic_load(&pool->door.sleepers)) wake(&pool->door.value, pool->wanted);
    work(pass, 0);
    wait_for(&pool->left, atomic_fetch_and(&pool->door.value, ~(OPEN | INSIDE)) & INSIDE, pool->spins);
}
