/* Products with a matrix of few rows W (r, n), as LoRA's A and B are: of so little work that reading x, or y, is all of their cost, so each is one pass over it.
 * All in bfloat16 with sums in fp32. What a thread writes nobody else adds to, so no sum depends on the number of threads.
 */
#include "tiles.h"

#include <omp.h>

#define TOKENS (ROWS == 32 ? 96 : 48) /* of one task: whole tiles */
#define COLUMNS 64
#define TOGETHER 64 /* tokens whose rows stay in a core's cache */

/* W (r, n) as words of two neighbours of a row, by lanes of rows: (n / 2, rows of 16). */
static void by_rows(const bf16 *w, long r, long n, long lanes, pair *into) {
    memset(into, 0, n / 2 * lanes * sizeof(pair));
    for (long i = 0; i < r; i++)
        for (long k = 0; k < n / 2; k++) into[k * lanes + i] = ((const pair *)(w + i * n))[k];
}

/* W (r, n) as words of one column of two neighbouring rows: (r / 2, n). */
static void by_columns(const bf16 *w, long r, long n, pair *into) {
    for (long i = 0; i < r; i += 2)
        for (long c = 0; c < n; c++) into[i / 2 * n + c] = w[i * n + c] | (i + 1 < r ? (pair)w[(i + 1) * n + c] << 16 : 0);
}

#ifndef __AMX_BF16__
/* 12 rows at a time where there is one vector of lanes: fewer would wait for each sum. */
static void narrow_12(const pair *x, long x_row, const pair *w, long lanes, long pairs, float *c) {
    __m512 sum[12];
#pragma GCC unroll 12
    for (int i = 0; i < 12; i++) sum[i] = _mm512_setzero_ps();
    for (long k = 0; k < pairs; k++) {
        __m512i right = _mm512_load_si512(w + k * lanes);
#pragma GCC unroll 12
        for (int i = 0; i < 12; i++)
            sum[i] = _mm512_dpbf16_ps(sum[i], (__m512bh)_mm512_set1_epi32((int)x[i * x_row + k]), (__m512bh)right);
    }
#pragma GCC unroll 12
    for (int i = 0; i < 12; i++) _mm512_store_ps(c + i * lanes, sum[i]);
}
#endif

/* low (T, r) = x (T, n) W^T; n even. */
void luthier_narrow(const bf16 *x, const bf16 *w, bf16 *low, long tokens, long n, long r) {
    long lanes = rounded(r, LANES);
#pragma omp parallel
    {
        room *own = room_of(n * lanes * 2 + TOKENS * lanes * 4);
        pair *packed = take(own, n * lanes * 2);
        float *sums = take(own, TOKENS * lanes * 4);
        by_rows(w, r, n, lanes, packed);
        begin_products();
#pragma omp for schedule(static)
        for (long start = 0; start < tokens; start += TOKENS) {
            long rows = tokens - start < TOKENS ? tokens - start : TOKENS, done = 0;
            const pair *from = (const pair *)(x + start * n);
#ifndef __AMX_BF16__
            if (lanes == LANES)
                for (; done + 12 <= rows; done += 12)
                    narrow_12(from + done * (n / 2), n / 2, packed, lanes, n / 2, sums + done * lanes);
#endif
            product(rows - done, lanes, from + done * (n / 2), n / 2, packed, lanes, n / 2, sums + done * lanes, lanes, 0);
            for (long i = 0; i < rows; i++)
                for (long c = 0; c < r; c += LANES)
                    write16(low + (start + i) * r + c, _mm512_load_ps(sums + i * lanes + c), first(r - c));
        }
        end_products();
    }
}

/* A few rows of y += low W, four vectors of columns at a time. */
INLINE void widen_rows(const int rows, const pair *low, long low_row, const pair *w, long n, long pairs, bf16 *y, long columns) {
    for (long c = 0; c < columns; c += COLUMNS) {
        __m512 sum[4][4];
        __mmask16 mask[4];
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) mask[j] = first(columns - c - j * LANES);
#pragma GCC unroll 4
        for (int i = 0; i < rows; i++)
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++) sum[i][j] = read16(y + i * n + c + j * LANES, mask[j]);
        for (long k = 0; k < pairs; k++) {
            __m512i right[4];
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++) right[j] = _mm512_maskz_loadu_epi32(mask[j], w + k * n + c + j * LANES);
#pragma GCC unroll 4
            for (int i = 0; i < rows; i++)
#pragma GCC unroll 4
                for (int j = 0; j < 4; j++)
                    sum[i][j] = _mm512_dpbf16_ps(sum[i][j], (__m512bh)_mm512_set1_epi32((int)low[i * low_row + k]),
                                                 (__m512bh)right[j]);
        }
#pragma GCC unroll 4
        for (int i = 0; i < rows; i++)
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++) write16(y + i * n + c + j * LANES, sum[i][j], mask[j]);
    }
}

/* y (T, n) += low (T, r) W. */
void luthier_widen(const bf16 *low, const bf16 *w, bf16 *y, long tokens, long n, long r) {
    long pairs = (r + 1) / 2;
#pragma omp parallel
    {
        room *own = room_of(pairs * n * 4 + TOKENS * pairs * 4);
        pair *packed = take(own, pairs * n * 4), *rows_of = take(own, TOKENS * pairs * 4);
        by_columns(w, r, n, packed);
#pragma omp for schedule(static)
        for (long start = 0; start < tokens; start += TOKENS) {
            long rows = tokens - start < TOKENS ? tokens - start : TOKENS, i = 0;
            for (long t = 0; t < rows; t++) {
                bf16 *to = (bf16 *)(rows_of + t * pairs);
                to[2 * pairs - 1] = 0;
                memcpy(to, low + (start + t) * r, r * sizeof(bf16));
            }
            for (; i + 4 <= rows; i += 4) widen_rows(4, rows_of + i * pairs, pairs, packed, n, pairs, y + (start + i) * n, n);
            for (; i < rows; i++) widen_rows(1, rows_of + i * pairs, pairs, packed, n, pairs, y + (start + i) * n, n);
        }
    }
}

#ifdef __AMX_BF16__

#define STRIP 64 /* columns */

/* into (r, n), fp32, = low (T, r)^T x (T, n). A thread has some columns of it, and adds to them block of tokens after block. */
void luthier_outer(const bf16 *low, const bf16 *x, float *into, long tokens, long n, long r) {
    long strips = (n + STRIP - 1) / STRIP;
    if (!tokens) memset(into, 0, r * n * 4);
#pragma omp parallel
    {
        long threads = omp_get_num_threads(), thread = omp_get_thread_num(), pairs = TOGETHER / 2;
        room *own = room_of(r * TOGETHER * 2 + STRIP * TOGETHER * 2 + r * STRIP * 4);
        pair *turned = take(own, r * TOGETHER * 2), *packed = take(own, STRIP * TOGETHER * 2);
        float *sums = take(own, r * STRIP * 4);
        begin_products();
        for (long start = 0; start < tokens; start += TOGETHER) {
            long here = tokens - start < TOGETHER ? tokens - start : TOGETHER;
            const bf16 *of_low[TOGETHER], *of_x[TOGETHER];
            for (long t = 0; t < here; t++) of_low[t] = low + (start + t) * r;
            for (long k = 0; k < TOGETHER; k += 2 * LANES) pack_turned(of_low + k, here - k, r, turned + k / 2, pairs, LANES);
            for (long strip = strips * thread / threads; strip < strips * (thread + 1) / threads; strip++) {
                long c = strip * STRIP, width = n - c < STRIP ? n - c : STRIP;
                for (long t = 0; t < here; t++) of_x[t] = x + (start + t) * n + c;
                pack_along(of_x, here, width, TOGETHER, STRIP, packed);
                if (width == STRIP) {
                    product(r, STRIP, turned, pairs, packed, STRIP, pairs, into + c, n, start > 0);
                    continue;
                }
                product(r, STRIP, turned, pairs, packed, STRIP, pairs, sums, STRIP, 0);
                for (long i = 0; i < r; i++)
                    for (long j = 0; j < width; j++) into[i * n + c + j] = (start ? into[i * n + c + j] : 0) + sums[i * STRIP + j];
            }
        }
        end_products();
    }
}

#else

/* What some tokens add to up to 8 rows and 32 columns of low^T x; `low` is (tokens / 2, 8) words of two neighbouring tokens. */
INLINE void outer_part(const pair *low, const bf16 *x, long tokens, long n, long columns, float *into, long rows, int add) {
    __m512 sum[8][2];
    __mmask16 mask[2] = {first(columns), first(columns - LANES)};
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
        int has = add && i < rows;
        sum[i][0] = has ? _mm512_maskz_loadu_ps(mask[0], into + i * n) : _mm512_setzero_ps();
        sum[i][1] = has ? _mm512_maskz_loadu_ps(mask[1], into + i * n + LANES) : _mm512_setzero_ps();
    }
    for (long t = 0; t < tokens; t += 2) {
        const bf16 *next = t + 1 < tokens ? x + (t + 1) * n : NULL;
        __m512i right[2] = {two_rows(x + t * n, next, mask[0]), two_rows(x + t * n + LANES, next ? next + LANES : NULL, mask[1])};
#pragma GCC unroll 8
        for (int i = 0; i < 8; i++) {
            __m512bh left = (__m512bh)_mm512_set1_epi32((int)low[t / 2 * 8 + i]);
            sum[i][0] = _mm512_dpbf16_ps(sum[i][0], left, (__m512bh)right[0]);
            sum[i][1] = _mm512_dpbf16_ps(sum[i][1], left, (__m512bh)right[1]);
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++)
        if (i < rows) {
            _mm512_mask_storeu_ps(into + i * n, mask[0], sum[i][0]);
            _mm512_mask_storeu_ps(into + i * n + LANES, mask[1], sum[i][1]);
        }
}

/* into (r, n), fp32, = low (T, r)^T x (T, n). A thread has some columns of it, and adds to them block of tokens after block. */
void luthier_outer(const bf16 *low, const bf16 *x, float *into, long tokens, long n, long r) {
    long strips = (n + 2 * LANES - 1) / (2 * LANES);
    if (!tokens) memset(into, 0, r * n * 4);
#pragma omp parallel
    {
        long threads = omp_get_num_threads(), thread = omp_get_thread_num();
        long from = strips * thread / threads * 2 * LANES, to = strips * (thread + 1) / threads * 2 * LANES;
        pair packed[TOGETHER / 2 * 8];
        for (long start = 0; start < tokens; start += TOGETHER)
            for (long e = 0; e < r; e += 8) {
                long here = tokens - start < TOGETHER ? tokens - start : TOGETHER;
                for (long t = 0; t < here; t += 2) {
                    const bf16 *one = low + (start + t) * r + e;
                    __m512i words = two_rows(one, t + 1 < here ? one + r : NULL, first(r - e < 8 ? r - e : 8));
                    _mm512_mask_storeu_epi32(packed + t / 2 * 8, 0xff, words);
                }
                for (long c = from; c < to && c < n; c += 2 * LANES)
                    outer_part(packed, x + start * n + c, here, n, n - c, into + e * n + c, r - e, start > 0);
            }
    }
}

#endif
