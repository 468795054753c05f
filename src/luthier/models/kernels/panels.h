/* A weight as it stands in a model, or in 4 bits, packed for products: panels of PANEL columns, words of two neighbours along the summed dimension. */
#ifndef LUTHIER_PANELS_H
#define LUTHIER_PANELS_H

#include "tiles.h"

#ifdef __AMX_BF16__
#define PANEL BROAD
#else
#define PANEL 64
#endif

/* A weight in 4 bits (NormalFloat, Dettmers et al. 2023): two numbers a byte, the first one high; number i is code[q_i] scale[i / 64], rounded. Rows are
 * multiples of 64. */
typedef struct {
    const uint8_t *packed;
    const float *scale, *code;
} in_4_bits;

/* Rows of a weight (columns of y, n of `row` numbers) as a panel: words of two neighbours of a row, (n / 2, PANEL). */
static void pack_rows(const bf16 *w, long n, long row, long columns, pair *panel) {
    for (long j = 0; j < columns; j += LANES) {
        long k = 0;
        for (; k + LANES <= n / 2; k += LANES) {
            __m512i r[LANES];
#pragma GCC unroll 16
            for (int i = 0; i < LANES; i++) {
                _mm_prefetch((const char *)((const pair *)(w + (j + i + LANES) * row) + k), _MM_HINT_T0); /* of the next lanes' rows */
                r[i] = j + i < columns ? _mm512_loadu_si512((const pair *)(w + (j + i) * row) + k) : _mm512_setzero_si512();
            }
            transpose(r);
#pragma GCC unroll 16
            for (int i = 0; i < LANES; i++) _mm512_store_si512(panel + (k + i) * PANEL + j, r[i]);
        }
        for (; k < n / 2; k++)
            for (long i = 0; i < LANES; i++) panel[k * PANEL + j + i] = j + i < columns ? ((const pair *)(w + (j + i) * row))[k] : 0;
    }
}

/* Where the words of row pair k and column j of panels stand, which are `size` words each. */
INLINE pair *in_panels(pair *panels, long size, long k, long j) { return panels + j / PANEL * size + k * PANEL + j % PANEL; }

/* Columns of a weight (n, `row` numbers a row) as panels: words of one column of two neighbouring rows, (n / 2, PANEL) each. */
static void pack_columns(const bf16 *w, long n, long row, long columns, pair *panels, long size) {
    for (long k = 0; k < n; k += 2) {
        for (long ahead = 0; ahead < 2; ahead++) /* rows are too far apart to be fetched unasked */
            for (long j = 0; j < columns; j += 32) _mm_prefetch((const char *)(w + (k + ahead + 16) * row + j), _MM_HINT_T0);
        for (long j = 0; j < columns; j += LANES) {
            const bf16 *one = w + k * row + j;
            _mm512_store_si512(in_panels(panels, size, k / 2, j), two_rows(one, k + 1 < n ? one + row : NULL, first(columns - j)));
        }
    }
}

/* 32 numbers from `i` on, as words of two neighbours. */
INLINE __m512i words_of_4_bits(in_4_bits w, long i, __m512 code) {
    __m512i both = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(w.packed + i / 2)));
    __m512 scale = _mm512_set1_ps(w.scale[i / 64]);
    __m512 one = _mm512_mul_ps(_mm512_permutexvar_ps(_mm512_srli_epi32(both, 4), code), scale);
    __m512 two = _mm512_mul_ps(_mm512_permutexvar_ps(_mm512_and_si512(both, _mm512_set1_epi32(15)), code), scale);
    return _mm512_or_si512(_mm512_cvtepu16_epi32(narrow(one)), _mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow(two)), 16));
}

/* 16 numbers from `i` on. */
INLINE __m256i numbers_of_4_bits(in_4_bits w, long i, __m512 code) {
    __m512i both = _mm512_cvtepu8_epi64(_mm_loadl_epi64((const __m128i *)(w.packed + i / 2)));
    __m512i each = _mm512_or_si512(_mm512_srli_epi64(both, 4), _mm512_slli_epi64(_mm512_and_si512(both, _mm512_set1_epi64(15)), 32));
    return narrow(_mm512_mul_ps(_mm512_permutexvar_ps(each, code), _mm512_set1_ps(w.scale[i / 64])));
}

/* `pack_rows` of the part of W (columns, row) from `column` and `start` on, n a multiple of 64. */
static void pack_rows_of_4_bits(in_4_bits w, long column, long start, long n, long row, long columns, pair *panel) {
    __m512 code = _mm512_loadu_ps(w.code);
    for (long j = 0; j < columns; j += LANES)
        for (long k = 0; k < n / 2; k += LANES) {
            __m512i r[LANES];
#pragma GCC unroll 16
            for (int i = 0; i < LANES; i++)
                r[i] = j + i < columns ? words_of_4_bits(w, (column + j + i) * row + start + 2 * k, code) : _mm512_setzero_si512();
            transpose(r);
#pragma GCC unroll 16
            for (int i = 0; i < LANES; i++) _mm512_store_si512(panel + (k + i) * PANEL + j, r[i]);
        }
}

/* `pack_columns` of the part of W (n, row) from `start` and `column` on: n is even, row and columns are multiples of 64. */
static void pack_columns_of_4_bits(in_4_bits w, long start, long column, long n, long row, long columns, pair *panels, long size) {
    __m512 code = _mm512_loadu_ps(w.code);
    for (long k = 0; k < n; k += 2)
        for (long j = 0; j < columns; j += LANES) {
            long i = (start + k) * row + column + j;
            __m512i one = _mm512_cvtepu16_epi32(numbers_of_4_bits(w, i, code));
            __m512i two = _mm512_cvtepu16_epi32(numbers_of_4_bits(w, i + row, code));
            _mm512_store_si512(in_panels(panels, size, k / 2, j), _mm512_or_si512(one, _mm512_slli_epi32(two, 16)));
        }
}

#endif
