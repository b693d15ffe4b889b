/* 3x3 convolutions by Winograd's algorithms (Lavin and Gray, "Fast algorithms for convolutional neural networks",
 * 2015).
 *
 * Along one side, a tile makes 2 or 4 pixels from as many products as it has points: F2 and F4, with stride 1, from 4
 * and 6 points, where taps would take 3 products a pixel; S2 and S4, with stride 2, from 5 and 9. There taps 0 and 2
 * meet every other pixel, as in F(2, 2) or F(4, 2), and tap 1 the rest, whose points all have the same weights. An F4
 * or S4 whose last tile has at most 2 pixels left takes the smaller one, whose points are among its own: so it needs no
 * other weights. */

enum { POINTS = 9, TAPS = 6, PLANES = TAPS * TAPS }; /* at most, of any algorithm */

static inline int outs_of(int kind) { return kind == F4 || kind == S4 ? 4 : 2; }
static inline int points_of(int kind) { return kind == F2 ? 4 : kind == F4 ? 6 : kind == S2 ? 5 : POINTS; }
static inline int kind_of(int algorithm, int left) {
    return left <= 2 && outs_of(algorithm) > 2 ? algorithm - 1 : algorithm;
}

/* How many transformed weights an algorithm has along a side. */
static inline int taps_along(int algorithm) { return outs_of(algorithm) == 2 ? 4 : TAPS; }

/* Which of the weights that the algorithm has along a side a point of a tile is multiplied by. */
static inline int taps_of(int algorithm, int kind, int point) {
    if (kind == algorithm) return kind == S2 ? least(point, 3) : least(point, 5);
    return kind == F2 ? (point < 3 ? point : 5) : (point < 2 ? point : point == 2 ? 4 : 5);
}

/* The most points of a tile, along a side, that are multiplied by the same weights. */
static inline int times(int algorithm, int taps) {
    return algorithm == S4 && taps == 5 ? 4 : algorithm == S2 && taps == 3 ? 2 : 1;
}

/* From the pixels of a tile, along a side, its points. A smaller tile at the end of F4's or S4's uses their weights,
 * for whose scale its points make up. */
static inline __attribute__((always_inline)) void to_points(int algorithm, int kind, const vf *d, vf *t, int step) {
    if (kind == F2) {
        const float a = algorithm == F4 ? 4.0f : 1.0f, b = algorithm == F4 ? -3.0f : 1.0f;
        t[0] = a * (d[0] - d[2]), t[step] = b * (d[1] + d[2]), t[2 * step] = b * (d[2] - d[1]);
        t[3 * step] = d[3] - d[1];
    } else if (kind == F4) {
        vf a = d[4] - 4.0f * d[2], b = d[3] - 4.0f * d[1], c = d[4] - d[2], e = 2.0f * (d[3] - d[1]);
        t[0] = 4.0f * d[0] - 5.0f * d[2] + d[4], t[step] = a + b, t[2 * step] = a - b, t[3 * step] = c + e;
        t[4 * step] = c - e, t[5 * step] = 4.0f * d[1] - 5.0f * d[3] + d[5];
    } else if (kind == S2) {
        const float a = algorithm == S4 ? 2.0f : 1.0f, b = algorithm == S4 ? -2.0f : 1.0f;
        t[0] = a * (d[0] - d[2]), t[step] = b * d[2], t[2 * step] = d[4] - d[2];
        t[3 * step] = d[1], t[4 * step] = d[3];
    } else {
        vf a = d[6] - d[2];
        t[0] = 2.0f * (d[0] - d[4]) + a, t[step] = a - d[2] - d[4], t[2 * step] = a + 3.0f * (d[2] - d[4]);
        t[3 * step] = a, t[4 * step] = d[8] - d[4] - 2.0f * a;
        t[5 * step] = d[1], t[6 * step] = d[3], t[7 * step] = d[5], t[8 * step] = d[7];
    }
}

static inline __attribute__((always_inline)) void from_points(int kind, const vf *m, vf *y, int step) {
    if (kind == F2)
        y[0] = m[0] + m[1] + m[2], y[step] = m[1] - m[2] + m[3];
    else if (kind == F4) {
        vf a = m[1] + m[2], b = m[1] - m[2], c = m[3] + m[4], e = m[3] - m[4];
        y[0] = m[0] + a + c, y[step] = b + 2.0f * e, y[2 * step] = a + 4.0f * c, y[3 * step] = b + 8.0f * e + m[5];
    } else if (kind == S2)
        y[0] = m[0] + m[1] + m[3], y[step] = m[1] + m[2] + m[4];
    else {
        vf a = m[1] + m[2], b = m[1] - m[2];
        y[0] = m[0] + a + m[3] + m[5], y[step] = b + 2.0f * m[3] + m[6];
        y[2 * step] = a + 4.0f * m[3] + m[7], y[3 * step] = b + 8.0f * m[3] + m[4] + m[8];
    }
}

/* As to_points and from_points, but of integers, which is exact: the points of 8-bit values fit 16 bits. Weights are
 * integers too, so pixels come out multiplied by 24 with F4, 6 with S4, 2 with F2 and 1 with S2, along each side. */
static inline __attribute__((always_inline)) void to_points_i16(int algorithm, int kind, const vs *d, vs *t, int step) {
    if (kind == F2) {
        vs a = d[1] + d[2], b = d[2] - d[1];
        t[0] = d[0] - d[2], t[step] = algorithm == F4 ? -a : a;
        t[2 * step] = algorithm == F4 ? -b : b, t[3 * step] = d[3] - d[1];
    } else if (kind == F4) {
        vs a = d[4] - 4 * d[2], b = d[3] - 4 * d[1], c = d[4] - d[2], e = 2 * (d[3] - d[1]);
        t[0] = 4 * d[0] - 5 * d[2] + d[4], t[step] = a + b, t[2 * step] = a - b, t[3 * step] = c + e;
        t[4 * step] = c - e, t[5 * step] = 4 * d[1] - 5 * d[3] + d[5];
    } else if (kind == S2) {
        t[0] = d[0] - d[2], t[step] = algorithm == S4 ? -d[2] : d[2], t[2 * step] = d[4] - d[2];
        t[3 * step] = d[1], t[4 * step] = d[3];
    } else {
        vs a = d[6] - d[2];
        t[0] = 2 * (d[0] - d[4]) + a, t[step] = a - d[2] - d[4], t[2 * step] = a + 3 * (d[2] - d[4]);
        t[3 * step] = a, t[4 * step] = d[8] - d[4] - 2 * a;
        t[5 * step] = d[1], t[6 * step] = d[3], t[7 * step] = d[5], t[8 * step] = d[7];
    }
}

static inline __attribute__((always_inline)) void from_points_i32(int kind, const vu *m, vu *y, int step) {
    if (kind == F2)
        y[0] = 2 * m[0] + m[1] + m[2], y[step] = m[1] - m[2] + 2 * m[3];
    else if (kind == F4) {
        vu a = 4 * (m[1] + m[2]), b = 4 * (m[1] - m[2]), c = m[3] + m[4], e = m[3] - m[4];
        y[0] = 6 * m[0] + a + c, y[step] = b + 2 * e, y[2 * step] = a + 4 * c, y[3 * step] = b + 8 * (e + 3 * m[5]);
    } else if (kind == S2)
        y[0] = m[0] + m[1] + m[3], y[step] = m[1] + m[2] + m[4];
    else {
        vu a = 3 * m[1] + m[2], b = 3 * m[1] - m[2];
        y[0] = 3 * m[0] + a + m[3] + 6 * m[5], y[step] = b + 2 * m[3] + 6 * m[6];
        y[2 * step] = a + 4 * m[3] + 6 * m[7], y[3 * step] = b + 8 * m[3] + 6 * (m[4] + m[8]);
    }
}

/* A tile's vector of channels to its points' rows of v; pixels at row[i] + column[j], steps in bytes. Sends for those
 * that stand so far ahead, of the next tile. */
static inline __attribute__((always_inline)) void transform_input(
    int algorithm, int type, int down, int across, int64_t ahead, const char *d, const int64_t *row,
    const int64_t *column, char *v, const int64_t *where) {
    vf t[POINTS][POINTS], x[POINTS];
    for (int j = 0; j < points_of(across); j++) {
        for (int i = 0; i < points_of(down); i++) {
            x[i] = widen(type, d + row[i] + column[j]);
            fetch(0, d + row[i] + column[j] + ahead, 1);
        }
        to_points(algorithm, down, x, &t[0][j], POINTS);
    }
    for (int i = 0; i < points_of(down); i++) {
        to_points(algorithm, across, t[i], x, 1);
        for (int j = 0; j < points_of(across); j++)
            if (type == BF16)
                store_bf16(v + where[i * POINTS + j], to_bf16(x[j]), VL);
            else
                store((float *)(v + where[i * POINTS + j]), x[j], VL);
    }
}

static inline __attribute__((always_inline)) void transform_input_i16(
    int algorithm, int down, int across, int64_t ahead, const char *d, const int64_t *row, const int64_t *column,
    char *v, const int64_t *where) {
    vs t[POINTS][POINTS], x[POINTS];
    for (int j = 0; j < points_of(across); j++) {
        for (int i = 0; i < points_of(down); i++) {
            x[i] = shorts_from_u8(d + row[i] + column[j]);
            fetch(0, d + row[i] + column[j] + ahead, 1);
        }
        to_points_i16(algorithm, down, x, &t[0][j], POINTS);
    }
    for (int i = 0; i < points_of(down); i++) {
        to_points_i16(algorithm, across, t[i], x, 1);
        for (int j = 0; j < points_of(across); j++) *(vs *)(v + where[i * POINTS + j]) = x[j];
    }
}

/* The pixels of a tile, row by row, from its points. */
static inline __attribute__((always_inline)) void transform_output(
    int down, int across, const char *m, const int64_t *where, vf *y) {
    vf s[POINTS][4], x[POINTS];
    for (int i = 0; i < points_of(down); i++) {
        for (int j = 0; j < points_of(across); j++) x[j] = load((const float *)(m + where[i * POINTS + j]));
        from_points(across, x, s[i], 1);
    }
    for (int j = 0; j < outs_of(across); j++) {
        for (int i = 0; i < points_of(down); i++) x[i] = s[i][j];
        from_points(down, x, y + j, 4);
    }
}

/* The pixels of a tile of integers, which come out of from_points_i32 as multiples: their factors of 3 are divided out
 * modulo 2^32, by the inverse of 3, and then their powers of 2 by a shift. So intermediate sums may wrap around; only a
 * pixel times its powers of 2 must fit 32 bits. */
static inline __attribute__((always_inline)) void transform_output_i32(
    int down, int across, const char *m, const int64_t *where, vf *y) {
    vu s[POINTS][4], x[POINTS], pixels[4];
    const uint32_t third = 0xaaaaaaabu; /* times 3 it is 1 */
    int threes = (down == F4 || down == S4) + (across == F4 || across == S4);
    int twos = (down == F4 ? 3 : down != S2) + (across == F4 ? 3 : across != S2);
    for (int i = 0; i < points_of(down); i++) {
        for (int j = 0; j < points_of(across); j++) x[j] = *(const vu *)(m + where[i * POINTS + j]);
        from_points_i32(across, x, s[i], 1);
    }
    for (int j = 0; j < outs_of(across); j++) {
        for (int i = 0; i < points_of(down); i++) x[i] = s[i][j];
        from_points_i32(down, x, pixels, 1);
        for (int i = 0; i < outs_of(down); i++) {
            if (threes) pixels[i] *= threes == 2 ? third * third : third;
            y[4 * i + j] = (vf)((vi)pixels[i] >> twos);
        }
    }
}

/* CALL with the kinds of a tile as constants: the algorithm's own or, where it has one, the smaller one. */
#define WITH_KINDS(CALL) \
    if (down == algorithm && across == algorithm) \
        CALL(algorithm, algorithm); \
    else if (down == algorithm) \
        CALL(algorithm, algorithm - 1); \
    else if (across == algorithm) \
        CALL(algorithm - 1, algorithm); \
    else \
        CALL(algorithm - 1, algorithm - 1)

/* A tile: its first pixel, its algorithm down and across, and how many of its rows and columns lie inside. */
typedef struct {
    int row, column, down, across, rows, columns;
} Tile;

static inline __attribute__((always_inline)) Tile tile_at(int algorithm, int i, int h, int w) {
    int outs = outs_of(algorithm), columns = (w + outs - 1) / outs;
    int row = i / columns * outs, column = i % columns * outs;
    int down = kind_of(algorithm, h - row), across = kind_of(algorithm, w - column);
    return (Tile){row, column, down, across, least(outs_of(down), h - row), least(outs_of(across), w - column)};
}

/* Gives the points of a tile their rows, each the next of its plane: their places in bytes, of rows so long. */
static inline __attribute__((always_inline)) void take_rows(
    int algorithm, int down, int across, int *next, int64_t length, int64_t *where) {
    for (int i = 0; i < points_of(down); i++)
        for (int j = 0; j < points_of(across); j++)
            where[i * POINTS + j] = next[taps_of(algorithm, down, i) * TAPS + taps_of(algorithm, across, j)]++ * length;
}

/* A task's rows: the first of each plane, a pair of weights along both sides, and how long they are, in bytes. */
typedef struct {
    int first[PLANES], total;
    int64_t length;
} Rows;

static inline __attribute__((always_inline)) Rows planes_of(const Op *o, int algorithm, int type, int tiles) {
    Rows rows = {.length = (int64_t)o->c * o->inputs * size_of(type) + 4 * VL};
    for (int i = 0; i < PLANES; i++) { /* and a row between them, lest their lines meet in the same set of the cache */
        rows.first[i] = rows.total;
        if (i / TAPS < taps_along(algorithm) && i % TAPS < taps_along(algorithm))
            rows.total += tiles * times(algorithm, i / TAPS) * times(algorithm, i % TAPS) + 1;
    }
    return rows;
}

/* Where a task's rows are, if they are shared. */
static inline char *rows_at(const Op *o, const Task *t) {
    return o->rows + ((int64_t)t->n * o->chunks + t->chunk) * o->rows_size;
}

/* The inputs' channels from `from` to `to`, counted through all inputs of a group and then the groups, to rows at v */
static inline __attribute__((always_inline)) void transform(
    const Op *o, int algorithm, int type, const Task *t, int from, int to, char *v) {
    int h = o->h / o->stride, w = o->w / o->stride, part = o->c / o->groups, size = size_of(o->x_type);
    int64_t step = (int64_t)o->pitch * size, ahead = outs_of(algorithm) * o->stride * step, where[POINTS * POINTS];
    Rows rows = planes_of(o, algorithm, type, t->stop - t->start);
    for (int i = t->start; i < t->stop; i++) {
        Tile tile = tile_at(algorithm, i, h, w);
        int down = tile.down, across = tile.across;
        int64_t row[POINTS], column[POINTS]; /* a tile that reaches over the edge reads zeros of the border */
        for (int j = 0; j < POINTS; j++) {
            row[j] = ((int64_t)t->n * (o->h + 2 * EDGE) +
                      least(tile.row * o->stride + j + (EDGE - 1), o->h + (2 * EDGE - 1))) *
                     (o->w + 2 * EDGE) * step;
            column[j] = least(tile.column * o->stride + j + (EDGE - 1), o->w + (2 * EDGE - 1)) * step;
        }
#define TAKE(DOWN, ACROSS) take_rows(algorithm, DOWN, ACROSS, rows.first, rows.length, where)
        WITH_KINDS(TAKE);
        for (int s = 0; s < o->groups * o->inputs; s++) /* in this order, as a tail overruns into what follows it */
            for (int c = 0; c < part; c += type == I16 ? 2 * VL : VL) {
                if (s * part + c < from || s * part + c >= to) continue;
                const char *x = o->x[s % o->inputs] + (s / o->inputs * part + c) * size;
                char *y = v + (s * part + c) * size_of(type);
#define TRANSFORM_IN(DOWN, ACROSS) \
    type == I16 ? transform_input_i16(algorithm, DOWN, ACROSS, ahead, x, row, column, y, where) \
                : transform_input(algorithm, type, DOWN, ACROSS, ahead, x, row, column, y, where)
                WITH_KINDS(TRANSFORM_IN);
            }
    }
}

/* Products of a task's rows at v and the weights of `some` panels from j on, plane by plane: for each panel its rows at
 * m, m_size behind the other's. A plane's rows stay in the second cache for the next panel. In BF16 the parts of all
 * inputs together fill whole words. */
static inline __attribute__((always_inline)) void multiply_planes(
    const Op *o, int algorithm, int type, const Rows *rows, const int *count, const char *v, int j, int some, char *m,
    int64_t m_size) {
    int taps = taps_along(algorithm), k = o->c / o->groups * o->inputs, size = size_of(type), words = k * size / 4;
    int64_t offset[MR], length = (int64_t)words * 4 * NR, all = taps * taps * length; /* of weights */
    for (int i = 0; i < MR; i++) offset[i] = i * rows->length;
    for (int plane = 0; plane < PLANES; plane++) {
        if (plane / TAPS >= taps || plane % TAPS >= taps) continue;
        int each = rows_of_block(count[plane]);
        int blocks = (count[plane] + each - 1) / each; /* none of what the smaller tiles lack */
        int64_t share = blocks ? 4 * NR / blocks : 0;
        for (int p = 0; p < some; p++) {
            Panel panel = o->panels[j + p];
            const char *b = o->weight + (j + p) * all + (plane / TAPS * taps + plane % TAPS) * length;
            /* each sends for its share of the next weights */
            Ahead ahead = {p + 1 < some ? b + all : b - p * all + length, share};
            for (int i = 0; i < count[plane]; i += each, ahead.at += words * share) {
                int row = rows->first[plane] + i;
                const char *base = v + row * rows->length + panel.group * k * size;
                multiply_tile(least(each, count[plane] - i), panel.count, type, b, ahead, &base, offset, 1, words,
                              (float *)(m + p * m_size + row * (int64_t)(4 * NR)), NR);
            }
        }
    }
}

/* The rows of a task's tiles, at o->rows or, where nobody shares them, in scratch, multiplied by their planes' weights,
 * some panels at a time, so that what they make stays in the second cache, and transformed back. */
static inline __attribute__((always_inline)) void winograd(
    const Op *o, int algorithm, int type, const Task *t, Needs needs, char *scratch) {
    int h = o->h / o->stride, w = o->w / o->stride, tiles = t->stop - t->start, count[PLANES], next[PLANES];
    int64_t where[POINTS * POINTS], m_row = 4 * NR, y_size = size_of(o->y_type);
    Rows rows = planes_of(o, algorithm, type, tiles);
    int64_t m_size = (rows.total + MR) * m_row;
    char *v = o->rows ? rows_at(o, t) : scratch;
    char *made = o->rows ? scratch : scratch + ((rows.total + MR) * rows.length + 63) / 64 * 64;
    memcpy(next, rows.first, sizeof next);
    for (int i = t->start; i < t->stop; i++) {
        Tile tile = tile_at(algorithm, i, h, w);
        int down = tile.down, across = tile.across;
#define COUNT(DOWN, ACROSS) take_rows(algorithm, DOWN, ACROSS, next, 0, where)
        WITH_KINDS(COUNT);
    }
    for (int i = 0; i < PLANES; i++) count[i] = next[i] - rows.first[i];
    float *sums = sums_of(o, t);
    for (int j = t->panel_start; j < t->panel_stop; j++) {
        Panel panel = o->panels[j];
        int after = (j - t->panel_start) % PANELS; /* of those that were multiplied together */
        const char *m = made + after * m_size;
        if (!after)
            multiply_planes(o, algorithm, type, &rows, count, v, j, least(PANELS, t->panel_stop - j), made, m_size);
        clear(sums, panel);
        memcpy(next, rows.first, sizeof next);
        if (o->multiply) wait_for(needs.gate, 1, needs.spins);
        for (int i = t->start; i < t->stop; i++) {
            Tile tile = tile_at(algorithm, i, h, w);
            int down = tile.down, across = tile.across, pixels = 0;
            Pixel pixel[16];
            for (int r = 0; r < tile.rows; r++)
                for (int s = 0; s < tile.columns; s++, pixels++) {
                    pixel[pixels] = pixel_of(o, t->n, h, w, tile.row + r, tile.column + s, 4 * r + s);
                    fetch_to_write(o->y + (pixel[pixels].at + panel.first) * y_size, panel.count * y_size);
                }
#define TAKE_BACK(DOWN, ACROSS) take_rows(algorithm, DOWN, ACROSS, next, m_row, where)
            WITH_KINDS(TAKE_BACK);
            for (int c = 0; c < panel.count; c += VL) {
                vf y[16];
#define TRANSFORM_BACK(DOWN, ACROSS) \
    type == I16 ? transform_output_i32(DOWN, ACROSS, m + 4 * c, where, y) \
                : transform_output(DOWN, ACROSS, m + 4 * c, where, y)
                WITH_KINDS(TRANSFORM_BACK);
                int first = panel.first + c, left = panel.count - c;
                add_to(sums, first, left, finish(o, type == I16 ? U8 : type, t->n, pixel, pixels, first, left, y));
            }
        }
    }
}
#undef WITH_KINDS
#undef TAKE
#undef TRANSFORM_IN
#undef COUNT
#undef TAKE_BACK
#undef TRANSFORM_BACK
