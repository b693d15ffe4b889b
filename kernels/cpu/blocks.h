/* Products of a block: some pixels by a panel's channels, a vector of products at a time or, of BF16 and U8, by AMX,
 * whose tiles hold up to 16 pixels, 16 channels or words, and 64 bytes of each. */

#ifndef __AMX_TILE__

enum { BLOCK = MR };

static inline int block_pixels(int type, int w, int count) { return rows_of_block(count); }
static inline void begin_blocks(int type, int pixels, int words) {}
static inline void end_blocks(int type) {}

/* Not inlined, lest what `direct` needs afterwards takes registers from the products. */
static __attribute__((noinline)) void multiply_block(
    int pixels, int left, int count, int type, const char *b, Ahead ahead, const char *const *base,
    const int64_t *pixel, int runs, int words, float *to) {
    if (type == F32) multiply_tile(left, count, F32, b, ahead, base, pixel, runs, words, to, NR);
    if (type == BF16) multiply_tile(left, count, BF16, b, ahead, base, pixel, runs, words, to, NR);
    if (type == U8) multiply_tile(left, count, U8, b, ahead, base, pixel, runs, words, to, NR);
}

#else

enum { SIDE = 16, BLOCK = 2 * SIDE };

/* The most that a block takes of features w pixels wide. Where tiles fill rows evenly, few reach over the end of one,
 * so that their pixels stand evenly apart. */
static inline int block_pixels(int type, int w, int count) {
    if (type == F32) return rows_of_block(count);
    for (int side = SIDE; side >= SIDE - 4; side--)
        if (w % side == 0) return 2 * side;
    return 2 * SIDE;
}

/* Before blocks of so many pixels and words: 0 to 3 are sums, pixels by channels; 4 and 5 factors of 16 words, pixels
 * and weights; 6 and 7 the same for the words that are left of a run. */
static inline void begin_blocks(int type, int pixels, int words) {
    if (type == F32) return;
    struct {
        uint8_t palette, start, unused[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } shapes = {.palette = 1};
    int rest = words % SIDE;
    for (int i = 0; i < (rest ? 8 : 6); i++) shapes.rows[i] = pixels / 2, shapes.bytes[i] = 4 * SIDE;
    shapes.rows[5] = SIDE, shapes.rows[7] = rest, shapes.bytes[6] = 4 * rest;
    __asm__ volatile("ldtilecfg %0" ::"m"(shapes));
}

static inline void end_blocks(int type) {
    if (type != F32) _tile_release();
}

/* Half of a block: where its pixels are, and how far apart; copies of theirs are a tile's width apart. */
typedef struct {
    const int64_t *pixel;
    int64_t apart;
    int count, copied;
} Half;

static inline Half half_of(const int64_t *pixel, int count) {
    int64_t apart = pixel[1] - pixel[0];
    int even = apart > 0;
    for (int i = 2; i < count; i++) even &= pixel[i] - pixel[i - 1] == apart;
    return (Half){pixel, even ? apart : 4 * SIDE, count, !even};
}

static inline __attribute__((always_inline)) const char *rows_of(
    const Half *h, const char *base, int bytes, char *copy) {
    if (!h->copied) return base + h->pixel[0];
    for (int i = 0; i < h->count; i++) memcpy(copy + i * 4 * SIDE, base + h->pixel[i], bytes);
    return copy;
}

/* the compiler's own does not know that memory is read */
#define LOAD(tile, at, apart) \
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm" #tile ::"r"(at), "r"((int64_t)(apart)) : "memory")
#define ADD(sum, x, w) \
    if (type == BF16) \
        _tile_dpbf16ps(sum, x, w); \
    else \
        _tile_dpbusd(sum, x, w)
/* bytes: of each pixel, from where base and b are now. */
#define STEP(X, W, bytes) \
    const char *upper = rows_of(&half[0], base[r] + 4 * k, bytes, copy[0]); \
    LOAD(W, b + 4 * k * NR, 4 * NR); \
    LOAD(X, upper, half[0].apart); \
    ADD(0, X, W); \
    if (halves == 2) { \
        LOAD(X, rows_of(&half[1], base[r] + 4 * k, bytes, copy[1]), half[1].apart); \
        ADD(2, X, W); \
    } \
    if (vectors == 2) { \
        LOAD(W, b + 4 * (k * NR + VL), 4 * NR); \
        if (halves == 2) { \
            ADD(3, X, W); \
            LOAD(X, upper, half[0].apart); \
        } \
        ADD(1, X, W); \
    }

static inline __attribute__((always_inline)) void multiply_halves(
    int halves, int vectors, int type, const char *b, const char *const *base, const Half *half, int runs, int words,
    float *to) {
    char copy[2][SIDE * 4 * SIDE] __attribute__((aligned(64)));
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int r = 0; r < runs; r++, b += words * 4 * NR) {
        int k = 0;
        for (; k + SIDE <= words; k += SIDE) {
            STEP(4, 5, 4 * SIDE)
        }
        if (k < words) {
            STEP(6, 7, 4 * (words - k))
        }
    }
    _tile_stored(0, to, 4 * NR);
    if (vectors == 2) _tile_stored(1, to + VL, 4 * NR);
    if (halves == 2) _tile_stored(2, to + half->count * NR, 4 * NR);
    if (halves == 2 && vectors == 2) _tile_stored(3, to + half->count * NR + VL, 4 * NR);
}
#undef STEP
#undef ADD
#undef LOAD

/* To `to` [pixels][NR] the sums that `multiply_rows` explains, of blocks between begin_blocks and end_blocks; left:
 * pixels that are there. The table has BLOCK more than that. */
static inline __attribute__((always_inline)) void multiply_block(
    int pixels, int left, int count, int type, const char *b, Ahead ahead, const char *const *base,
    const int64_t *pixel, int runs, int words, float *to) {
    if (type == F32) {
        multiply_tile(left, count, type, b, ahead, base, pixel, runs, words, to, NR);
        return;
    }
    Half half[2] = {half_of(pixel, pixels / 2), half_of(pixel + pixels / 2, pixels / 2)};
    if (count <= VL)
        left > pixels / 2 ? multiply_halves(2, 1, type, b, base, half, runs, words, to)
                          : multiply_halves(1, 1, type, b, base, half, runs, words, to);
    else
        left > pixels / 2 ? multiply_halves(2, 2, type, b, base, half, runs, words, to)
                          : multiply_halves(1, 2, type, b, base, half, runs, words, to);
}

#endif
