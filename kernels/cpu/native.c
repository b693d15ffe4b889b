/* The kernels for CPUs: gated 3x3 convolutions, direct or by Winograd's F(2x2, 3x3), run level by level.
 *
 * Features are fp32 [N][H + 2][W + 2][C] with a border of zeros, so that no tap needs a bounds check. All threads work
 * on one level together, taking tasks from a counter, and go on once its last task has ended: a pass waits `depth`
 * times, whatever the number of streams. Sums of channels are kept per chunk and added in a fixed order, so that the
 * number of threads changes no bit. The structs have twins in native.py. */

#include <limits.h>
#include <stdatomic.h>
#include <stdint.h>
#include <string.h>
#ifdef __linux__
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#else
#include <sched.h>
#endif

#if defined(__AVX512F__)
enum { VL = 16, NV = 2, MR = 8 };
#elif defined(__AVX2__)
enum { VL = 8, NV = 2, MR = 6 };
#elif defined(__aarch64__)
enum { VL = 4, NV = 4, MR = 6 };
#else
enum { VL = 4, NV = 2, MR = 6 };
#endif
/* a tile of MR pixels by NR channels fills the registers */
enum { NR = VL * NV, MAX_RUNS = 18, MAX_PIXELS = 256 /* of a task */ };
enum { SPINS = 30000 }; /* looks of a waiting thread before it sleeps, some ten microseconds */

typedef float vf __attribute__((vector_size(VL * 4), aligned(4)));
typedef int32_t vi __attribute__((vector_size(VL * 4), aligned(4)));

enum { IMPORT, GATE, DIRECT, WINOGRAD, CLASSIFIER };

typedef struct {
    int32_t group, first, count; /* computes stored channels first .. first + count, from the inputs' parts of a group */
} Panel;

typedef struct {
    const float **x;                 /* the inputs; IMPORT reads x[0] by its strides */
    const float *const *x_sums;      /* of the inputs, each of x_chunks */
    const int32_t *x_chunks;
    float *y, *sums; /* sums: [N][chunks][cout], of the channels of y */
    const float *weight, *bias, *scale, *shift, *gate_weight, *gate_bias;
    float *multiply, *add; /* what GATE makes of the gate: [N][cout] each */
    const Panel *panels;
    int64_t strides[4]; /* of IMPORT's input: N, C, H, W */
    int32_t h, w, c;    /* of each input */
    int32_t inputs, cout, groups, stride, panel_count, chunks;
    int32_t silu, border; /* border: bias has a row for each way in which a pixel lacks taps */
} Op;

typedef struct {
    int32_t op, kind, n, chunk;
    int32_t start, stop;             /* pixels, tiles, rows of the picture, or classes */
    int32_t panel_start, panel_stop; /* of the output channels */
} Task;

/* A count that threads wait for, and how many of them sleep. */
typedef struct {
    atomic_int value, sleepers;
} Count;

typedef struct {
    atomic_int next;
    Count done;
} Level;

static inline vf load(const float *p) { return *(const vf *)p; }

static inline void store(float *p, vf v, int count) {
    if (count >= VL)
        *(vf *)p = v;
    else
        for (int i = 0; i < count; i++) p[i] = v[i];
}

static inline vf select(vi mask, vf a, vf b) { return (vf)(((vi)a & mask) | ((vi)b & ~mask)); }

/* exp between -87 and 87, by Cephes' polynomial, relative error 2e-7 */
static inline vf exponential(vf x) {
    const vf low = {0};
    x = select(x < -87.0f, low - 87.0f, select(x > 87.0f, low + 87.0f, x));
    vf magic = low + 12582912.0f; /* 1.5 * 2^23: adding it rounds to an integer in the low bits */
    vf rounded = x * 1.44269504f + magic;
    vi power = (vi)rounded - (vi)magic;
    vf k = rounded - magic, r = x - k * 0.693359375f + k * 2.12194440e-4f;
    vf p = low + 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    return (vf)((vi)p + (power << 23));
}

/* 0 where the exponential grows no more: what is multiplied by it may be of any size */
static inline vf sigmoid(vf x) { return select(x < -87.0f, (vf){0}, 1.0f / (1.0f + exponential(-x))); }

/* acc[i] = sum over runs r and k of row(r, i)[k] times b, a panel's weights; rows stand at base[r] + pixel[i] */
static inline __attribute__((always_inline)) void multiply_tile(
    const float *b, const float *const *base, const int64_t *pixel, int runs, int length, vf acc[MR][NV]) {
    vf sum[MR][NV] = {0};
    for (int r = 0; r < runs; r++) {
        const float *row[MR];
        for (int i = 0; i < MR; i++) row[i] = base[r] + pixel[i];
        for (int k = 0; k < length; k++, b += NR) {
            vf w[NV];
#pragma GCC unroll 8
            for (int j = 0; j < NV; j++) w[j] = load(b + j * VL);
#pragma GCC unroll 16
            for (int i = 0; i < MR; i++) {
                vf x = row[i][k] - (vf){0}; /* all equal; adding would turn -0 into 0 */
#pragma GCC unroll 8
                for (int j = 0; j < NV; j++) sum[i][j] += x * w[j];
            }
        }
    }
    memcpy(acc, sum, sizeof sum);
}

/* Where a pixel of the output stands, and what its epilogue reads. */
typedef struct {
    float *y;
    const float *x, *bias;
} Pixel;

static inline Pixel pixel_of(const Op *o, int n, int row, int column) {
    int h = o->h / o->stride, w = o->w / o->stride;
    int lacks = (row == 0) + 2 * (o->stride == 1 && row == h - 1);
    lacks = 4 * lacks + (column == 0) + 2 * (o->stride == 1 && column == w - 1);
    int64_t at = ((int64_t)n * (h + 2) + row + 1) * (w + 2) + column + 1;
    return (Pixel){o->y + at * o->cout, o->scale ? o->x[0] + at * o->c : 0, o->bias + (o->border ? lacks * o->cout : 0)};
}

/* Gate, bias, identity and activation of the vector of channels from c on, `count` of which are left to store. */
static inline void finish(const Op *o, int n, Pixel p, float *sums, int c, int count, vf v) {
    const float *multiply = o->multiply + (int64_t)n * o->cout;
    v += load(p.bias + c);
    if (p.x)
        v += load(p.x + c) * load(multiply + c) + load(o->add + (int64_t)n * o->cout + c);
    else
        v *= load(multiply + c);
    v = o->silu ? v * sigmoid(v) : select(v < 0.0f, (vf){0}, v);
    store(p.y + c, v, count);
    store(sums + c, load(sums + c) + v, count);
}

#ifdef __linux__
static void sleep_while(atomic_int *counter, int value) {
    syscall(SYS_futex, counter, FUTEX_WAIT_PRIVATE, value, NULL, NULL, 0);
}
static void wake(atomic_int *counter) { syscall(SYS_futex, counter, FUTEX_WAKE_PRIVATE, INT_MAX, NULL, NULL, 0); }
#else
static void sleep_while(atomic_int *counter, int value) { sched_yield(); }
static void wake(atomic_int *counter) {}
#endif

/* Spins, as waits are short, and then sleeps until it is woken: so the core is free for a thread that lost its own to
 * another process, or that never had one. */
static void wait_for(Count *count, int target) {
    for (int i = 0; i < SPINS; i++)
        if (atomic_load_explicit(&count->value, memory_order_acquire) >= target) return;
    atomic_fetch_add(&count->sleepers, 1);
    for (int value; (value = atomic_load(&count->value)) < target;) sleep_while(&count->value, value);
    atomic_fetch_sub(&count->sleepers, 1);
}

/* One more; who waits for so many is woken. */
static void count_up(Count *count, int target) {
    if (atomic_fetch_add(&count->value, 1) + 1 >= target && atomic_load(&count->sleepers)) wake(&count->value);
}

static inline int least(int a, int b) { return a < b ? a : b; }

static void direct(const Op *o, const Task *t, Count *gate) {
    int w = o->w / o->stride, part = o->c / o->groups;
    int merged = o->inputs == 1 && o->groups == 1; /* three neighbouring pixels are one run */
    int runs = merged ? 3 : 9 * o->inputs, length = merged ? 3 * o->c : part;
    int64_t row = (int64_t)(o->w + 2) * o->c, offset[MAX_PIXELS + MR];
    for (int i = t->start; i < t->stop; i++)
        offset[i - t->start] = i / w * o->stride * row + (int64_t)(i % w) * o->stride * o->c;
    for (int i = 0; i < MR; i++) offset[t->stop - t->start + i] = offset[t->stop - t->start - 1];
    float *sums = o->sums + ((int64_t)t->n * o->chunks + t->chunk) * o->cout;
    for (int j = t->panel_start; j < t->panel_stop; j++) {
        Panel panel = o->panels[j];
        const float *base[MAX_RUNS], *b = o->weight + (int64_t)j * runs * length * NR;
        for (int r = 0; r < runs; r++) {
            const float *x = o->x[merged ? 0 : r / 9] + (int64_t)t->n * (o->h + 2) * row + panel.group * part;
            base[r] = merged ? x + r * row : x + r % 9 / 3 * row + r % 3 * o->c;
        }
        memset(sums + panel.first, 0, panel.count * sizeof *sums);
        for (int i = t->start; i < t->stop; i += MR) {
            vf acc[MR][NV];
            multiply_tile(b, base, offset + i - t->start, runs, length, acc);
            wait_for(gate, 1);
            for (int m = 0; m < least(MR, t->stop - i); m++) {
                Pixel p = pixel_of(o, t->n, (i + m) / w, (i + m) % w);
                for (int v = 0; v * VL < panel.count; v++)
                    finish(o, t->n, p, sums, panel.first + v * VL, panel.count - v * VL, acc[m][v]);
            }
        }
    }
}

/* V = B' d B of a 4x4 tile's vector of channels, to 16 planes */
static inline void transform_input(const float *d, int64_t row, int c, float *v, int64_t plane) {
    vf t[4][4];
    for (int j = 0; j < 4; j++) {
        vf d0 = load(d + j * c), d1 = load(d + row + j * c), d2 = load(d + 2 * row + j * c),
           d3 = load(d + 3 * row + j * c);
        t[0][j] = d0 - d2, t[1][j] = d1 + d2, t[2][j] = d2 - d1, t[3][j] = d1 - d3;
    }
    for (int i = 0; i < 4; i++) {
        *(vf *)(v + (4 * i + 0) * plane) = t[i][0] - t[i][2];
        *(vf *)(v + (4 * i + 1) * plane) = t[i][1] + t[i][2];
        *(vf *)(v + (4 * i + 2) * plane) = t[i][2] - t[i][1];
        *(vf *)(v + (4 * i + 3) * plane) = t[i][1] - t[i][3];
    }
}

/* Y = A' m A: the four pixels of a tile */
static inline void transform_output(const float *m, int64_t plane, vf y[4]) {
    vf s[2][4];
    for (int j = 0; j < 4; j++) {
        vf m0 = load(m + j * plane), m1 = load(m + (4 + j) * plane), m2 = load(m + (8 + j) * plane),
           m3 = load(m + (12 + j) * plane);
        s[0][j] = m0 + m1 + m2, s[1][j] = m1 - m2 - m3;
    }
    for (int i = 0; i < 2; i++) y[2 * i] = s[i][0] + s[i][1] + s[i][2], y[2 * i + 1] = s[i][1] - s[i][2] - s[i][3];
}

/* Lavin and Gray, "Fast algorithms for convolutional neural networks", 2015: 16 products instead of 36 */
static void winograd(const Op *o, const Task *t, Count *gate, float *scratch) {
    int tiles = t->stop - t->start, columns = o->w / 2, part = o->c / o->groups, k = part * o->inputs;
    int64_t row = (int64_t)(o->w + 2) * o->c, v_row = k * o->groups + VL, v_plane = tiles * v_row;
    int64_t m_row = (t->panel_stop - t->panel_start) * NR + VL, m_plane = tiles * m_row;
    float *v = scratch, *m = scratch + 16 * v_plane;
    for (int i = 0; i < tiles; i++) {
        int at_row = (t->start + i) / columns * 2, at_column = (t->start + i) % columns * 2;
        int64_t at = ((int64_t)t->n * (o->h + 2) + at_row) * row + (int64_t)at_column * o->c;
        for (int s = 0; s < o->groups * o->inputs; s++) /* in this order, as a tail overruns into what follows it */
            for (int c = 0; c < part; c += VL)
                transform_input(o->x[s % o->inputs] + at + s / o->inputs * part + c, row, o->c,
                                v + i * v_row + s * part + c, v_plane);
    }
    int64_t offset[MAX_PIXELS + MR];
    for (int i = 0; i < tiles + MR; i++) offset[i] = least(i, tiles - 1) * v_row;
    for (int plane = 0; plane < 16; plane++)
        for (int j = t->panel_start; j < t->panel_stop; j++) {
            const float *base = v + plane * v_plane + o->panels[j].group * k;
            const float *b = o->weight + ((int64_t)plane * o->panel_count + j) * k * NR;
            float *to = m + plane * m_plane + (j - t->panel_start) * NR;
            for (int i = 0; i < tiles; i += MR) {
                vf acc[MR][NV];
                multiply_tile(b, &base, offset + i, 1, k, acc);
                for (int r = 0; r < least(MR, tiles - i); r++) memcpy(to + (i + r) * m_row, acc[r], sizeof acc[r]);
            }
        }
    float *sums = o->sums + ((int64_t)t->n * o->chunks + t->chunk) * o->cout;
    for (int j = t->panel_start; j < t->panel_stop; j++)
        memset(sums + o->panels[j].first, 0, o->panels[j].count * sizeof *sums);
    wait_for(gate, 1);
    for (int i = 0; i < tiles; i++) {
        int at_row = (t->start + i) / columns * 2, at_column = (t->start + i) % columns * 2;
        Pixel p[4];
        for (int q = 0; q < 4; q++) p[q] = pixel_of(o, t->n, at_row + q / 2, at_column + q % 2);
        for (int j = t->panel_start; j < t->panel_stop; j++)
            for (int c = 0; c < o->panels[j].count; c += VL) {
                vf y[4];
                transform_output(m + i * m_row + (j - t->panel_start) * NR + c, m_plane, y);
                for (int q = 0; q < 4; q++)
                    finish(o, t->n, p[q], sums, o->panels[j].first + c, o->panels[j].count - c, y[q]);
            }
    }
}

/* Rows of a feature as torch has it, to where the border is; and their sums. */
static void import(const Op *o, const Task *t) {
    float *sums = o->sums + ((int64_t)t->n * o->chunks + t->chunk) * o->cout;
    memset(sums, 0, o->cout * sizeof *sums);
    for (int i = t->start; i < t->stop; i++)
        for (int j = 0; j < o->w; j++) {
            const float *x = o->x[0] + t->n * o->strides[0] + i * o->strides[2] + j * o->strides[3];
            float *y = o->y + (((int64_t)t->n * (o->h + 2) + i + 1) * (o->w + 2) + j + 1) * o->cout;
            for (int c = 0; c < o->cout; c++) sums[c] += y[c] = x[c * o->strides[1]];
        }
}

/* Global averages of the inputs, group by group, the first input's part, then the second's. */
static void averages(const Op *o, int n, float *average) {
    int part = o->c / o->groups;
    for (int s = 0; s < o->groups * o->inputs; s++, average += part) {
        int i = s % o->inputs;
        const float *sums = o->x_sums[i] + (int64_t)n * o->x_chunks[i] * o->c + s / o->inputs * part;
        memset(average, 0, part * sizeof *average);
        for (int chunk = 0; chunk < o->x_chunks[i]; chunk++)
            for (int c = 0; c < part; c++) average[c] += sums[(int64_t)chunk * o->c + c];
        for (int c = 0; c < part; c++) average[c] /= (float)(o->h * o->w);
    }
}

static inline float dot(const float *a, const float *b, int length) {
    vf sum = {0};
    float total = 0;
    int i = 0;
    for (; i + VL <= length; i += VL) sum += load(a + i) * load(b + i);
    for (; i < length; i++) total += a[i] * b[i];
    for (int j = 0; j < VL; j++) total += sum[j];
    return total;
}

static void gate(const Op *o, const Task *t, float *scratch) {
    int k = o->c * o->inputs / o->groups;
    float *multiply = o->multiply + (int64_t)t->n * o->cout, *add = o->add + (int64_t)t->n * o->cout;
    averages(o, t->n, scratch);
    for (int j = 0; j < o->panel_count; j++)
        for (int i = 0; i < o->panels[j].count; i++) {
            int c = o->panels[j].first + i;
            float g = o->gate_bias[c] + dot(o->gate_weight + (int64_t)c * k, scratch + o->panels[j].group * k, k);
            g = sigmoid((vf){0} + g)[0];
            multiply[c] = o->scale ? o->scale[c] * g : 2 * g;
            if (o->scale) add[c] = o->shift[c] * g;
        }
}

static void classify(const Op *o, const Task *t, float *scratch) {
    averages(o, t->n, scratch);
    int k = o->c * o->inputs;
    for (int i = t->start; i < t->stop; i++)
        o->y[(int64_t)t->n * o->cout + i] = o->bias[i] + dot(o->weight + (int64_t)i * k, scratch, k);
}

/* Floats that stand side by side in a panel of weights. */
int panel_width(void) { return NR; }

/* Run every task; those of level i are tasks[ends[i - 1] .. ends[i]), gates first. `gates`, a counter for each
 * operation and picture, and `states`, one for each level, are set to zero here. scratch: `scratch_size` floats for each thread. */
void run(const Op *ops, const Task *tasks, const int32_t *ends, int32_t levels, Level *states, Count *gates,
         int32_t gate_count, int32_t pictures, float *scratch, int64_t scratch_size, int32_t threads) {
    memset(states, 0, levels * sizeof *states);
    memset(gates, 0, gate_count * sizeof *gates);
    atomic_int thread = 0;
#pragma omp parallel num_threads(threads)
    {
        float *own = scratch + atomic_fetch_add(&thread, 1) * scratch_size;
        for (int l = 0; l < levels; l++) {
            int begin = l ? ends[l - 1] : 0, count = ends[l] - begin, i;
            while ((i = atomic_fetch_add(&states[l].next, 1)) < count) {
                const Task *t = tasks + begin + i;
                const Op *o = ops + t->op;
                Count *ready = gates + (int64_t)t->op * pictures + t->n;
                switch (t->kind) {
                case IMPORT: import(o, t); break;
                case GATE: gate(o, t, own), count_up(ready, 1); break;
                case DIRECT: direct(o, t, ready); break;
                case WINOGRAD: winograd(o, t, ready, own); break;
                case CLASSIFIER: classify(o, t, own); break;
                }
                count_up(&states[l].done, count);
            }
            wait_for(&states[l].done, count);
        }
    }
}
