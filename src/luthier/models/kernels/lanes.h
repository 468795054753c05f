/* Products of small bfloat16 matrices by AVX-512's vectors, summed in fp32. */
#ifndef LUTHIER_LANES_H
#define LUTHIER_LANES_H

#include "vectors.h"

#define ROWS 6 /* of a tile: 6 x 4 vectors of sums, 4 of B and one of A fill the 32 registers */
#define KEYS LANES /* multiples of which attention's products have on their sides */
#define QUERIES 2

INLINE void begin_products(void) {}
INLINE void end_products(void) {}

/* C (rows x 16 columns) = or += A B over `pairs` of the summed dimension. A's word (i, k) stands at a[i * a_row + k], B's (k, j) at b[k * b_pair + j]. */
INLINE void tile(const int rows, const int columns, const pair *a, long a_row, const pair *b, long b_pair, long pairs, float *c, long c_row,
                 int add) {
    __m512 sum[ROWS][4];
#pragma GCC unroll 6
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 4
        for (int j = 0; j < columns; j++)
            sum[i][j] = add ? _mm512_loadu_ps(c + i * c_row + j * LANES) : _mm512_setzero_ps();
    for (long k = 0; k < pairs; k++) {
        __m512i right[4];
#pragma GCC unroll 4
        for (int j = 0; j < columns; j++) right[j] = _mm512_loadu_si512(b + k * b_pair + j * LANES);
#pragma GCC unroll 6
        for (int i = 0; i < rows; i++) {
            __m512i left = _mm512_set1_epi32((int)a[i * a_row + k]);
#pragma GCC unroll 4
            for (int j = 0; j < columns; j++) sum[i][j] = _mm512_dpbf16_ps(sum[i][j], (__m512bh)left, (__m512bh)right[j]);
        }
    }
#pragma GCC unroll 6
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 4
        for (int j = 0; j < columns; j++) _mm512_storeu_ps(c + i * c_row + j * LANES, sum[i][j]);
}

#define TILES(rows) \
    static void tiles_##rows(const pair *a, long a_row, const pair *b, long b_pair, long pairs, float *c, long c_row, long columns, int add) { \
        long j = 0; \
        for (; j + 4 * LANES <= columns; j += 4 * LANES) tile(rows, 4, a, a_row, b + j, b_pair, pairs, c + j, c_row, add); \
        if (j + 2 * LANES <= columns) { \
            tile(rows, 2, a, a_row, b + j, b_pair, pairs, c + j, c_row, add); \
            j += 2 * LANES; \
        } \
        if (j < columns) tile(rows, 1, a, a_row, b + j, b_pair, pairs, c + j, c_row, add); \
    }
TILES(1) TILES(2) TILES(3) TILES(4) TILES(5) TILES(6)

/* C (rows x columns, a multiple of 16) = or += A B. */
static void product(long rows, long columns, const pair *a, long a_row, const pair *b, long b_pair, long pairs, float *c, long c_row, int add) {
    long i = 0;
    for (; i + ROWS <= rows; i += ROWS) tiles_6(a + i * a_row, a_row, b, b_pair, pairs, c + i * c_row, c_row, columns, add);
    a += i * a_row;
    c += i * c_row;
    switch (rows - i) {
    case 1: tiles_1(a, a_row, b, b_pair, pairs, c, c_row, columns, add); break;
    case 2: tiles_2(a, a_row, b, b_pair, pairs, c, c_row, columns, add); break;
    case 3: tiles_3(a, a_row, b, b_pair, pairs, c, c_row, columns, add); break;
    case 4: tiles_4(a, a_row, b, b_pair, pairs, c, c_row, columns, add); break;
    case 5: tiles_5(a, a_row, b, b_pair, pairs, c, c_row, columns, add); break;
    }
}

#endif
