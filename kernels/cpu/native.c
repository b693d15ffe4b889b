/* The kernels for CPUs: convolutions, gated or not, run level by level.
 *
 * Features are [N][H + 2 EDGE][W + 2 EDGE][C], of fp32, bf16 or 8-bit integers, with a border of zeros, which is wider
 * around a picture whose reader reaches further, so that no tap needs a bounds check. All threads work on one level
 * together, taking tasks from a counter, and go on once its last task has ended: a pass waits `depth` times, whatever
 * the number of streams. Sums of channels are kept per chunk and added in a fixed order, so that the number of threads
 * changes no bit. */

#include <math.h>

#include "shared.h"

#include "vector.h"

#include "tasks.h"

#include "convolution.h"

#include "winograd.h"

#include "pool.h"

/* Copies w values of one channel, `step` apart in x, to every pitch-th place in y; returns their sum. */
static inline __attribute__((always_inline)) float spread(
    int type, const char *x, int64_t step, int w, float *y, int pitch) {
    vf sum = {0};
    float total = 0;
    int j = 0, size = size_of(type);
    for (; j + VL <= w; j += VL) {
        vf v = {0};
        if (step == 1)
            v = widen(type, x + j * size);
        else
            for (int k = 0; k < VL; k++) v[k] = widen_one(type, x + (j + k) * step * size);
        sum += v;
        for (int k = 0; k < VL; k++) y[(int64_t)(j + k) * pitch] = v[k];
    }
    for (; j < w; j++) total += y[(int64_t)j * pitch] = widen_one(type, x + j * step * size);
    return total + sum_of(sum);
}

static inline __attribute__((always_inline)) void import_as(int type, const Op *o, const Task *t) {
    int size = size_of(type);
    int64_t along = o->strides[3] * size, channel = o->strides[1] * size;
    float *sums = sums_of(o, t);
    if (sums) memset(sums, 0, o->cout * sizeof *sums);
    for (int i = t->start; i < t->stop; i++) {
        const char *x = o->x[0] + (t->n * o->strides[0] + i * o->strides[2]) * size;
        int64_t y = place(t->n, o->h, o->w, o->edge, i, 0) * o->y_pitch;
        if (o->y_type == F32 && o->cout < VL) /* a picture has less channels than a vector */
            for (int c = 0; c < o->cout; c++) {
                float sum = spread(type, x + c * channel, o->strides[3], o->w, (float *)o->y + y + c, o->y_pitch);
                if (sums) sums[c] += sum;
            }
        else
            for (int j = 0; j < o->w; j++, y += o->y_pitch)
                for (int c = 0; c < o->cout; c += VL) {
                    const char *from = x + j * along + c * channel;
                    int count = least(VL, o->cout - c);
                    vf v = {0};
                    if (o->strides[1] == 1 && count == VL)
                        v = widen(type, from);
                    else
                        for (int k = 0; k < count; k++) v[k] = widen_one(type, from + k * channel);
                    add_to(sums, c, count, keep(o, y + c, count, v));
                }
    }
}

/* Copies rows of torch's tensor, of x_type and of any strides, into a feature with a border, and sums their channels. */
static void import(const Op *o, const Task *t) {
    switch (o->x_type) { /* loops of its own for each */
    case F32: import_as(F32, o, t); break;
    case BF16: import_as(BF16, o, t); break;
    case U8: import_as(U8, o, t); break;
    }
}

/* The maximum of those of 3 x 3 values that lie inside; NaN where one of them is. */
static void pool(const Op *o, const Task *t) {
    int h = o->h / o->stride, w = o->w / o->stride, size = size_of(o->x_type);
    float *sums = sums_of(o, t);
    if (sums) memset(sums, 0, o->cout * sizeof *sums);
    for (int i = t->start; i < t->stop; i++) {
        int row = i / w * o->stride, column = i % w * o->stride;
        int bottom = least(row + 1, o->h - 1), right = least(column + 1, o->w - 1);
        for (int c = 0; c < o->cout; c += VL) {
            vf most = (vf){0} - INFINITY;
            for (int r = row ? row - 1 : 0; r <= bottom; r++)
                for (int s = column ? column - 1 : 0; s <= right; s++) {
                    vf v = widen(o->x_type, o->x[0] + (place(t->n, o->h, o->w, EDGE, r, s) * o->pitch + c) * size);
                    most = blend((v > most) | (v != v), v, most);
                }
            most = keep(o, place(t->n, h, w, EDGE, i / w, i % w) * o->y_pitch + c, o->cout - c, most);
            add_to(sums, c, o->cout - c, most);
        }
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
        for (int c = 0; c < part; c++) average[c] = (average[c] / (float)(o->h * o->w) - o->x_zero[i]) * o->x_step[i];
    }
}

static inline float product(const float *a, const float *b, int length) {
    vf sum[4] = {0};
    int i = 0;
    for (; i + 4 * VL <= length; i += 4 * VL)
        for (int j = 0; j < 4; j++) sum[j] += load(a + i + j * VL) * load(b + i + j * VL);
    for (; i < length; i += VL) sum[0] += load_some(a + i, length - i) * load_some(b + i, length - i);
    return sum_of(sum[0] + sum[1] + (sum[2] + sum[3]));
}

static void gate(const Op *o, const Task *t, float *scratch) {
    int k = o->c * o->inputs / o->groups;
    float *multiply = o->multiply + (int64_t)t->n * o->cout, *add = o->add + (int64_t)t->n * o->cout;
    averages(o, t->n, scratch);
    for (int j = 0; j < o->panel_count; j++)
        for (int i = 0; i < o->panels[j].count; i++) {
            int c = o->panels[j].first + i;
            multiply[c] = product(o->gate_weight + (int64_t)c * k, scratch + o->panels[j].group * k, k);
        }
    for (int c = 0; c < o->cout; c += VL) {
        vf g = sigmoid(F32, load(o->gate_bias + c) + load(multiply + c)), by = 2 * g;
        if (o->scale) {
            vf shift = load(o->shift + c) * g;
            by = load(o->scale + c) * g;
            if (o->x_type == U8) { /* the identity reads stored values */
                by *= o->x_step[0];
                shift -= by * o->x_zero[0];
            }
            store(add + c, shift, o->cout - c);
        }
        store(multiply + c, by, o->cout - c);
    }
}

static void classify(const Op *o, const Task *t, float *scratch) {
    averages(o, t->n, scratch);
    int k = o->c * o->inputs;
    for (int i = t->start; i < t->stop; i++)
        ((float *)o->y)[(int64_t)t->n * o->cout + i] =
            o->bias[i] + product((const float *)o->weight + (int64_t)i * k, scratch, k);
}

/* The algorithm, the type of the inputs, and that of their points. */
#define BY_WINOGRAD(CALL) \
    CALL(F2, F32, F32) CALL(F4, F32, F32) CALL(S2, F32, F32) CALL(S4, F32, F32) \
    CALL(F2, BF16, BF16) CALL(S2, BF16, BF16) \
    CALL(F2, U8, I16) CALL(F4, U8, I16) CALL(S2, U8, I16) CALL(S4, U8, I16)

static void to_rows(const Op *o, const Task *t, int from, int to, char *v) {
#define DO(ALGORITHM, X_TYPE, TYPE) \
    if (o->algorithm == ALGORITHM && o->x_type == X_TYPE) transform(o, ALGORITHM, TYPE, t, from, to, v);
    BY_WINOGRAD(DO)
#undef DO
}

static void convolve(const Op *o, const Task *t, Needs needs, char *scratch) {
    if (o->rows)
        wait_for(needs.made, o->transforms, needs.spins);
    else if (o->algorithm != DIRECT)
        to_rows(o, t, 0, o->c * o->inputs, scratch);
#define DO(ALGORITHM, X_TYPE, TYPE) \
    if (o->algorithm == ALGORITHM && o->x_type == X_TYPE) winograd(o, ALGORITHM, TYPE, t, needs, scratch);
    BY_WINOGRAD(DO)
#undef DO
    if (o->algorithm == DIRECT && o->x_type == F32) direct(o, F32, t, needs);
    if (o->algorithm == DIRECT && o->x_type == BF16) direct(o, BF16, t, needs);
    if (o->algorithm == DIRECT && o->x_type == U8) direct(o, U8, t, needs);
}

/* Words of 32 bits that stand side by side in a panel of weights. */
int panel_width(void) { return NR; }

/* Panels whose products Winograd's algorithms make before any is transformed back. */
int panels_at_once(void) { return PANELS; }

/* Whether there are instructions for products of bf16. */
int has_bf16(void) {
#ifdef __AVX512BF16__
    return 1;
#else
    return 0;
#endif
}

/* Whether products of a block cost so little that no algorithm with fewer is worth its transforms. */
int has_tiles(void) {
#ifdef __AMX_TILE__
    return 1;
#else
    return 0;
#endif
}

/* Whether an instruction adds up four products of 8 bits. */
int has_dot_u8(void) { return HAS_DOT_U8; }

static void work(const void *pass, int index) {
    const Pass *p = pass;
    char *own = p->scratch + index * p->scratch_size;
    for (int l = 0; l < p->levels; l++) {
        Level *level = p->states + l;
        int begin = l ? p->ends[l - 1] : 0, count = p->ends[l] - begin, i;
        while ((i = atomic_fetch_add(&level->next, 1)) < count) {
            const Task *t = p->tasks + begin + i;
            const Op *o = p->ops + t->op;
            Count *gated = p->counts + o->counts + t->n;
            Count *made = p->counts + o->counts + p->pictures + (int64_t)t->n * o->chunks + t->chunk;
            switch (t->kind) {
            case IMPORT: import(o, t); break;
            case GATE: gate(o, t, (float *)own), count_up(gated, 1); break;
            case CLASSIFIER: classify(o, t, (float *)own); break;
            case POOL: pool(o, t); break;
            case TRANSFORM:
                to_rows(o, t, t->panel_start, t->panel_stop, rows_at(o, t));
                count_up(made, o->transforms);
                break;
            case CONVOLVE: convolve(o, t, (Needs){gated, made, p->spins}, own); break;
            }
            count_up(&level->done, count);
        }
        wait_for(&level->done, count, p->spins);
    }
}

/* Run every task. */
void run(Pass *pass) {
    memset(pass->states, 0, pass->levels * sizeof *pass->states);
    memset(pass->counts, 0, pass->count_number * sizeof *pass->counts);
    Pool *pool = pool_of(pass->threads);
    pass->spins = pool ? pool->spins : 0;
    if (pool)
        run_pass(pool, work, pass);
    else
        work(pass, 0);
}
