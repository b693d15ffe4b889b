/* Vectors of VL floats, or of the values that features and weights are stored as: fp32, bf16, or 8-bit integers.
 *
 * Products take a word at a time, 32 bits: one value of fp32, two of bf16, four of 8 bits, where an instruction adds
 * up the products of a word. */

#include <string.h>
#ifdef __x86_64__
#include <immintrin.h>
#endif

#if defined(__AVX512BW__)
enum { VL = 16, NV = 2, MR = 8 };
#elif defined(__AVX2__)
enum { VL = 8, NV = 2, MR = 6 };
#elif defined(__aarch64__)
enum { VL = 4, NV = 4, MR = 6 };
#else
enum { VL = 4, NV = 2, MR = 6 };
#endif
/* a tile of MR pixels by the NR channels of a panel fills the registers; Winograd's algorithms multiply a plane by
 * PANELS panels, 32 channels, before they read the next plane */
enum { NR = VL * NV, PANELS = 32 / NR };

typedef float vf __attribute__((vector_size(VL * 4), aligned(4)));
typedef int32_t vi __attribute__((vector_size(VL * 4), aligned(4)));
typedef uint32_t vu __attribute__((vector_size(VL * 4), aligned(4)));
typedef uint16_t vh __attribute__((vector_size(VL * 2), aligned(2)));
typedef uint8_t vb __attribute__((vector_size(VL), aligned(1)));
typedef int16_t vs __attribute__((vector_size(VL * 4), aligned(2))); /* twice as many */
typedef uint16_t vus __attribute__((vector_size(VL * 4), aligned(2)));
typedef uint8_t vbs __attribute__((vector_size(VL * 2), aligned(1)));

static inline int size_of(int type) { return type == F32 ? 4 : type == BF16 || type == I16 ? 2 : 1; }

static inline vf load(const float *p) { return *(const vf *)p; }

static inline vf blend(vi mask, vf a, vf b) { return (vf)(((vi)a & mask) | ((vi)b & ~mask)); }

/* x, at least low and at most high; NaN where x is NaN */
static inline vf clamp(vf x, float low, float high) {
    const vf zero = {0};
#if defined(__AVX512BW__)
    return (vf)_mm512_min_ps((__m512)(zero + high), _mm512_max_ps((__m512)(zero + low), (__m512)x));
#elif defined(__AVX2__)
    return (vf)_mm256_min_ps((__m256)(zero + high), _mm256_max_ps((__m256)(zero + low), (__m256)x));
#else
    return blend(x < low, zero + low, blend(x > high, zero + high, x));
#endif
}

/* Integers of 32 bits from 8 or 16, and back to their low bits. The compiler's own conversions go value by value. */
static inline vi from_u8(const void *p) {
#if defined(__AVX512BW__)
    return (vi)_mm512_cvtepu8_epi32(_mm_loadu_si128(p));
#elif defined(__AVX2__)
    return (vi)_mm256_cvtepu8_epi32(_mm_loadl_epi64(p));
#else
    return __builtin_convertvector(*(const vb *)p, vi);
#endif
}

static inline vs shorts_from_u8(const void *p) {
#if defined(__AVX512BW__)
    return (vs)_mm512_cvtepu8_epi16(_mm256_loadu_si256(p));
#elif defined(__AVX2__)
    return (vs)_mm256_cvtepu8_epi16(_mm_loadu_si128(p));
#else
    return __builtin_convertvector(*(const vbs *)p, vs);
#endif
}

static inline vi from_u16(vh v) {
#if defined(__AVX512BW__)
    return (vi)_mm512_cvtepu16_epi32((__m256i)v);
#elif defined(__AVX2__)
    return (vi)_mm256_cvtepu16_epi32((__m128i)v);
#else
    return __builtin_convertvector(v, vi);
#endif
}

static inline vb to_u8(vi v) {
#if defined(__AVX512BW__)
    return (vb)_mm512_cvtepi32_epi8((__m512i)v);
#elif defined(__AVX2__)
    __m256i low = _mm256_shuffle_epi8((__m256i)v, _mm256_set1_epi32(0x0c080400)); /* of each half, four at a time */
    return (vb)_mm_cvtsi128_si64(_mm_unpacklo_epi32(_mm256_castsi256_si128(low), _mm256_extracti128_si256(low, 1)));
#else
    return __builtin_convertvector(v, vb);
#endif
}

static inline vh to_u16(vi v) {
#if defined(__AVX512BW__)
    return (vh)_mm512_cvtepi32_epi16((__m512i)v);
#elif defined(__AVX2__)
    __m256i low = _mm256_shuffle_epi8((__m256i)v, _mm256_set1_epi64x(0x0d0c090805040100));
    return (vh)_mm256_castsi256_si128(_mm256_permute4x64_epi64(low, 0x08));
#else
    return __builtin_convertvector(v, vh);
#endif
}

/* 1.5 * 2^23: adding it rounds a float to an integer, which, below 2^22, then stands in the low bits of the sum */
#define MAGIC 12582912.0f

/* 1 / (1 + exp(-x)), and exactly 0 where exp(-x) overflows: what it multiplies may be huge. With AVX-512 an instruction
 * scales the power of 2, and a Newton step makes the reciprocal's 14 bits 28. The relative error is 3e-7, and 6e-8
 * times -x more below zero, where x is rounded. What is not stored as F32 may err by 2e-4: a twentieth of a step of U8
 * at most, and a tenth of what BF16 rounds. */
static inline __attribute__((always_inline)) vf sigmoid(int type, vf x) {
    vf turned = x * -1.44269504f; /* 1 / ln 2 */
#if defined(__AVX512BW__)
    vf part = (vf)_mm512_reduce_ps((__m512)turned, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    vf p = (vf){0} + (type != F32 ? 7.70670474e-2f : 1.86713017e-3f);
    if (type == F32) {
        p = p * part + 9.01702978e-3f;
        p = p * part + 5.57999127e-2f;
    }
    p = p * part + (type != F32 ? 2.27644995e-1f : 2.40164444e-1f);
    p = p * part + (type != F32 ? 6.95116758e-1f : 6.93151295e-1f);
    p = p * part + 1.0f;
    vf sum = (vf)_mm512_scalef_ps((__m512)p, (__m512)turned) + 1.0f;
    vf inverse = (vf)_mm512_rcp14_ps((__m512)sum);
    if (type != F32) return inverse;
    __mmask16 finite = _mm512_cmp_ps_mask((__m512)turned, _mm512_set1_ps(126.0f), _CMP_NGT_UQ);
    return (vf)_mm512_maskz_mul_ps(finite, (__m512)inverse, (__m512)(2.0f - sum * inverse));
#else
    vf clamped = clamp(turned, -126.0f, 126.0f), rounded = clamped + MAGIC, part = clamped - (rounded - MAGIC);
    vf p = (vf){0} + 1.32546027e-3f;
    p = p * part + 9.67199914e-3f;
    p = p * part + 5.55077940e-2f;
    p = p * part + 2.40222320e-1f;
    p = p * part + 6.93146944e-1f;
    p = p * part + 1.0f;
    vf power = (vf)((vi)p + ((vi)rounded << 23)); /* of what the low bits are, to the exponent's place */
    return blend(turned > 126.0f, (vf){0}, 1.0f / (1.0f + power));
#endif
}

static inline vf from_bf16(vh v) { return (vf)(from_u16(v) << 16); }

/* VL stored values as floats */
static inline __attribute__((always_inline)) vf widen(int type, const char *p) {
    if (type == F32) return *(const vf *)p;
    if (type == BF16) return from_bf16(*(const vh *)p);
    return __builtin_convertvector(from_u8(p), vf);
}

/* A single one of them */
static inline __attribute__((always_inline)) float widen_one(int type, const char *p) {
    if (type == F32) return *(const float *)p;
    if (type == BF16) {
        uint32_t bits = (uint32_t)*(const uint16_t *)p << 16;
        float v;
        memcpy(&v, &bits, sizeof v);
        return v;
    }
    return *(const uint8_t *)p;
}

/* To the nearest bf16, ties to even; the instruction makes 0 of numbers below 2^-126. */
static inline vh to_bf16(vf v) {
#if defined(__AVX512BF16__)
    return (vh)_mm512_cvtneps_pbh((__m512)v);
#else
    vi bits = (vi)v, rounded = bits + 0x7fff + (bits >> 16 & 1);
    return to_u16((vi)blend(v == v, (vf)rounded, (vf)((vi){0} + 0x7fc00000)) >> 16);
#endif
}

/* Stores the first `count` of VL values of `size` bytes, or all where count is larger. */
static inline __attribute__((always_inline)) void put(void *p, const void *values, int size, int count) {
    if (count >= VL)
        memcpy(p, values, VL * size);
    else
#if defined(__AVX512BW__)
    { /* one instruction each, where the loop takes one for each value */
        __mmask16 there = (1u << count) - 1;
        if (size == 4)
            _mm512_mask_storeu_ps(p, there, _mm512_loadu_ps(values));
        else if (size == 2)
            _mm256_mask_storeu_epi16(p, there, _mm256_loadu_si256(values));
        else
            _mm_mask_storeu_epi8(p, there, _mm_loadu_si128(values));
    }
#else
        for (int i = 0; i < count; i++) memcpy((char *)p + i * size, (const char *)values + i * size, size);
#endif
}

static inline void store(float *p, vf v, int count) { put(p, &v, 4, count); }

/* The first `count` floats at p, and zeros behind them, or VL of them where count is larger. */
static inline vf load_some(const float *p, int count) {
    if (count >= VL) return load(p);
#if defined(__AVX512BW__)
    return (vf)_mm512_maskz_loadu_ps((1u << count) - 1, p);
#else
    vf v = {0};
    for (int i = 0; i < count; i++) v[i] = p[i];
    return v;
#endif
}

/* The sum of a vector's values */
static inline float sum_of(vf v) {
#if defined(__AVX512BW__)
    return _mm512_reduce_add_ps((__m512)v);
#else
    for (int half = VL / 2; half; half /= 2)
        for (int i = 0; i < half; i++) v[i] += v[i + half];
    return v[0];
#endif
}

static inline void store_bf16(char *p, vh v, int count) { put(p, &v, 2, count); }

static inline void store_u8(char *p, vi v, int count) {
    vb b = to_u8(v);
    put(p, &b, 1, count);
}

/* sum + products of two signed values of 16 bits in each lane, modulo 2^32 */
static inline vi dot_i16(vi sum, vi x, vi w) {
#if defined(__AVX512VNNI__)
    return (vi)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)x, (__m512i)w);
#elif defined(__AVXVNNI__)
    return (vi)_mm256_dpwssd_avx_epi32((__m256i)sum, (__m256i)x, (__m256i)w);
#elif defined(__AVX512BW__)
    return (vi)((vu)sum + (vu)_mm512_madd_epi16((__m512i)x, (__m512i)w));
#elif defined(__AVX2__)
    return (vi)((vu)sum + (vu)_mm256_madd_epi16((__m256i)x, (__m256i)w));
#elif defined(__x86_64__)
    return (vi)((vu)sum + (vu)_mm_madd_epi16((__m128i)x, (__m128i)w));
#else
    return (vi)((vu)sum + (vu)((x << 16 >> 16) * (w << 16 >> 16) + (x >> 16) * (w >> 16)));
#endif
}

/* sum + products of four unsigned values in each lane and four signed ones */
#if defined(__AVX512VNNI__)
enum { HAS_DOT_U8 = 1 };
static inline vi dot_u8(vi sum, vi x, vi w) {
    return (vi)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)x, (__m512i)w);
}
#elif defined(__AVXVNNI__)
enum { HAS_DOT_U8 = 1 };
static inline vi dot_u8(vi sum, vi x, vi w) {
    return (vi)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)x, (__m256i)w);
}
#else
enum { HAS_DOT_U8 = 0 };
static inline vi dot_u8(vi sum, vi x, vi w) {
    vi even = x & 0x00ff00ff, odd = (vi)((vus)x >> 8);
    return dot_i16(dot_i16(sum, even, (vi)((vs)w << 8 >> 8)), odd, (vi)((vs)w >> 8));
}
#endif

/* sum + products of two values of bf16 in each lane */
static inline vf dot_bf16(vf sum, vi x, vi w) {
#if defined(__AVX512BF16__)
    return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)w);
#else
    const int32_t high = (int32_t)0xffff0000;
    return sum + (vf)(x << 16) * (vf)(w << 16) + (vf)(x & high) * (vf)(w & high);
#endif
}

/* Of F32 and BF16 sums are floats, of the others integers, in the same registers. */
static inline __attribute__((always_inline)) vf dot(int type, vf sum, const char *x, vi w) {
    int32_t word;
    memcpy(&word, x, 4);
    vi all = (vi){0} + word;
    if (type == F32) return sum + (vf)all * (vf)w;
    if (type == BF16) return dot_bf16(sum, all, w);
    if (type == I16) return (vf)dot_i16((vi)sum, all, w);
    return (vf)dot_u8((vi)sum, all, w);
}
