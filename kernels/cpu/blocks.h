/* Products of a block: some pixels by a panel's channels, a vector of products at a time or, of BF16 and U8, by AMX,
 * whose tiles hold up to 16 pixels, 16 channels or words, and 64 bytes of each. */

#ifndef __AMX_TILE__

enum { BLOCK = MR };

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

enum { SIDE = 16, BLOCK = 2 * SIDE };

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

/* The words of a run as weights are stored, which fill the last tile with zeros. */
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

/* So many groups of what a block leaves to finish, or all that are left. */
static inline void finish_groups(int type, Unfinished *u, int groups) {
    for (; groups && u->left; groups--) type == BF16 ? finish_next_bf16(u) : finish_next_u8(u);
}
static inline void finish_rest(int type, Unfinished *u) { finish_groups(type, u, u->left); }

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

/* What a tile loads: so many bytes of each pixel of a half, from base on. Where they stand unevenly, or do not fill a
 * row of the tile, they are copied, with zeros behind them. */
typedef struct {
    const char *at;
    int64_t apart;
} Factor;

static inline __attribute__((always_inline)) Factor factor(const Half *h, const char *base, int bytes, char *copy) {
    if (h->apart && bytes == LINE) return (Factor){base + h->pixel[0], h->apart};
    __mmask64 there = ~0ull >> (LINE - bytes);
    for (int i = 0; i < h->count; i++)
        _mm512_store_si512(copy + i * LINE, _mm512_maskz_loadu_epi8(there, base + h->pixel[i]));
    return (Factor){copy, LINE};
}

/* the compiler's own does not know that memory is read */
#define LOAD(tile, at, apart) \
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm" #tile ::"r"(at), "r"((int64_t)(apart)) : "memory")
#define ADD(sum, x, w) \
    if (type == BF16) \
        _tile_dpbf16ps(sum, x, w); \
    else \
        _tile_dpbusd(sum, x, w)

static inline __attribute__((always_inline)) void multiply_halves(
    int halves, int vectors, int type, const char *b, Ahead ahead, const char *const *base, const Half *half, int runs,
    int words, float *to, Unfinished *before) {
    char copy[2][SIDE * LINE] __attribute__((aligned(LINE)));
    int steps = runs * ((words + SIDE - 1) / SIDE), groups = before->left, due = 0;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int r = 0; r < runs; r++)
        for (int k = 0; k < words; k += SIDE, b += SIDE * 4 * NR, ahead.at += SIDE * ahead.step) {
            int bytes = 4 * least(SIDE, words - k);
            Factor x = factor(&half[0], base[r] + 4 * k, bytes, copy[0]);
            LOAD(6, b, 4 * NR);
            LOAD(4, x.at, x.apart);
            if (vectors == 2) LOAD(7, b + 4 * VL, 4 * NR);
            if (halves == 2) {
                x = factor(&half[1], base[r] + 4 * k, bytes, copy[1]);
                LOAD(5, x.at, x.apart);
            }
            ADD(0, 4, 6);
            if (vectors == 2) ADD(1, 4, 7);
            if (halves == 2) ADD(2, 5, 6);
            if (halves == 2 && vectors == 2) ADD(3, 5, 7);
            fetch(0, ahead.at, SIDE * ahead.step);
            for (due += groups; due >= steps; due -= steps) finish_groups(type, before, 1);
        }
    finish_rest(type, before);
    _tile_stored(0, to, 4 * NR);
    if (vectors == 2) _tile_stored(1, to + VL, 4 * NR);
    if (halves == 2) _tile_stored(2, to + half->count * NR, 4 * NR);
    if (halves == 2 && vectors == 2) _tile_stored(3, to + half->count * NR + VL, 4 * NR);
}
#undef ADD
#undef LOAD

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
    if (count <= VL)
        left > pixels / 2 ? multiply_halves(2, 1, type, b, ahead, base, half, runs, words, to, before)
                          : multiply_halves(1, 1, type, b, ahead, base, half, runs, words, to, before);
    else
        left > pixels / 2 ? multiply_halves(2, 2, type, b, ahead, base, half, runs, words, to, before)
                          : multiply_halves(1, 2, type, b, ahead, base, half, runs, words, to, before);
}

#endif
