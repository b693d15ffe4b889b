/* What threads work on, and how they wait for each other. The structs have twins in native.py. */

#include <limits.h>
#include <stdatomic.h>
#include <stdint.h>
#ifdef __linux__
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#else
#include <time.h>
#endif

/* Looks of a waiting thread before it sleeps, some milliseconds; and where there are fewer cores than threads, some ten
 * microseconds. Who sleeps may be woken on the core of who wakes it, and push that aside. */
enum { LOOKS = 100000, FEW_LOOKS = 500 };

enum { IMPORT, GATE, CLASSIFIER, POOL, TRANSFORM, CONVOLVE };
enum { DIRECT, F2, F4, S2, S4 }; /* how to convolve; the last four are Winograd's algorithms */
enum { NONE, RELU, SILU };

typedef struct {
    int32_t group, first, count; /* computes stored channels first .. first + count, from the inputs' parts of a group */
} Panel;

/* A quantised feature holds step * (value - zero); of others step is 1 and zero is 0. Sums are of the stored values. */
typedef struct {
    const char **x;                    /* the inputs, of x_type; IMPORT reads x[0] by its strides */
    const float *const *x_sums;        /* of the inputs, each of x_chunks */
    const int32_t *x_chunks;
    const float *x_step, *x_zero;      /* of each input */
    char *y;                           /* of y_type */
    float *copy, *sums;                /* for who reads them: y in fp32, and [N][chunks][cout] of its channels */
    const char *residual;              /* of x_type, and y's shape */
    const char *weight;                /* of x_type, or I16 by Winograd's algorithms; the classifier's are of F32 */
    const float *bias, *scale, *shift, *gate_weight, *gate_bias;
    const float *weight_step;          /* of U8: what a product counts, by channel; */
    const int32_t *weight_zero;        /* and what the inputs' zeros add to their sum */
    float *multiply, *add;             /* what GATE makes of the gate: [N][cout] each; not there without a gate */
    const Panel *panels;
    char *rows;        /* what TRANSFORM makes, rows_size bytes for each chunk; where it isn't there, CONVOLVE does it */
    int64_t rows_size;
    int64_t strides[4]; /* of IMPORT's input: N, C, H, W */
    float step, zero, per_step; /* of y; 1 over step */
    int32_t x_type, y_type;
    int32_t h, w, c;    /* of each input */
    int32_t inputs, cout, groups, stride, panel_count, chunks;
    int32_t kernel, activation, how;
    int32_t transforms; /* tasks that make a chunk's rows */
    int32_t counts;     /* the first of its counts: a gate for each picture, and transforms for each chunk of each */
    int32_t edge;   /* zeros around x, or of IMPORT around y: as many as the largest kernel reaches over; of others 1 */
    int32_t border; /* bias has a row for each way in which a pixel lacks taps */
} Op;

typedef struct {
    int32_t op, kind, n, chunk;
    int32_t start, stop;             /* pixels, tiles, rows of the picture, or classes */
    int32_t panel_start, panel_stop; /* of the output channels; to TRANSFORM, channels of all inputs */
} Task;

/* A count that threads wait for, and how many of them sleep. */
typedef struct {
    atomic_int value, sleepers;
} Count;

typedef struct {
    atomic_int next;
    Count done;
} Level;

/* What a convolution waits for: its gate, and the rows that others make of its input. */
typedef struct {
    Count *gate, *made;
    int looks;
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

/* Looks so many times, and then sleeps until it is woken: so the core is free for a thread that lost its own to another
 * process, or that never had one. */
static void wait_for(Count *count, int target, int looks) {
    for (int i = 0; i < looks; i++, pause_briefly())
        if (atomic_load_explicit(&count->value, memory_order_acquire) >= target) return;
    atomic_fetch_add(&count->sleepers, 1);
    for (int value; (value = atomic_load(&count->value)) < target;) sleep_while(&count->value, value);
    atomic_fetch_sub(&count->sleepers, 1);
}

/* One more; who waits for so many is woken. */
static void count_up(Count *count, int target) {
    if (atomic_fetch_add(&count->value, 1) + 1 >= target && atomic_load(&count->sleepers)) wake(&count->value, INT_MAX);
}
