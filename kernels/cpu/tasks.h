/* How threads that work on shared.h's tasks wait for each other. */

#include <limits.h>
#ifdef __linux__
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#else
#include <time.h>
#endif

/* How often a waiting thread looks before it sleeps: for some milliseconds, or some ten microseconds where there are
 * fewer cores than threads. The system may wake a sleeper on its waker's core, where it displaces the waker. */
enum { SPINS = 100000, FEW_SPINS = 500 };

/* What a convolution waits for: its gate, and the rows that others make of its input. */
typedef struct {
    Count *gate, *made;
    int spins;
} Needs;

#ifdef __linux__
static void sleep_while(atomic_int *counter, int value) {
    syscall(SYS_futex, counter, FUTEX_WAIT_PRIVATE, value, NULL, NULL, 0);
}
static void wake(atomic_int *counter, int most) {
    syscall(SYS_futex, counter, FUTEX_WAKE_PRIVATE, most, NULL, NULL, 0);
}
#else
static void sleep_while(atomic_int *counter, int value) { nanosleep(&(struct timespec){0, 50000}, NULL); }
static void wake(atomic_int *counter, int most) {}
#endif

static inline void pause_briefly(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

/* Looks `spins` times, and then sleeps until it is woken: so the core is free for a thread that lost its own to another
 * process, or that never had one. */
static void wait_for(Count *count, int target, int spins) {
    for (int i = 0; i < spins; i++, pause_briefly())
        if (atomic_load_explicit(&count->value, memory_order_acquire) >= target) return;
    atomic_fetch_add(&count->sleepers, 1);
    for (int value; (value = atomic_load(&count->value)) < target;) sleep_while(&count->value, value);
    atomic_fetch_sub(&count->sleepers, 1);
}

/* Adds one to a count, and wakes its sleepers once it has reached the target that they wait for. */
static void count_up(Count *count, int target) {
    if (atomic_fetch_add(&count->value, 1) + 1 >= target && atomic_load(&count->sleepers)) wake(&count->value, INT_MAX);
}
