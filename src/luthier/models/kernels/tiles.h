/* Products of small bfloat16 matrices, summed in fp32: what the kernels here are made of.
 *
 * Numbers go in pairs of one 32-bit word, two neighbours along the summed dimension, as AVX-512's dpbf16 takes them.
 */
#ifndef LUTHIER_TILES_H
#define LUTHIER_TILES_H

#include <immintrin.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef uint16_t bf16;
typedef uint32_t __attribute__((may_alias, aligned(2))) pair; /* two numbers of a row, wherever they stand */

#define INLINE static inline __attribute__((always_inline))
#define LANES 16
#define ROWS 6 /* of a tile: 6 x 4 vectors of sums, 4 of B and one of A fill the 32 registers */

INLINE long rounded(long size, long to) { return (size + to - 1) / to * to; }

INLINE __mmask16 first(long lanes) { return lanes >= LANES ? 0xffff : lanes <= 0 ? 0 : (__mmask16)((1u << lanes) - 1); }

/* bf16 to fp32 and back, rounded to nearest even. */
INLINE __m512 wide(__m256i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }
INLINE __m512 read16(const bf16 *from, __mmask16 mask) { return wide(_mm256_maskz_loadu_epi16(mask, from)); }
INLINE __m256i narrow(__m512 x) { return (__m256i)_mm512_cvtneps_pbh(x); }
INLINE void write16(bf16 *to, __m512 x, __mmask16 mask) { _mm256_mask_storeu_epi16(to, mask, narrow(x)); }

/* Numbers of one row and of the next one, if there is one, as words of two. */
INLINE __m512i two_rows(const bf16 *x, const bf16 *next, __mmask16 mask) {
    __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, x));
    return next ? _mm512_or_si512(low, _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, next)), 16)) : low;
}

/* exp as 2^n times a polynomial of the rest, to a few units in the last place of fp32 near 0 and some ten of them at -20; NaN stays NaN. */
INLINE __m512 exp16(__m512 x) {
    __m512 t = _mm512_max_ps(_mm512_set1_ps(-150.0f), _mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)));
    __m512 n = _mm512_roundscale_ps(t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m512 f = _mm512_sub_ps(t, n);
    __m512 p = _mm512_set1_ps(1.5403530e-4f);
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.3333558e-3f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(9.6181291e-3f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(5.5504109e-2f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(2.4022651e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.9314718e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(p, n);
}

/* The even and the odd quarters of two vectors. */
INLINE void quarters(__m512i one, __m512i two, __m512i *even, __m512i *odd) {
    *even = _mm512_shuffle_i32x4(one, two, 0x88);
    *odd = _mm512_shuffle_i32x4(one, two, 0xdd);
}

/* Where 16 rows of 16 words stand, their transpose. */
INLINE void transpose(__m512i r[16]) {
    __m512i t[16];
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        quarters(r[i], r[i + 4], t + i, t + i + 4);
        quarters(r[i + 8], r[i + 12], t + i + 8, t + i + 12);
        quarters(t[i], t[i + 8], r + i, r + i + 8);
        quarters(t[i + 4], t[i + 12], r + i + 4, r + i + 12);
    }
}

/* Rows as words of two neighbours of a row, by lanes of rows: (width / 2, places). */
static void pack_across(const bf16 **rows, long count, long width, long places, pair *into) {
    for (long row = 0; row < places; row += LANES)
        for (long k = 0; k < width / 2; k += LANES) {
            __m512i words[LANES];
#pragma GCC unroll 16
            for (int i = 0; i < LANES; i++)
                words[i] = row + i < count ? _mm512_maskz_loadu_epi32(first(width / 2 - k), (const pair *)rows[row + i] + k)
                                           : _mm512_setzero_si512();
            transpose(words);
#pragma GCC unroll 16
            for (int i = 0; i < LANES; i++)
                if (k + i < width / 2) _mm512_store_si512(into + (k + i) * places + row, words[i]);
        }
}

/* Rows as words of one column of two neighbouring rows: (places / 2, across). */
static void pack_along(const bf16 **rows, long count, long width, long places, long across, pair *into) {
    for (long row = 0; row < places; row += 2)
        for (long c = 0; c < across; c += LANES) {
            __m512i words = _mm512_setzero_si512();
            if (row < count) words = two_rows(rows[row] + c, row + 1 < count ? rows[row + 1] + c : NULL, first(width - c));
            _mm512_store_si512(into + row / 2 * across + c, words);
        }
}

/* C (rows x 16 columns) = or += A B over `pairs` of the summed dimension. A's word (i, k) stands at a[i * a_row + k * a_pair], B's (k, j) at
 * b[k * b_pair + j]. */
INLINE void tile(const int rows, const int columns, const pair *a, long a_row, long a_pair, const pair *b, long b_pair,
                 long pairs, float *c, long c_row, int add) {
    __m512 sum[ROWS][4];
#pragma GCC unroll 6
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 4
        for (int j = 0; j < columns; j++)
            sum[i][j] = add ? _mm512_loadu_ps(c + i * c_row + j * LANES) : _mm512_setzero_ps();
    for (long k = 0; k < pairs; k++) {
        __m512i right[4];
#pragma GCC unroll 4
        for (int j = 0; j < columns; j++)
            right[j] = _mm512_loadu_si512(b + k * b_pair + j * LANES);
#pragma GCC unroll 6
        for (int i = 0; i < rows; i++) {
            __m512i left = _mm512_set1_epi32((int)a[i * a_row + k * a_pair]);
#pragma GCC unroll 4
            for (int j = 0; j < columns; j++)
                sum[i][j] = _mm512_dpbf16_ps(sum[i][j], (__m512bh)left, (__m512bh)right[j]);
        }
    }
#pragma GCC unroll 6
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 4
        for (int j = 0; j < columns; j++)
            _mm512_storeu_ps(c + i * c_row + j * LANES, sum[i][j]);
}

#define TILES(rows) \
    static void tiles_##rows(const pair *a, long a_row, long a_pair, const pair *b, long b_pair, long pairs, float *c, \
                             long c_row, long columns, int add) { \
        long j = 0; \
        for (; j + 4 * LANES <= columns; j += 4 * LANES) \
            tile(rows, 4, a, a_row, a_pair, b + j, b_pair, pairs, c + j, c_row, add); \
        if (j + 2 * LANES <= columns) { \
            tile(rows, 2, a, a_row, a_pair, b + j, b_pair, pairs, c + j, c_row, add); \
            j += 2 * LANES; \
        } \
        if (j < columns) tile(rows, 1, a, a_row, a_pair, b + j, b_pair, pairs, c + j, c_row, add); \
    }
TILES(1) TILES(2) TILES(3) TILES(4) TILES(5) TILES(6)

/* C (rows x columns, a multiple of 16) = or += A B. */
static void product(long rows, long columns, const pair *a, long a_row, long a_pair, const pair *b, long b_pair,
                    long pairs, float *c, long c_row, int add) {
    long i = 0;
    for (; i + ROWS <= rows; i += ROWS)
        tiles_6(a + i * a_row, a_row, a_pair, b, b_pair, pairs, c + i * c_row, c_row, columns, add);
    a += i * a_row;
    c += i * c_row;
    switch (rows - i) {
    case 1: tiles_1(a, a_row, a_pair, b, b_pair, pairs, c, c_row, columns, add); break;
    case 2: tiles_2(a, a_row, a_pair, b, b_pair, pairs, c, c_row, columns, add); break;
    case 3: tiles_3(a, a_row, a_pair, b, b_pair, pairs, c, c_row, columns, add); break;
    case 4: tiles_4(a, a_row, a_pair, b, b_pair, pairs, c, c_row, columns, add); break;
    case 5: tiles_5(a, a_row, a_pair, b, b_pair, pairs, c, c_row, columns, add); break;
    }
}

/* Memory of one thread for a call, kept for the next one: `room_of` begins it anew, `take` gives parts of it. It is a few MB at most; who has not so much
 * left is ended. */
typedef struct { char *at, *end, *next; } room;
static __thread room own_room;

static room *room_of(size_t bytes) {
    bytes += 64 * 64; /* what aligning the parts takes */
    if ((size_t)(own_room.end - own_room.at) < bytes) {
        free(own_room.at);
        own_room.at = aligned_alloc(64, rounded(bytes, 4096));
        if (!own_room.at) abort();
        own_room.end = own_room.at + bytes;
    }
    own_room.next = own_room.at;
    return &own_room;
}

static void *take(room *from, size_t bytes) {
    char *found = from->next;
    from->next += rounded(bytes, 64);
    return found;
}

#endif
