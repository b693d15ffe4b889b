/* Convolutions, direct or, where they are 3x3, by Winograd's algorithms, for each type of values. */

enum { MAX_RUNS = 18, MAX_PIXELS = 256 /* of a task */ };

static inline int least(int a, int b) { return a < b ? a : b; }

/* For each of `rows` rows i, to + i * step gets the sum over runs r and words k of row(r, i)[k] times b, a panel's
 * weights, of which it takes so many vectors; rows stand at base[r] + pixel[i]. */
static inline __attribute__((always_inline)) void multiply_rows(
    int rows, int vectors, int type, const char *b, const char *const *base, const int64_t *pixel, int runs, int words,
    float *to, int64_t step) {
    vf sum[MR][NV] = {0};
    for (int r = 0; r < runs; r++) {
        const char *row[MR];
        for (int i = 0; i < rows; i++) row[i] = base[r] + pixel[i];
        for (int k = 0; k < words; k++, b += 4 * NR) {
            vi w[NV];
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

/* The same for any number of rows, of which it takes up to MR: there may be so many in the table, and in `to`. count:
 * channels of the panel; one vector does for few of them. */
static inline __attribute__((always_inline)) void multiply_tile(
    int rows, int count, int type, const char *b, const char *const *base, const int64_t *pixel, int runs, int words,
    float *to, int64_t step) {
    if (count <= VL)
        multiply_rows(MR, 1, type, b, base, pixel, runs, words, to, step);
    else if (rows > 4)
        multiply_rows(MR, NV, type, b, base, pixel, runs, words, to, step);
    else if (rows > 2)
        multiply_rows(4, NV, type, b, base, pixel, runs, words, to, step);
    else
        multiply_rows(2, NV, type, b, base, pixel, runs, words, to, step);
}

#include "blocks.h"

/* Stores v, whose values stand from y + at on and `count` of which are left, and adds what was stored to its sums,
 * where somebody reads them. */
static inline void keep(const Op *o, int64_t at, float *sums, int count, vf v) {
    if (o->y_type == U8) {
        v = nearest(clamp(v * o->per_step, -o->zero, 255.0f - o->zero)) + o->zero;
        store_u8(o->y + at, v, count);
        if (o->copy) store(o->copy + at, (v - o->zero) * o->step, count);
    } else if (o->y_type == BF16) {
        v = (vf)to_bf16(v);
        store_bf16(o->y + 2 * at, (vi)v, count);
        if (o->copy) store(o->copy + at, v, count);
    } else
        store((float *)o->y + at, v, count);
    if (sums) store(sums, load(sums) + v, count);
}

/* A task's row of the sums; nothing where nobody reads them. */
static inline float *sums_of(const Op *o, const Task *t) {
    return o->sums ? o->sums + ((int64_t)t->n * o->chunks + t->chunk) * o->cout : NULL;
}

static inline float *from(float *sums, int c) { return sums ? sums + c : NULL; }

static inline void clear(float *sums, Panel panel) {
    if (sums) memset(sums + panel.first, 0, panel.count * sizeof *sums);
}

/* Where a pixel of the output stands, in values; where the same one of x stands with stride 1; which taps it lacks. */
typedef struct {
    int64_t at, of_x;
    int lacks;
} Pixel;

/* Taps that are missing along one side, of `size` pixels of x: the first ones, and the last ones. */
static inline int lacking(const Op *o, int at, int size) {
    int reach = o->kernel / 2, first = reach - at * o->stride, last = at * o->stride + reach - (size - 1);
    return (first > 0 ? first : 0) + (reach + 1) * (last > 0 ? last : 0);
}

static inline int64_t place(int n, int h, int w, int edge, int row, int column) {
    return ((int64_t)n * (h + 2 * edge) + row + edge) * (w + 2 * edge) + column + edge;
}

static inline Pixel pixel_of(const Op *o, int n, int h, int w, int row, int column) {
    int ways = (o->kernel / 2 + 1) * (o->kernel / 2 + 1);
    int lacks = o->border ? ways * lacking(o, row, o->h) + lacking(o, column, o->w) : 0;
    int64_t at = place(n, h, w, 1, row, column);
    return (Pixel){at, o->edge == 1 ? at : place(n, h, w, o->edge, row, column), lacks};
}

/* Gate, bias, identity, residual and activation of the vector of channels from c on, `count` of which are left to
 * store. */
static inline __attribute__((always_inline)) void finish(
    const Op *o, int type, int n, Pixel p, float *sums, int c, int count, vf v) {
    if (type == U8)
        v = __builtin_convertvector((vi)v - *(const vi *)(o->weight_zero + c), vf) * load(o->weight_step + c);
    v += load(o->bias + p.lacks * o->cout + c);
    if (o->scale)
        v += widen(type, o->x[0] + (p.of_x * o->c + c) * size_of(type)) * load(o->multiply + (int64_t)n * o->cout + c) +
             load(o->add + (int64_t)n * o->cout + c);
    else if (o->multiply)
        v *= load(o->multiply + (int64_t)n * o->cout + c);
    if (o->residual) v += widen(type, o->residual + (p.at * o->cout + c) * size_of(type));
    if (o->activation == SILU)
        v *= sigmoid(v);
    else if (o->activation == RELU)
        v = blend(v < 0.0f, (vf){0}, v);
    keep(o, p.at * o->cout + c, from(sums, c), count, v);
}

static inline __attribute__((always_inline)) void direct(const Op *o, int type, const Task *t, Count *gate) {
    int h = o->h / o->stride, w = o->w / o->stride, part = o->c / o->groups, size = size_of(type);
    int k = o->kernel, merged = o->inputs == 1 && o->groups == 1; /* neighbouring pixels are one run */
    int runs = merged ? k : k * k * o->inputs, words = ((merged ? k * o->c : part) * size + 3) / 4;
    int64_t column = (int64_t)o->c * size, row = (o->w + 2 * o->edge) * column, offset[MAX_PIXELS + BLOCK];
    int64_t first = t->n * (o->h + 2 * o->edge) * row + (o->edge - k / 2) * (row + column); /* tap of a picture */
    Pixel pixel[MAX_PIXELS];
    int count = t->stop - t->start;
    for (int i = 0; i < count; i++) {
        int at_row = (t->start + i) / w, at_column = (t->start + i) % w;
        pixel[i] = pixel_of(o, t->n, h, w, at_row, at_column);
        offset[i] = at_row * o->stride * row + at_column * o->stride * column;
    }
    for (int i = 0; i < BLOCK; i++) offset[count + i] = offset[count - 1];
    float *sums = sums_of(o, t);
    int pixels = block_pixels(type, w);
    begin_blocks(type, pixels, words);
    for (int j = t->panel_start; j < t->panel_stop; j++) {
        Panel panel = o->panels[j];
        const char *base[MAX_RUNS], *b = o->weight + (int64_t)j * runs * words * 4 * NR;
        for (int r = 0; r < runs; r++) {
            const char *x = o->x[merged ? 0 : r / (k * k)] + first + panel.group * part * size;
            base[r] = merged ? x + r * row : x + r % (k * k) / k * row + r % k * column;
        }
        clear(sums, panel);
        for (int i = 0; i < count; i += pixels) {
            vf acc[BLOCK][NV];
            multiply_block(pixels, count - i, panel.count, type, b, base, offset + i, runs, words, (float *)acc);
            if (o->multiply) wait_for(gate, 1);
            for (int m = 0; m < least(pixels, count - i); m++)
                for (int v = 0; v * VL < panel.count; v++)
                    finish(o, type, t->n, pixel[i + m], sums, panel.first + v * VL, panel.count - v * VL, acc[m][v]);
        }
    }
    end_blocks(type);
}

/* Winograd's algorithms, along one side: from as many pixels as points to products of transformed pixels and taps. */
static inline int outs_of(int how) { return how == F4 ? 4 : 2; }
static inline int points_of(int how) { return how == F4 ? 6 : how == F2 ? 4 : 5; }

static inline __attribute__((always_inline)) void to_points(int how, const vf *d, vf *t, int step) {
    if (how == F2)
        t[0] = d[0] - d[2], t[step] = d[1] + d[2], t[2 * step] = d[2] - d[1], t[3 * step] = d[1] - d[3];
    else if (how == F4) {
        vf a = d[4] - 4.0f * d[2], b = d[3] - 4.0f * d[1], c = d[4] - d[2], e = 2.0f * (d[3] - d[1]);
        t[0] = 4.0f * d[0] - 5.0f * d[2] + d[4], t[step] = a + b, t[2 * step] = a - b, t[3 * step] = c + e;
        t[4 * step] = c - e, t[5 * step] = 4.0f * d[1] - 5.0f * d[3] + d[5];
    } else
        t[0] = d[0] - d[2], t[step] = d[2], t[2 * step] = d[4] - d[2], t[3 * step] = d[1], t[4 * step] = d[3];
}

static inline __attribute__((always_inline)) void from_points(int how, const vf *m, vf *y, int step) {
    if (how == F2)
        y[0] = m[0] + m[1] + m[2], y[step] = m[1] - m[2] - m[3];
    else if (how == F4) {
        vf a = m[1] + m[2], b = m[1] - m[2], c = m[3] + m[4], e = m[3] - m[4];
        y[0] = m[0] + a + c, y[step] = b + 2.0f * e, y[2 * step] = a + 4.0f * c, y[3 * step] = b + 8.0f * e + m[5];
    } else
        y[0] = m[0] + m[1] + m[3], y[step] = m[1] + m[2] + m[4];
}

/* A tile's vector of channels to its planes; pixels at row[i] + column[j], steps in bytes */
static inline __attribute__((always_inline)) void transform_input(
    int how, int type, const char *d, const int64_t *row, const int64_t *column, char *v, int64_t plane) {
    int points = points_of(how);
    vf t[6][6], x[6], y[6];
    for (int j = 0; j < points; j++) {
        for (int i = 0; i < points; i++) x[i] = widen(type, d + row[i] + column[j]);
        to_points(how, x, &t[0][j], 6);
    }
    for (int i = 0; i < points; i++) {
        to_points(how, t[i], y, 1);
        for (int j = 0; j < points; j++, v += plane)
            if (type == BF16)
                store_bf16(v, to_bf16(y[j]), VL);
            else
                store((float *)v, y[j], VL);
    }
}

/* The pixels of a tile, row by row, from its planes. */
static inline __attribute__((always_inline)) void transform_output(int how, const float *m, int64_t plane, vf *y) {
    int points = points_of(how), outs = outs_of(how);
    vf s[6][4], x[6];
    for (int i = 0; i < points; i++) {
        for (int j = 0; j < points; j++, m += plane) x[j] = load(m);
        from_points(how, x, s[i], 1);
    }
    for (int j = 0; j < outs; j++) {
        for (int i = 0; i < points; i++) x[i] = s[i][j];
        from_points(how, x, y + j, outs);
    }
}

/* Lavin and Gray, "Fast algorithms for convolutional neural networks", 2015: of 9 products for a pixel, F2 leaves 4
 * and F4 2.25. With stride 2, S2 leaves 6.25: taps 0 and 2 of a side meet every other pixel, as in F(2, 2), and tap 1
 * the others. In BF16 the parts of all inputs together fill whole words. */
static inline __attribute__((always_inline)) void winograd(
    const Op *o, int how, int type, const Task *t, Count *gate, char *scratch) {
    int outs = outs_of(how), points = points_of(how), planes = points * points;
    int h = o->h / o->stride, w = o->w / o->stride, columns = (w + outs - 1) / outs;
    int tiles = t->stop - t->start, part = o->c / o->groups, k = part * o->inputs;
    int size = size_of(type), words = k * size / 4;
    int64_t step = (int64_t)o->c * size, v_row = (k * o->groups + VL) * size, v_plane = tiles * v_row;
    int64_t m_row = (t->panel_stop - t->panel_start) * NR + VL, m_plane = (tiles + MR) * m_row;
    char *v = scratch;
    float *m = (float *)(scratch + (planes * v_plane + 63) / 64 * 64);
    for (int i = 0; i < tiles; i++) {
        int at_row = (t->start + i) / columns * outs * o->stride, at_column = (t->start + i) % columns * outs * o->stride;
        int64_t row[6], column[6]; /* a tile that reaches over the edge reads zeros of the border */
        for (int j = 0; j < points; j++) {
            row[j] = ((int64_t)t->n * (o->h + 2) + least(at_row + j, o->h + 1)) * (o->w + 2) * step;
            column[j] = least(at_column + j, o->w + 1) * step;
        }
        for (int s = 0; s < o->groups * o->inputs; s++) /* in this order, as a tail overruns into what follows it */
            for (int c = 0; c < part; c += VL)
                transform_input(how, type, o->x[s % o->inputs] + (s / o->inputs * part + c) * size, row, column,
                                v + i * v_row + (s * part + c) * size, v_plane);
    }
    int64_t offset[MAX_PIXELS + MR];
    for (int i = 0; i < tiles + MR; i++) offset[i] = least(i, tiles - 1) * v_row;
    for (int plane = 0; plane < planes; plane++)
        for (int j = t->panel_start; j < t->panel_stop; j++) {
            const char *base = v + plane * v_plane + o->panels[j].group * k * size;
            const char *b = o->weight + ((int64_t)plane * o->panel_count + j) * words * 4 * NR;
            float *to = m + plane * m_plane + (j - t->panel_start) * NR;
            for (int i = 0; i < tiles; i += MR)
                multiply_tile(tiles - i, o->panels[j].count, type, b, &base, offset + i, 1, words, to + i * m_row,
                              m_row);
        }
    float *sums = sums_of(o, t);
    for (int j = t->panel_start; j < t->panel_stop; j++) clear(sums, o->panels[j]);
    if (o->multiply) wait_for(gate, 1);
    for (int i = 0; i < tiles; i++) {
        int at_row = (t->start + i) / columns * outs, at_column = (t->start + i) % columns * outs;
        int rows = least(outs, h - at_row), width = least(outs, w - at_column);
        Pixel pixel[16];
        for (int q = 0; q < rows * width; q++)
            pixel[q] = pixel_of(o, t->n, h, w, at_row + q / width, at_column + q % width);
        for (int j = t->panel_start; j < t->panel_stop; j++)
            for (int c = 0; c < o->panels[j].count; c += VL) {
                vf y[16];
                transform_output(how, m + i * m_row + (j - t->panel_start) * NR + c, m_plane, y);
                for (int q = 0; q < rows * width; q++)
                    finish(o, type, t->n, pixel[q], sums, o->panels[j].first + c, o->panels[j].count - c,
                           y[q / width * outs + q % width]);
            }
    }
}
