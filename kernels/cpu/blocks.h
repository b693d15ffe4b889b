/* Products of a block: some pixels by a panel's channels, a vector of products at a time or, of BF16 and U8, by AMX,
 * whose tiles hold up to 16 pixels, 16 channels or words, and 64 bytes of each. */

#ifndef __AMX_TILE__

enum { BLOCK = MR, BLOCKS = 1 };

static inline int is_tiled(int type) { return 0; }
static inline int block_pixels(int type, int w, int count) { return rows_of_block(count); }
static inline int stored_words(int type, int words) { return words; }
static inline void begin_blocks(int type, int pixels) {}
static inline void end_blocks(int type) {}
static inline void finish_rest(int type, Unfinished *u) {}

/* Not inlined, lest what `direct` needs afterwards takes registers from the products. */
static __attribute__((noinline)) void multiply_block(
    int pixels, int left, int count, int type, const char *b, Ahead ahead, const char *const *base,
    const int64_t *pixel, int runs, int words, float *to, Unfinished *before) {
    if (type == F32) multiply_tile(left, count, F32, b, ahead, base, pixel, runs, words, to, NR);
    if (type == BF16) multiply_tile(left, count, BF16, b, ahead, base, pixel, runs, words, to, NR);
    if (type == U8) multiply_tile(left, count, U8, b, ahead, base, pixel, runs, words, to, NR);
}

#else

enum { SIDE = 16, BLOCK = 2 * SIDE, BLOCKS = 2 };

/* Whether blocks are multiplied by tiles. What one makes is finished while the next is multiplied, by the instructions
 * that tiles leave idle. */
static inline int is_tiled(int type) { return type != F32; }

/* The most that a block takes of features w pixels wide. Where tiles fill rows evenly, few reach over the end of one,
 * so that their pixels stand evenly apart. */
static inline int block_pixels(int type, int w, int count) {
    if (!is_tiled(type)) return rows_of_block(count);
    for (int side = SIDE; side >= SIDE - 4; side--)
        if (w % side == 0) return 2 * side;
    return 2 * SIDE;
}

/* The words of a run as weights are stored: the last tile takes as many as the others, and has zeros for those that
 * the one before it took. */
static inline int stored_words(int type, int words) {
    return is_tiled(type) ? (words + SIDE - 1) / SIDE * SIDE : words;
}

/* Before blocks of so many pixels: 0 to 3 are sums, pixels by channels; 4 and 5 pixels by 16 words, 6 and 7 weights. */
static inline void begin_blocks(int type, int pixels) {
    if (!is_tiled(type)) return;
    struct {
        uint8_t palette, start, unused[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } shapes = {.palette = 1};
    for (int i = 0; i < 8; i++) shapes.rows[i] = i < 6 ? pixels / 2 : SIDE, shapes.bytes[i] = LINE;
    __asm__ volatile("ldtilecfg %0" ::"m"(shapes));
}

static inline void end_blocks(int type) {
    if (is_tiled(type)) _tile_release();
}

static __attribute__((noinline)) void finish_next_bf16(Unfinished *u) { finish_next(BF16, u); }
static __attribute__((noinline)) void finish_next_u8(Unfinished *u) { finish_next(U8, u); }

/* A group of what a block leaves to finish. */
static inline void finish_group(int type, Unfinished *u) { type == BF16 ? finish_next_bf16(u) : finish_next_u8(u); }
static inline void finish_rest(int type, Unfinished *u) {
    while (u->left) finish_group(type, u);
}

/* Half of a block: where its pixels are, and how far apart; 0 where that differs. */
typedef struct {
    const int64_t *pixel;
    int64_t apart;
    int count;
} Half;

static inline Half half_of(const int64_t *pixel, int count) {
    int64_t apart = pixel[1] - pixel[0];
    int even = apart > 0;
    for (int i = 2; i < count; i++) even &= pixel[i] - pixel[i - 1] == apart;
    return (Half){pixel, even ? apart : 0, count};
}

/* Some bytes of each pixel of a half, from base on, copied to the rows of a tile, with zeros behind them. */
static inline const char *copied(const Half *h, const char *base, int bytes, char *copy) {
    __mmask64 there = ~0ull >> (LINE - bytes);
    for (int i = 0; i < h->count; i++)
        _mm512_store_si512(copy + i * LINE, _mm512_maskz_loadu_epi8(there, base + h->pixel[i]));
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
/* What 16 words of each pixel add to the sums, and what is done meanwhile. x, y: where a half's pixels are, and how far
 * apart. */
#define STEP(x, x_apart, y, y_apart) \
    LOAD(6, b, 4 * NR); \
    LOAD(4, x, x_apart); \
    if (vectors == 2) LOAD(7, b + 4 * VL, 4 * NR); \
    if (halves == 2) LOAD(5, y, y_apart); \
    ADD(0, 4, 6); \
    if (vectors == 2) ADD(1, 4, 7); \
    if (halves == 2) ADD(2, 5, 6); \
    if (halves == 2 && vectors == 2) ADD(3, 5, 7); \
    for (int i = 0; i < lines; i++) __builtin_prefetch(ahead.at + i * LINE, 0, 2); \
    b += SIDE * 4 * NR, ahead.at += SIDE * ahead.step, due += groups; \
    for (; due >= steps; due -= steps) finish_group(type, before)

static inline __attribute__((always_inline)) void multiply_halves(
    int halves, int vectors, int type, const char *b, Ahead ahead, const char *const *base, const Half *half, int runs,
    int words, float *to, Unfinished *before) {
    char copy[2][SIDE * LINE] __attribute__((aligned(LINE)));
    int lines = (SIDE * ahead.step + LINE - 1) / LINE;
    int steps = runs * ((words + SIDE - 1) / SIDE), groups = before->left, due = 0;
    int even = words >= SIDE && half[0].apart && (halves == 1 || half[1].apart);
    int last = words > SIDE ? words - SIDE : 0; /* from where the last tile takes words */
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int r = 0; r < runs; r++) {
        const char *x = base[r] + half[0].pixel[0], *y = base[r] + half[1].pixel[0];
        if (even)
            for (int k = 0; k < words; k += SIDE) {
                int64_t at = 4 * least(k, last);
                STEP(x + at, half[0].apart, y + at, half[1].apart);
            }
        else
            for (int k = 0; k < words; k += SIDE) {
                const char *at = base[r] + 4 * least(k, last);
                x = copied(&half[0], at, 4 * least(SIDE, words), copy[0]);
                if (halves == 2) y = copied(&half[1], at, 4 * least(SIDE, words), copy[1]);
                STEP(x, LINE, y, LINE);
            }
    }
    finish_rest(type, before);
    _tile_stored(0, to, 4 * NR);
    if (vectors == 2) _tile_stored(1, to + VL, 4 * NR);
    if (halves == 2) _tile_stored(2, to + half->count * NR, 4 * NR);
    if (halves == 2 && vectors == 2) _tile_stored(3, to + half->count * NR + VL, 4 * NR);
}
#undef STEP
#undef ADD
#undef LOAD

/* Functions of their own, so that what `direct` needs takes no registers from the products. */
#define MULTIPLY_TILES(name, type) \
    static __attribute__((noinline)) void name( \
        int halves, int vectors, const char *b, Ahead ahead, const char *const *base, const Half *half, int runs, \
        int words, float *to, Unfinished *before) { \
        if (halves == 2 && vectors == 2) \
            multiply_halves(2, 2, type, b, ahead, base, half, runs, words, to, before); \
        else if (halves == 2) \
            multiply_halves(2, 1, type, b, ahead, base, half, runs, words, to, before); \
        else if (vectors == 2) \
            multiply_halves(1, 2, type, b, ahead, base, half, runs, words, to, before); \
        else \
            multiply_halves(1, 1, type, b, ahead, base, half, runs, words, to, before); \
    }
MULTIPLY_TILES(multiply_bf16, BF16)
MULTIPLY_TILES(multiply_u8, U8)

/* To `to` [pixels][NR] the sums that `multiply_rows` explains, of blocks between begin_blocks and end_blocks; left:
 * pixels that are there. The table has BLOCK more than that. Meanwhile finishes the block `before`, if any. */
static inline __attribute__((always_inline)) void multiply_block(
    int pixels, int left, int count, int type, const char *b, Ahead ahead, const char *const *base,
    const int64_t *pixel, int runs, int words, float *to, Unfinished *before) {
    if (!is_tiled(type)) {
        multiply_tile(left, count, type, b, ahead, base, pixel, runs, words, to, NR);
        return;
    }
    Half half[2] = {half_of(pixel, pixels / 2), half_of(pixel + pixels / 2, pixels / 2)};
    int halves = 1 + (left > pixels / 2), vectors = 1 + (count > VL);
    (type == BF16 ? multiply_bf16 : multiply_u8)(halves, vectors, b, ahead, base, half, runs, words, to, before);
}

#endif
