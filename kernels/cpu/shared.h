/* What Python and the kernels share. It is written down here alone: shared.py reads this file, so it keeps to what that
 * understands, lists of numbers and flat structs. */

#include <stdatomic.h>
#include <stdint.h>

/* Limits: pixels along a side of the kernels of convolutions, of features and of the picture; inputs of a convolution;
 * pixels of a task of the direct algorithm. Borders and arrays on the stack are made for these, and NativePlan refuses
 * what exceeds them: whoever needs more changes them here. */
enum { FEATURE_KERNEL = 3, PICTURE_KERNEL = 7, MOST_INPUTS = 2, MOST_PIXELS = 256 };

enum { IMPORT, GATE, CLASSIFIER, POOL, TRANSFORM, CONVOLVE }; /* the kinds of tasks */
enum { DIRECT, F2, F4, S2, S4 }; /* algorithms of convolutions; the last four are Winograd's */
enum { NONE, RELU, SILU };
/* how values are stored; weights for U8 are signed, and I16 is what Winograd's algorithms make of U8 */
enum { F32, BF16, U8, I16 };

typedef struct {
    int32_t group, first, count; /* stored channels first .. first + count, made from the inputs' parts of a group */
} Panel;

/* A value of a quantised feature means step * (value - zero); of others step is 1 and zero is 0. Sums are of values as
 * they are stored. */
typedef struct {
    const char **x;                    /* the inputs, of x_type; IMPORT reads x[0], not of I16, by its strides */
    const float *const *x_sums;        /* of the inputs, each of x_chunks */
    const int32_t *x_chunks;
    const float *x_step, *x_zero;      /* of each input */
    char *y;                           /* of y_type */
    float *copy, *sums;                /* for who reads them: y in fp32, and [N][chunks][cout] of its channels */
    const char *residual;              /* of x_type, and y's shape */
    const char *weight;                /* of x_type, or I16 by Winograd's algorithms; the classifier's are of F32 */
    const float *bias, *scale, *shift, *gate_weight, *gate_bias;
    const float *weight_step;          /* of U8, by channel: what a product of integers is multiplied by, */
    const int32_t *weight_zero;        /* and what the inputs' zeros add to a sum of products */
    float *multiply, *add;             /* what GATE makes of the gate: [N][cout] each; null without a gate */
    const Panel *panels;
    char *rows;         /* what TRANSFORM makes, rows_size bytes for each chunk; null where CONVOLVE transforms */
    int64_t rows_size;
    int64_t strides[4]; /* of IMPORT's input: N, C, H, W */
    float step, zero, per_step; /* of y; 1 over step */
    int32_t x_type, y_type;
    int32_t h, w, c;    /* of each input */
    int32_t pitch, y_pitch; /* values from one pixel to the next, of each input and of y */
    int32_t inputs, cout, groups, stride, panel_count, chunks;
    int32_t kernel, activation, algorithm;
    int32_t transforms; /* tasks that make a chunk's rows */
    int32_t counts;     /* the first of its counts: a gate for each picture, and transforms for each chunk of each */
    int32_t edge;       /* how many zeros wide the border is, around x, or of IMPORT around y */
    int32_t border;     /* whether bias has a row for each way in which a pixel lacks taps */
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

/* Tasks of level i are tasks[ends[i - 1] .. ends[i]): gates first, then transforms. */
typedef struct {
    const Op *ops;
    const Task *tasks;
    const int32_t *ends;
    Level *states;   /* one for each level; `run` sets them to zero, */
    Count *counts;   /* and these */
    char *scratch;   /* scratch_size bytes for each thread */
    int64_t scratch_size;
    int32_t levels, count_number, pictures, threads;
    int32_t spins;   /* set by `run` */
} Pass;
