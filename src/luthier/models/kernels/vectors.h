/* Vectors of 16 numbers, matrices packed for products, memory of a thread: what the kernels here are made of.
 *
 * Numbers of products go in pairs of one 32-bit word, two neighbours along the summed dimension, as AVX-512's dpbf16 and AMX take them.
 */
#ifndef LUTHIER_VECTORS_H
#define LUTHIER_VECTORS_H

#include <immintrin.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef uint16_t bf16;
typedef uint32_t __attribute__((may_alias, aligned(2))) pair; /* two numbers of a row, wherever they stand */

#define INLINE static inline __attribute__((always_inline))
#define LANES 16

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

/* exp as 2^n times a polynomial of the rest, to a few units in the last place of fp32 near 0 and some ten of them at -20; NaN stays NaN.
 * What is below 2^-125 is 0: numbers without a leading bit (denormal) take the processor many times as long. */
INLINE __m512 exp16(__m512 x) {
    __m512 t = _mm512_mul_ps(x, _mm512_set1_ps(1.44269504f));
    __mmask16 some = _mm512_cmp_ps_mask(t, _mm512_set1_ps(-125.0f), _CMP_NLT_UQ);
    __m512 n = _mm512_roundscale_ps(t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m512 f = _mm512_sub_ps(t, n);
    __m512 p = _mm512_set1_ps(1.5403530e-4f);
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.3333558e-3f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(9.6181291e-3f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(5.5504109e-2f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(2.4022651e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.9314718e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
    return _mm512_maskz_scalef_ps(some, p, n);
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

/* Rows turned, as words of one column of two neighbouring rows: word (c, k), of columns below `width`, at into[c * next + k], k below 16 and `most`; what `count`
 * rows do not fill is 0. */
static void pack_turned(const bf16 **rows, long count, long width, pair *into, long next, long most) {
    for (long c = 0; c < width; c += LANES) {
        __m512i words[LANES];
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++)
            words[i] = 2 * i < count ? two_rows(rows[2 * i] + c, 2 * i + 1 < count ? rows[2 * i + 1] + c : NULL, first(width - c)) : _mm512_setzero_si512();
        transpose(words);
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++)
            if (c + i < width) _mm512_mask_storeu_epi32(into + (c + i) * next, first(most), words[i]);
    }
}

/* fp32 (across, row) turned, of its first `keys` columns: (keys, across). `across` and `row` are multiples of 16. */
static void turn_sums(const float *from, long across, long row, long keys, float *into) {
    for (long key = 0; key < keys; key += LANES)
        for (long c = 0; c < across; c += LANES) {
            __m512i words[LANES];
#pragma GCC unroll 16
            for (int i = 0; i < LANES; i++) words[i] = _mm512_load_si512(from + (c + i) * row + key);
            transpose(words);
#pragma GCC unroll 16
            for (int i = 0; i < LANES; i++)
                if (key + i < keys) _mm512_storeu_si512(into + (key + i) * across + c, words[i]);
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
