/* The instructions of AMX that the CPU kernels use, for a CPU that has none: it raises SIGILL, and the handler does what
 * Intel's "Architectures software developer's manual" (volume 2, chapters 3 and 4: LDTILECFG, TILE*, TDP*) says, in
 * the order of rounding that it gives. What the manual forbids, such as shapes that do not fit, aborts. */

#define _GNU_SOURCE
#include <math.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

typedef struct {
    uint8_t palette, start, zeros[14];
    uint16_t bytes[16];
    uint8_t rows[16];
} Config;

static _Thread_local Config config;
static _Thread_local uint8_t tiles[8][16][64];
static struct sigaction before;
static long count;

static void require(int fits, const char *what) {
    if (fits) return;
    fprintf(stderr, "amx_emulator: %s\n", what);
    abort();
}

static int configured(int t) { return config.palette && config.rows[t] && config.bytes[t]; }

static void configure(const uint8_t *from) {
    static const uint8_t none[64];
    memcpy(&config, from, sizeof config);
    require(config.palette == 1 && config.start == 0 && !memcmp(config.zeros, none, 14), "palette, start or a byte not 0");
    require(!memcmp(config.bytes + 8, none, 16) && !memcmp(config.rows + 8, none, 8), "a ninth tile");
    for (int t = 0; t < 8; t++)
        require(config.rows[t] <= 16 && config.bytes[t] <= 64 && !config.rows[t] == !config.bytes[t], "shape of a tile");
    memset(tiles, 0, sizeof tiles);
}

static float widened(const uint8_t *p) {
    uint32_t bits = (uint32_t)p[1] << 24 | (uint32_t)p[0] << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

static float normal(float x) { return fpclassify(x) == FP_SUBNORMAL ? copysignf(0, x) : x; }

/* sums + x w: rows of x by words, rows of w by words of x */
static void multiply(int sums, int x, int w, int bf16) {
    require(configured(sums) && configured(x) && configured(w), "a tile without a shape");
    require(config.rows[sums] == config.rows[x] && config.bytes[sums] == config.bytes[w] &&
            config.bytes[x] == 4 * config.rows[w] && config.bytes[w] % 4 == 0, "shapes that do not fit");
    for (int m = 0; m < config.rows[sums]; m++) {
        float part[16][2] = {0};
        int32_t sum[16];
        memcpy(sum, tiles[sums][m], 64);
        for (int k = 0; k < config.rows[w]; k++)
            for (int n = 0; n < config.bytes[sums] / 4; n++)
                for (int i = 0; i < (bf16 ? 2 : 4); i++) {
                    const uint8_t *a = &tiles[x][m][4 * k], *b = &tiles[w][k][4 * n];
                    if (bf16)
                        part[n][i] = normal(fmaf(normal(widened(a + 2 * i)), normal(widened(b + 2 * i)), part[n][i]));
                    else
                        sum[n] = (int32_t)((uint32_t)sum[n] + (uint32_t)(a[i] * (int8_t)b[i]));
                }
        for (int n = 0; bf16 && n < 16; n++) {
            float total;
            memcpy(&total, &sum[n], 4);
            total = normal(normal(total) + normal(part[n][0] + part[n][1]));
            memcpy(&sum[n], &total, 4);
        }
        memcpy(tiles[sums][m], sum, config.bytes[sums]);
    }
}

/* where the operand is, and in `row` the index register's value; *ip moves behind it */
static uint8_t *operand(greg_t *registers, const uint8_t **ip, int extended_b, int extended_x, int64_t *row) {
    static const int names[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                  REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
    int modrm = *(*ip)++, mod = modrm >> 6, base = modrm & 7, index = 4, scale = 0;
    if (base == 4) {
        int sib = *(*ip)++;
        base = sib & 7, index = (sib >> 3 & 7) | extended_x << 3, scale = sib >> 6;
    }
    int wide = mod == 2 || (mod == 0 && base == 5), relative = mod == 0 && (modrm & 7) == 5;
    int64_t at = mod == 0 && base == 5 ? 0 : registers[names[base | extended_b << 3]];
    if (mod == 1) at += (int8_t)*(*ip)++;
    if (wide) {
        int32_t away;
        memcpy(&away, *ip, 4);
        *ip += 4, at += away;
    }
    if (relative) at += (int64_t)*ip;
    *row = index == 4 ? 0 : registers[names[index]] << scale;
    return (uint8_t *)at;
}

static void emulate(int signal, siginfo_t *info, void *context) {
    greg_t *registers = ((ucontext_t *)context)->uc_mcontext.gregs;
    const uint8_t *ip = (const uint8_t *)registers[REG_RIP];
    int known = ip[0] == 0xc4 && (ip[1] & 0x1f) == 2 && (ip[2] & 0x84) == 0; /* VEX.128.0F38.W0 */
    int prefix = ip[2] & 3, code = ip[3], reg = ip[4] >> 3 & 7, in_registers = ip[4] >> 6 == 3;
    int extended_b = !(ip[1] & 0x20), extended_x = !(ip[1] & 0x40), third = ~ip[2] >> 3 & 15;
    enum { NP, P66, PF3, PF2 };
    const uint8_t *next = ip + 5;
    if (known && code == 0x49 && prefix == NP && ip[4] == 0xc0) /* TILERELEASE */
        memset(&config, 0, sizeof config), memset(tiles, 0, sizeof tiles);
    else if (known && code == 0x49 && prefix == PF2 && in_registers) { /* TILEZERO */
        require(configured(reg), "a tile without a shape");
        memset(tiles[reg], 0, sizeof tiles[reg]);
    } else if (known && ((code == 0x49 && prefix == NP) || (code == 0x4b && prefix >= PF3)) && !in_registers) {
        int64_t row;
        next = ip + 4;
        uint8_t *at = operand(registers, &next, extended_b, extended_x, &row);
        if (code == 0x49)
            configure(at);
        else {
            require(configured(reg), "a tile without a shape");
            if (prefix == PF2) memset(tiles[reg], 0, sizeof tiles[reg]);
            for (int i = 0; i < config.rows[reg]; i++)
                if (prefix == PF2)
                    memcpy(tiles[reg][i], at + i * row, config.bytes[reg]); /* TILELOADD */
                else
                    memcpy(at + i * row, tiles[reg][i], config.bytes[reg]); /* TILESTORED */
        }
    } else if (known && in_registers && ((code == 0x5c && prefix == PF3) || (code == 0x5e && prefix == P66)))
        multiply(reg, ip[4] & 7, third, code == 0x5c); /* TDPBF16PS, TDPBUSD */
    else {
        sigaction(SIGILL, &before, NULL); /* and the instruction raises it again */
        return;
    }
    __atomic_fetch_add(&count, 1, __ATOMIC_RELAXED);
    registers[REG_RIP] = (greg_t)next;
}

void install(void) {
    struct sigaction action = {.sa_sigaction = emulate, .sa_flags = SA_SIGINFO};
    sigaction(SIGILL, &action, &before);
}

void restore(void) { sigaction(SIGILL, &before, NULL); }

/* How many instructions it stood in for. */
long done(void) { return count; }
