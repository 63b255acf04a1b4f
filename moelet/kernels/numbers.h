/* The number format that a build computes with, as vectors of 16 lanes, and the few functions that all kernels need.
 *
 * Built twice from the same source: with -DBF16 activations are bfloat16 (the upper half of a float), without it they
 * are float. Everything else is float in both. The vectors are the compiler's own (GCC, Clang): one AVX-512 register,
 * two of AVX2, four of NEON.
 *
 * A product sums over *units*: one float, or two bfloat16 in 32 bits, which is what a bfloat16 dot instruction eats.
 */
#pragma once
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

#define LANES 16
typedef float vec __attribute__((vector_size(64)));
typedef int32_t ivec __attribute__((vector_size(64)));
typedef uint32_t uvec __attribute__((vector_size(64)));
typedef uint16_t half_uvec __attribute__((vector_size(32)));
typedef uint32_t unit;

#ifdef BF16
typedef uint16_t num;
#define PER_UNIT 2
#else
typedef float num;
#define PER_UNIT 1
#endif

#define INLINE static inline __attribute__((always_inline))

INLINE vec splat(float x) { return x - (vec){0}; }

/* Unaligned loads and stores: memcpy of a constant size is one instruction. */
INLINE vec load_floats(const float *p) {
    vec v;
    memcpy(&v, p, sizeof v);
    return v;
}
INLINE void store_floats(float *p, vec v) { memcpy(p, &v, sizeof v); }

/* Bits of bfloat16 in the lower half of each lane, rounded to nearest even; NaN stays NaN. */
INLINE uvec round_to_bf16(vec v) {
#ifdef __AVX512BF16__
    return (uvec)_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)v));
#else
    uvec bits = (uvec)v;
    uvec rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    uvec is_nan = (uvec)((bits & 0x7fffffff) > 0x7f800000);
    return (rounded & ~is_nan) | (0x7fc0 & is_nan);
#endif
}

INLINE vec load(const num *p) {
#ifdef BF16
    half_uvec h;
    memcpy(&h, p, sizeof h);
    return (vec)(__builtin_convertvector(h, uvec) << 16);
#else
    return load_floats(p);
#endif
}

INLINE void store(num *p, vec v) {
#ifdef BF16
#ifdef __AVX512BF16__
    half_uvec h = (half_uvec)_mm512_cvtneps_pbh((__m512)v);
#else
    half_uvec h = __builtin_convertvector(round_to_bf16(v), half_uvec);
#endif
    memcpy(p, &h, sizeof h);
#else
    store_floats(p, v);
#endif
}

INLINE vec lane_index(void) { return (vec){0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}; }

/* Per lane: a where all bits of `where` are set, b where none are. */
INLINE vec choose(ivec where, vec a, vec b) {
#ifdef __AVX512DQ__
    return (vec)_mm512_mask_blend_ps(_mm512_movepi32_mask((__m512i)where), (__m512)b, (__m512)a);
#else
    return (vec)(((ivec)a & where) | ((ivec)b & ~where));
#endif
}

/* Per lane the larger; b where one is NaN. */
INLINE vec larger(vec a, vec b) {
#ifdef __AVX512F__
    return (vec)_mm512_max_ps((__m512)a, (__m512)b);
#else
    return choose(a > b, a, b);
#endif
}

INLINE float sum_lanes(vec v) {
#ifdef __AVX512F__
    return _mm512_reduce_add_ps((__m512)v);
#else
    float total = 0;
    for (int i = 0; i < LANES; i++) total += v[i];
    return total;
#endif
}

INLINE float largest_lane(vec v) {
#ifdef __AVX512F__
    return _mm512_reduce_max_ps((__m512)v);
#else
    float best = v[0];
    for (int i = 1; i < LANES; i++) best = v[i] > best ? v[i] : best;
    return best;
#endif
}

/* e^x within 2e-7 of its value; below e^-104, all of which float rounds to 0, it is 0; infinite above 88; NaN of NaN.
 * 2^n * e^r with |r| <= ln(2)/2, and e^r by its Taylor series to r^6 (error r^7/7! = 1.2e-7). */
INLINE vec exponential(vec x) {
    x = larger(splat(-104), x);
    vec shifted = x * 1.44269504f + 12582912.0f; /* 1.5 * 2^23: adding it rounds to an integer, in the lower bits */
    vec n = shifted - 12582912.0f;
    vec r = x - n * 0.693145752f - n * 1.42860677e-6f;
    vec p = r * (1.0f / 720) + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
#ifdef __AVX512F__
    return (vec)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
    vec inside = choose(x < -87.0f, (vec){0}, (vec)((ivec)p + ((ivec)shifted << 23)));
    return choose(x <= 88.0f, inside, x + INFINITY);
#endif
}

/* Rows in blocks of fixed size: what is summed over rows is summed within a block and then over blocks, in order, so
 * that the result doesn't depend on the number of threads. */
#define BLOCK 64
INLINE int64_t blocks(int64_t rows) { return (rows + BLOCK - 1) / BLOCK; }
INLINE int64_t end_of(int64_t block, int64_t rows) { return (block + 1) * BLOCK < rows ? (block + 1) * BLOCK : rows; }

/* Dropout: a random 32-bit word for each element, as a function of a seed, the row and the column, so that backward
 * makes the same ones again instead of reading them. Two rounds of the "lowbias32" integer hash (Wellons 2018), with
 * half of the row's 64-bit key in each. */
typedef struct {
    uint64_t seed;
    float scale;     /* of what is kept: 1 / (1 - probability) */
    uint32_t limit;  /* words below it are dropped: probability * 2^32; 0 drops nothing */
} dropout;

INLINE uint64_t row_key(uint64_t seed, uint64_t row) { /* splitmix64 (Steele et al. 2014) */
    uint64_t z = seed + (row + 1) * 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

INLINE vec keep_scale(dropout drop, uint64_t key, int64_t column) {
    uvec x = (uvec)__builtin_convertvector(lane_index(), ivec) + (uint32_t)column;
    x = (x ^ (uint32_t)key) * 0x7feb352du;
    x = (x ^ (x >> 15)) + (uint32_t)(key >> 32);
    x = (x ^ (x >> 16)) * 0x846ca68bu;
    x ^= x >> 15;
    return choose((ivec)(x < drop.limit), (vec){0}, splat(drop.scale));
}
