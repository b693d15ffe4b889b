/* Convolutions: products of tiles, what becomes of them, and the direct algorithm, for each type of values. */

enum {
    EDGE = FEATURE_KERNEL / 2, /* zeros around a feature */
    MOST_RUNS = MOST_INPUTS * FEATURE_KERNEL * FEATURE_KERNEL,
    LINE = 64,
    NEAR = 8192 /* bytes */
};
_Static_assert(EDGE > 0, "Winograd's algorithms and the maximum reach one pixel further than their output");
_Static_assert(MOST_RUNS >= PICTURE_KERNEL, "a row of taps of the picture is one run");

/* Sends for memory to read, to the second cache, or to the first where it is `near`; and for memory to write. */
static inline __attribute__((always_inline)) void fetch(int near, const char *p, int bytes) {
#pragma GCC unroll 8
    for (int i = 0; i < bytes; i += LINE) near ? __builtin_prefetch(p + i, 0, 3) : __builtin_prefetch(p + i, 0, 2);
}
static inline void fetch_to_write(const char *p, int bytes) {
    for (int i = 0; i < bytes; i += LINE) __builtin_prefetch(p + i, 1, 3);
}

static inline int least(int a, int b) { return a < b ? a : b; }

/* Weights that are sent for while others are multiplied, since whoever reads them first would wait for memory: where
 * they begin, and how far the next word's are. A line is sent for several times, which costs least in the first cache,
 * where fp32 leaves no room. */
typedef struct {
    const char *at;
    int64_t step;
} Ahead;

/* For each of `rows` rows i, to + i * step gets the sum over runs r and words k of row(r, i)[k] times b, a panel's
 * weights, of which it takes so many vectors; rows stand at base[r] + pixel[i]. */
static inline __attribute__((always_inline)) void multiply_rows(
    int rows, int vectors, int type, const char *b, Ahead ahead, const char *const *base, const int64_t *pixel,
    int runs, int words, float *to, int64_t step) {
    vf sum[MR][NV] = {0};
    for (int r = 0; r < runs; r++) {
        const char *row[MR];
        for (int i = 0; i < rows; i++) row[i] = base[r] + pixel[i];
        for (int k = 0; k < words; k++, b += 4 * NR) {
            vi w[NV];
            fetch(type != F32, ahead.at, 4 * NR);
            ahead.at += ahead.step;
#pragma GCC unroll 8
            for (int j = 0; j < vectors; j++) w[j] = *(const vi *)(b + 4 * j * VL);
#pragma GCC unroll 16
            for (int i = 0; i < rows; i++)
#pragma GCC unroll 8
                for (int j = 0; j < vectors; j++) sum[i][j] = dot(type, sum[i][j], row[i] + 4 * k, w[j]);
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 8
        for (int j = 0; j < vectors; j++) *(vf *)(to + i * step + j * VL) = sum[i][j];
}

/* multiply_rows for 1 to MR rows; more may be computed, so `pixel` and `to` must have places for MR. count: channels of
 * the panel; if they fit one vector, one is computed. */
static inline __attribute__((always_inline)) void multiply_tile(
    int rows, int count, int type, const char *b, Ahead ahead, const char *const *base, const int64_t *pixel,
    int runs, int words, float *to, int64_t step) {
    if (count <= VL)
        multiply_rows(MR, 1, type, b, ahead, base, pixel, runs, words, to, step);
    else if (rows >= MR)
        multiply_rows(MR, NV, type, b, ahead, base, pixel, runs, words, to, step);
    else if (rows > 4)
        multiply_rows(MR - 1, NV, type, b, ahead, base, pixel, runs, words, to, step);
    else if (rows > 2)
        multiply_rows(4, NV, type, b, ahead, base, pixel, runs, words, to, step);
    else
        multiply_rows(2, NV, type, b, ahead, base, pixel, runs, words, to, step);
}

/* How many of `count` rows a block takes: MR, or MR - 1 where that divides them and MR leaves one or two, for which all
 * weights would be read once more. */
static inline int rows_of_block(int count) {
    int left = count % MR;
    return left && left <= 2 && count % (MR - 1) == 0 ? MR - 1 : MR;
}

/* Stores the first `count` values of v at y + at, as y's type, and returns what was stored. */
static inline vf keep(const Op *o, int64_t at, int count, vf v) {
    if (o->y_type == U8) {
        v = clamp(v * o->per_step + o->zero, 0.0f, 255.0f) + MAGIC;
        store_u8(o->y + at, (vi)v, count);
        v -= MAGIC;
        if (o->copy) store(o->copy + at, (v - o->zero) * o->step, count);
    } else if (o->y_type == BF16) {
        vh narrow = to_bf16(v);
        store_bf16(o->y + 2 * at, narrow, count);
        v = from_bf16(narrow);
        if (o->copy) store(o->copy + at, v, count);
    } else
        store((float *)o->y + at, v, count);
    return v;
}

/* A task's row of the sums; NULL where nobody reads them. */
static inline float *sums_of(const Op *o, const Task *t) {
    return o->sums ? o->sums + ((int64_t)t->n * o->chunks + t->chunk) * o->cout : NULL;
}

/* Adds to the sums of the channels from c on, `count` of which are left. */
static inline void add_to(float *sums, int c, int count, vf v) {
    if (sums) store(sums + c, load(sums + c) + v, count);
}

static inline void clear(float *sums, Panel panel) {
    if (sums) memset(sums + panel.first, 0, panel.count * sizeof *sums);
}

/* Where a pixel of the output stands in y, in the values from which it is made, and in x with stride 1; its bias. */
typedef struct {
    int64_t at, from, of_x, bias;
} Pixel;

/* Taps that are missing along one side, of `size` pixels of x: the first ones, and the last ones. */
static inline int lacking(const Op *o, int at, int size) {
    int reach = o->kernel / 2, first = reach - at * o->stride, last = at * o->stride + reach - (size - 1);
    return (first > 0 ? first : 0) + (reach + 1) * (last > 0 ? last : 0);
}

static inline int lacks(const Op *o, int row, int column) {
    int ways = (o->kernel / 2 + 1) * (o->kernel / 2 + 1);
    return o->border ? ways * lacking(o, row, o->h) + lacking(o, column, o->w) : 0;
}

static inline int64_t place(int n, int h, int w, int edge, int row, int column) {
    return ((int64_t)n * (h + 2 * edge) + row + edge) * (w + 2 * edge) + column + edge;
}

static inline Pixel pixel_of(const Op *o, int n, int h, int w, int row, int column, int from) {
    int64_t at = place(n, h, w, EDGE, row, column), of_x = o->edge == EDGE ? at : place(n, h, w, o->edge, row, column);
    return (Pixel){at * o->y_pitch, from, of_x * o->pitch, (int64_t)lacks(o, row, column) * o->cout};
}

enum { TOGETHER = 4 }; /* pixels whose vectors stay in registers */

/* Gate, bias, identity, residual and activation of the vectors of channels from c on, `count` of which are left to
 * store, of so many pixels; returns `sum` and what was stored, added up. One thing after the other, since a pixel has
 * more instructions than the CPU looks ahead. */
static inline __attribute__((always_inline)) vf finish_some(
    const Op *restrict o, int type, int n, const Pixel *p, int pixels, int c, int count, const vf *from, vf sum) {
#define EACH _Pragma("GCC unroll 4") for (int i = 0; i < pixels; i++)
    vf v[TOGETHER];
    const float *bias = o->bias + c;
    if (type == U8) {
        vi zero = *(const vi *)(o->weight_zero + c);
        vf step = load(o->weight_step + c);
        EACH v[i] = __builtin_convertvector((vi)from[p[i].from] - zero, vf) * step + load(bias + p[i].bias);
    } else
        EACH v[i] = from[p[i].from] + load(bias + p[i].bias);
    if (o->scale) {
        vf multiply = load(o->multiply + (int64_t)n * o->cout + c), add = load(o->add + (int64_t)n * o->cout + c);
        const char *x = o->x[0] + c * size_of(type);
        EACH v[i] += widen(type, x + p[i].of_x * size_of(type)) * multiply + add;
    } else if (o->multiply) {
        vf multiply = load(o->multiply + (int64_t)n * o->cout + c);
        EACH v[i] *= multiply;
    }
    if (o->residual)
        EACH v[i] += widen(type, o->residual + (p[i].at + c) * size_of(type));
    if (o->activation == SILU && o->y_type != F32)
        EACH v[i] *= sigmoid(BF16, v[i]);
    else if (o->activation == SILU)
        EACH v[i] *= sigmoid(F32, v[i]);
    else if (o->activation == RELU)
        EACH v[i] = blend(v[i] < 0.0f, (vf){0}, v[i]);
    EACH sum += keep(o, p[i].at + c, count, v[i]);
    return sum;
#undef EACH
}

/* finish_some for any number of pixels. */
static inline __attribute__((always_inline)) vf finish(
    const Op *o, int type, int n, const Pixel *p, int pixels, int c, int count, const vf *from) {
    vf sum = {0};
    int i = 0;
    for (; i + TOGETHER <= pixels; i += TOGETHER) sum = finish_some(o, type, n, p + i, TOGETHER, c, count, from, sum);
    for (; i < pixels; i++) sum = finish_some(o, type, n, p + i, 1, c, count, from, sum);
    return sum;
}

/* A block whose sums are made: what is left of it are so many groups of up to TOGETHER pixels of a vector. */
typedef struct {
    const Op *o;
    const Pixel *pixel;
    const vf *acc;
    float *sums;
    Panel panel;
    int n, pixels, left;
} Unfinished;

static inline Unfinished unfinished(
    const Op *o, int n, const Pixel *pixel, int pixels, Panel panel, const vf *acc, float *sums) {
    int groups = (pixels + TOGETHER - 1) / TOGETHER * ((panel.count + VL - 1) / VL);
    return (Unfinished){o, pixel, acc, sums, panel, n, pixels, groups};
}

static inline __attribute__((always_inline)) void finish_next(int type, Unfinished *u) {
    int each = (u->pixels + TOGETHER - 1) / TOGETHER, group = --u->left, v = group / each;
    int first = group % each * TOGETHER, c = u->panel.first + v * VL, left = u->panel.count - v * VL;
    add_to(u->sums, c, left, finish(u->o, type, u->n, u->pixel + first, least(TOGETHER, u->pixels - first), c, left,
                                    u->acc + v));
}

#include "blocks.h"

static inline __attribute__((always_inline)) void direct(const Op *o, int type, const Task *t, Needs needs) {
    int h = o->h / o->stride, w = o->w / o->stride, part = o->c / o->groups, size = size_of(type);
    int k = o->kernel, merged = o->inputs == 1 && o->groups == 1; /* neighbouring pixels are one run */
    int runs = merged ? k : k * k * o->inputs, words = ((merged ? k * o->pitch : part) * size + 3) / 4;
    int64_t column = (int64_t)o->pitch * size, row = (o->w + 2 * o->edge) * column, offset[MOST_PIXELS + BLOCK];
    int64_t y_size = size_of(o->y_type);
    int64_t first = t->n * (o->h + 2 * o->edge) * row + (o->edge - k / 2) * (row + column); /* tap of a picture */
    Pixel pixel[MOST_PIXELS];
    int turn = 0, count = t->stop - t->start, pixels = block_pixels(type, w, count);
    for (int i = 0, from = 0, at_row = t->start / w, at_column = t->start % w; i < count; i++) {
        pixel[i] = pixel_of(o, t->n, h, w, at_row, at_column, from * NV);
        offset[i] = at_row * o->stride * row + at_column * o->stride * column;
        if (++from == pixels) from = 0;
        if (++at_column == w) at_column = 0, at_row++;
    }
    for (int i = 0; i < BLOCK; i++) offset[count + i] = offset[count - 1];
    float *sums = sums_of(o, t);
    begin_blocks(type, pixels);
    vf acc[BLOCKS][BLOCK][NV];
    Unfinished before = {0};
    int64_t stored = (int64_t)runs * stored_words(type, words), length = stored * 4 * NR;
    int64_t share = 4 * NR / ((count + pixels - 1) / pixels);
    for (int j = t->panel_start; j < t->panel_stop; j++) {
        Panel panel = o->panels[j];
        const char *base[MOST_RUNS], *b = o->weight + j * length;
        for (int r = 0; r < runs; r++) {
            const char *x = o->x[merged ? 0 : r / (k * k)] + first + panel.group * part * size;
            base[r] = merged ? x + r * row : x + r % (k * k) / k * row + r % k * column;
        }
        clear(sums, panel);
        for (int i = 0; i < count; i += pixels) {
            Ahead ahead = {b + length + i / pixels * stored * share, share}; /* of the next panel */
            if (i == 0 && j == t->panel_start) ahead = (Ahead){b + NEAR, 4 * NR};
            int some = least(pixels, count - i);
            for (int p = i; p < i + some; p++)
                fetch_to_write(o->y + (pixel[p].at + panel.first) * y_size, panel.count * y_size);
            if (before.left && o->multiply) wait_for(needs.gate, 1, needs.spins);
            const vf *made = acc[turn][0];
            multiply_block(pixels, some, panel.count, type, b, ahead, base, offset + i, runs, words, (float *)made,
                           &before);
            if (is_tiled(type)) {
                before = unfinished(o, t->n, pixel + i, some, panel, made, sums);
                turn = !turn;
                continue;
            }
            if (o->multiply) wait_for(needs.gate, 1, needs.spins);
            for (int v = 0; v * VL < panel.count; v++) {
                int c = panel.first + v * VL, left = panel.count - v * VL;
                add_to(sums, c, left, finish(o, type, t->n, pixel + i, some, c, left, made + v));
            }
        }
    }
    end_blocks(type);
    if (before.left && o->multiply) wait_for(needs.gate, 1, needs.spins);
    finish_rest(type, &before);
}
