/* Matrix products inside the caches, for kernels that make their operands on the way.
 *
 * C (M, N) floats = or += A (M, K) times B (K, N), where K counts units (see numbers.h). B lies in panels of
 * TILE_COLUMNS columns, one after the other, so that what a tile of C reads is contiguous; so may A transposed. A tile
 * of C stays in registers for the whole sum over K.
 */
#pragma once
#include "numbers.h"

#ifdef __AVX512F__
#define TILE_ROWS 12
#define TILE_VECS 2 /* 24 of 32 registers hold the tile */
#else
#define TILE_ROWS 6
#define TILE_VECS 1
#endif
#define TILE_COLUMNS (TILE_VECS * LANES)
#define UNROLL _Pragma("GCC unroll 16")

/* Sizes as the products need them: columns in whole tiles, a sum over numbers in whole units. */
INLINE int64_t whole_columns(int64_t n) { return (n + TILE_COLUMNS - 1) / TILE_COLUMNS * TILE_COLUMNS; }
INLINE int64_t units(int64_t n) { return (n + PER_UNIT - 1) / PER_UNIT; }

INLINE uvec load_units(const unit *p) {
    uvec v;
    memcpy(&v, p, sizeof v);
    return v;
}
INLINE int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }

INLINE void store_units(unit *p, uvec v) { memcpy(p, &v, sizeof v); }

INLINE vec multiply_add(vec total, unit a, uvec b) {
#ifndef BF16
    float x;
    memcpy(&x, &a, sizeof x);
    return total + x * (vec)b;
#elif defined(__AVX512BF16__)
    return (vec)_mm512_dpbf16_ps((__m512)total, (__m512bh)_mm512_set1_epi32((int)a), (__m512bh)b);
#else
    uint32_t low = a << 16, high = a & 0xffff0000u;
    float x, y;
    memcpy(&x, &low, sizeof x);
    memcpy(&y, &high, sizeof y);
    return total + x * (vec)(b << 16) + y * (vec)(b & 0xffff0000u);
#endif
}

INLINE void product_tile(int rows, const unit *a, int64_t a_row, int64_t a_step, const unit *b, float *c,
                         int64_t c_row, int64_t depth, int add) {
    vec total[TILE_ROWS][TILE_VECS];
    UNROLL for (int m = 0; m < rows; m++)
        UNROLL for (int v = 0; v < TILE_VECS; v++)
            total[m][v] = add ? load_floats(c + m * c_row + v * LANES) : (vec){0};
    for (int64_t k = 0; k < depth; k++) {
        uvec columns[TILE_VECS];
        UNROLL for (int v = 0; v < TILE_VECS; v++) columns[v] = load_units(b + k * TILE_COLUMNS + v * LANES);
        UNROLL for (int m = 0; m < rows; m++) {
            unit x = a[m * a_row + k * a_step];
            UNROLL for (int v = 0; v < TILE_VECS; v++) total[m][v] = multiply_add(total[m][v], x, columns[v]);
        }
    }
    UNROLL for (int m = 0; m < rows; m++)
        UNROLL for (int v = 0; v < TILE_VECS; v++) store_floats(c + m * c_row + v * LANES, total[m][v]);
}

/* The number of rows is a constant in each call, so that a tile's loops unroll and its totals stay in registers. */
#define TILE_CASE(n)                                                                     \
    case n:                                                                              \
        product_tile(n, a, a_row, a_step, b, c, c_row, depth, add);                      \
        break;

static void product_rows(int rows, const unit *a, int64_t a_row, int64_t a_step, const unit *b, float *c,
                         int64_t c_row, int64_t depth, int add) {
    switch (rows) {
        TILE_CASE(1) TILE_CASE(2) TILE_CASE(3) TILE_CASE(4) TILE_CASE(5) TILE_CASE(6)
#if TILE_ROWS > 6
        TILE_CASE(7) TILE_CASE(8) TILE_CASE(9) TILE_CASE(10) TILE_CASE(11) TILE_CASE(12)
#endif
    }
}

/* A in rows of units, `a_row` apart; B's panels `b_panel` units apart. Whole panels of C are written. */
static void product(const unit *a, int64_t a_row, const unit *b, int64_t b_panel, float *c, int64_t c_row,
                    int64_t n_rows, int64_t n_columns, int64_t depth, int add) {
    for (int64_t n = 0; n < n_columns; n += TILE_COLUMNS, b += b_panel)
        for (int64_t m = 0; m < n_rows; m += TILE_ROWS)
            product_rows((int)at_most(TILE_ROWS, n_rows - m), a + m * a_row, a_row, 1, b, c + m * c_row + n, c_row,
                         depth, add);
}

/* The same with A transposed: its rows are columns of panels, `a_panel` units apart. */
static void product_of_columns(const unit *a, int64_t a_panel, const unit *b, int64_t b_panel, float *c,
                               int64_t c_row, int64_t n_rows, int64_t n_columns, int64_t depth, int add) {
    for (int64_t first = 0; first < n_rows; first += TILE_COLUMNS, a += a_panel)
        for (int64_t n = 0; n < n_columns; n += TILE_COLUMNS)
            for (int64_t m = 0; m < at_most(TILE_COLUMNS, n_rows - first); m += TILE_ROWS)
                product_rows((int)at_most(TILE_ROWS, at_most(TILE_COLUMNS, n_rows - first) - m), a + m, 1,
                             TILE_COLUMNS, b + n / TILE_COLUMNS * b_panel, c + (first + m) * c_row + n, c_row, depth,
                             add);
}

/* Where unit (k, n) of panels is. */
INLINE int64_t in_panels(int64_t panel, int64_t k, int64_t n) {
    return n / TILE_COLUMNS * panel + k * TILE_COLUMNS + n % TILE_COLUMNS;
}

/* Row k of panels from PER_UNIT rows of n numbers; a row from `real` on counts as zeros. */
INLINE void interleave(const num *rows, int64_t stride, int64_t real, int64_t n, unit *to, int64_t panel, int64_t k) {
#ifdef BF16
    const num *second = rows + (real > 1 ? stride : 0);
    uint32_t first_mask = real > 0 ? 0xffff : 0, second_mask = real > 1 ? 0xffff0000u : 0;
    for (int64_t i = 0; i < n; i += TILE_COLUMNS) {
        unit *out = to + in_panels(panel, k, i);
        for (int64_t j = 0; j < at_most(TILE_COLUMNS, n - i); j++)
            out[j] = (rows[i + j] & first_mask) | ((uint32_t)second[i + j] << 16 & second_mask);
    }
#else
    for (int64_t i = 0; i < n; i += TILE_COLUMNS) {
        unit *out = to + in_panels(panel, k, i);
        size_t bytes = at_most(TILE_COLUMNS, n - i) * sizeof(unit);
        if (real > 0) memcpy(out, rows + i, bytes);
        else memset(out, 0, bytes);
    }
    (void)stride;
#endif
}

/* The units of two vectors of neighbouring rows, and of one where a unit is one number. */
INLINE uvec interleaved(vec first, vec second) {
#ifdef BF16
    return round_to_bf16(first) | round_to_bf16(second) << 16;
#else
    (void)second;
    return (uvec)first;
#endif
}

#ifdef __has_builtin
#if __has_builtin(__builtin_shufflevector) /* GCC 12, Clang */
#define TRANSPOSES
/* In each square of 2s rows and columns, exchanges the two quarters off the diagonal. */
#define EXCHANGE(s, a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p)                                                   \
    UNROLL for (int row = 0; row < LANES; row++) if (!(row & s)) {                                                    \
        uvec up = v[row], low = v[row + s];                                                                           \
        v[row] = __builtin_shufflevector(up, low, a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p);                    \
        v[row + s] = __builtin_shufflevector(up, low, a + s, b + s, c + s, d + s, e + s, f + s, g + s, h + s, i + s,  \
                                             j + s, k + s, l + s, m + s, n + s, o + s, p + s);                        \
    }

/* Rows become columns. */
INLINE void transpose(uvec *v) {
    EXCHANGE(8, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23)
    EXCHANGE(4, 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27)
    EXCHANGE(2, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29)
    EXCHANGE(1, 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30)
}
#endif
#endif

/* Columns of panels from n_rows rows of n numbers. What a half unit lacks is 0. */
INLINE void transpose_units(const num *rows, int64_t stride, int64_t n_rows, int64_t n, unit *to, int64_t panel) {
    int64_t whole = n / PER_UNIT;
    for (int64_t r = 0; r < n_rows; r++) {
        unit *column = to + in_panels(panel, 0, r);
        for (int64_t k = 0; k < whole; k++)
            memcpy(&column[k * TILE_COLUMNS], rows + r * stride + k * PER_UNIT, sizeof(unit));
        if (n > whole * PER_UNIT) column[whole * TILE_COLUMNS] = (unit)rows[r * stride + n - 1];
    }
}

/* A zeroed array; the caller frees it. Out of memory is not a thing to recover from in the middle of a kernel. */
INLINE void *zeroed(int64_t n, int64_t size) {
    size_t bytes = (size_t)(n * size + 63) / 64 * 64;
    void *p = aligned_alloc(64, bytes ? bytes : 64);
    if (!p) abort();
    return memset(p, 0, bytes);
}
