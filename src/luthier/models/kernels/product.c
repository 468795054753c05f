/* y = x W^T, or x W, of many rows with a weight as it stands in a model; with what a linear adds, and the product of two thin matrices beside it.
 *
 * Panels of 64 columns of y: a thread packs the part of W that they take, and runs x through it, six rows at a time. The panels, one behind the other,
 * are divided among the threads as one length of work, wherever that cuts; every number is computed by one thread in one order.
 */
#include "tiles.h"

#include <omp.h>

#define PANEL 64

/* Rows of a weight (columns of y, n) as a panel: words of two neighbours of a row, (n / 2, PANEL). */
static void pack_rows(const bf16 *w, long n, long columns, pair *panel) {
    for (long j = 0; j < PANEL; j += LANES) {
        long k = 0;
        for (; k + LANES <= n / 2; k += LANES) {
            __m512i r[LANES];
#pragma GCC unroll 16
            for (int i = 0; i < LANES; i++)
                r[i] = j + i < columns ? _mm512_loadu_si512((const pair *)(w + (j + i) * n) + k) : _mm512_setzero_si512();
            transpose(r);
#pragma GCC unroll 16
            for (int i = 0; i < LANES; i++) _mm512_store_si512(panel + (k + i) * PANEL + j, r[i]);
        }
        for (; k < n / 2; k++)
            for (long i = 0; i < LANES; i++) panel[k * PANEL + j + i] = j + i < columns ? ((const pair *)(w + (j + i) * n))[k] : 0;
    }
}

/* Columns of a weight (n, `row` numbers a row) as a panel: words of one column of two neighbouring rows, (n / 2, PANEL). */
static void pack_columns(const bf16 *w, long n, long row, long columns, pair *panel) {
    for (long k = 0; k < n; k += 2) {
        for (long ahead = 0; ahead < 2; ahead++) /* rows are too far apart to be fetched unasked */
            for (long j = 0; j < PANEL; j += 32) _mm_prefetch((const char *)(w + (k + ahead + 16) * row + j), _MM_HINT_T0);
        for (long j = 0; j < PANEL; j += LANES) {
            const bf16 *one = w + k * row + j;
            _mm512_store_si512(panel + k / 2 * PANEL + j, two_rows(one, k + 1 < n ? one + row : NULL, first(columns - j)));
        }
    }
}

INLINE void sum_up(const int rows, const pair *a, long a_row, long a_pair, const pair *panel, long pairs, __m512 sum[ROWS][4]) {
    for (long k = 0; k < pairs; k++) {
        __m512i right[4];
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) right[j] = _mm512_load_si512(panel + k * PANEL + j * LANES);
#pragma GCC unroll 6
        for (int i = 0; i < rows; i++) {
            __m512i left = _mm512_set1_epi32((int)a[i * a_row + k * a_pair]);
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++) sum[i][j] = _mm512_dpbf16_ps(sum[i][j], (__m512bh)left, (__m512bh)right[j]);
        }
    }
}

/* Some rows of x (its words by strides) and of `low` through a panel, that of the thin matrix behind it. */
INLINE void run(const int rows, const pair *x, long x_row, long x_pair, long pairs, const pair *low, long low_pairs, const pair *panel,
                const bf16 *bias, bf16 *y, long y_row, long columns, int add) {
    __m512 sum[ROWS][4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
        __mmask16 mask = first(columns - j * LANES);
        __m512 begin = bias ? read16(bias + j * LANES, mask) : _mm512_setzero_ps();
#pragma GCC unroll 6
        for (int i = 0; i < rows; i++) sum[i][j] = add ? _mm512_add_ps(begin, read16(y + i * y_row + j * LANES, mask)) : begin;
    }
    sum_up(rows, x, x_row, x_pair, panel, pairs, sum);
    if (low) sum_up(rows, low, low_pairs, 1, panel + pairs * PANEL, low_pairs, sum);
#pragma GCC unroll 6
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) write16(y + i * y_row + j * LANES, sum[i][j], first(columns - j * LANES));
}

static void run_rows(long rows, const pair *x, long x_row, long x_pair, long pairs, const pair *low, long low_pairs, const pair *panel,
                     const bf16 *bias, bf16 *y, long y_row, long columns, int add) {
    switch (rows < ROWS ? rows : ROWS) {
    case 1: run(1, x, x_row, x_pair, pairs, low, low_pairs, panel, bias, y, y_row, columns, add); break;
    case 2: run(2, x, x_row, x_pair, pairs, low, low_pairs, panel, bias, y, y_row, columns, add); break;
    case 3: run(3, x, x_row, x_pair, pairs, low, low_pairs, panel, bias, y, y_row, columns, add); break;
    case 4: run(4, x, x_row, x_pair, pairs, low, low_pairs, panel, bias, y, y_row, columns, add); break;
    case 5: run(5, x, x_row, x_pair, pairs, low, low_pairs, panel, bias, y, y_row, columns, add); break;
    default: run(6, x, x_row, x_pair, pairs, low, low_pairs, panel, bias, y, y_row, columns, add);
    }
}

/* y (rows, columns) = x (rows, n) W, W's columns being its rows where `by_rows`; + bias; + low (rows, r) thin (r, columns); + y where `add`. n and r even. */
void luthier_product(const bf16 *x, const bf16 *w, const bf16 *bias, const bf16 *low, const bf16 *thin, bf16 *y, long rows, long n,
                     long columns, long r, int by_rows, int add) {
    long tiles = (rows + ROWS - 1) / ROWS, panels = (columns + PANEL - 1) / PANEL, pairs = n / 2, low_pairs = r / 2;
#pragma omp parallel
    {
        long threads = omp_get_num_threads(), thread = omp_get_thread_num();
        long next = tiles * panels * thread / threads, end = tiles * panels * (thread + 1) / threads;
        pair *panel = take(room_of((n + r) * PANEL * 2), (n + r) * PANEL * 2);
        while (next < end) {
            long p = next / tiles, from = next % tiles, to = from + end - next < tiles ? from + end - next : tiles;
            long column = p * PANEL, here = columns - column < PANEL ? columns - column : PANEL;
            if (by_rows) pack_rows(w + column * n, n, here, panel);
            else pack_columns(w + column, n, columns, here, panel);
            if (low) pack_columns(thin + column, r, columns, here, panel + pairs * PANEL);
            for (long t = from; t < to; t++) {
                long row = t * ROWS, left = rows - row;
                const pair *a = (const pair *)(x + row * n), *b = low ? (const pair *)(low + row * r) : NULL;
                const bf16 *begin = bias ? bias + column : NULL;
                bf16 *into = y + row * columns + column;
                run_rows(left, a, pairs, 1, pairs, b, low_pairs, panel, begin, into, columns, here, add);
            }
            next += to - from;
        }
    }
}

/* y (m, n) = g^T x: g (rows, m), x (rows, n). `packed`, (m rounded up to 6, rows rounded up to 2), is for g: by six columns, words of two neighbouring
 * rows. */
void luthier_gradient(const bf16 *g, const bf16 *x, bf16 *y, pair *packed, long rows, long m, long n) {
    long tiles = (m + ROWS - 1) / ROWS, panels = (n + PANEL - 1) / PANEL, pairs = (rows + 1) / 2;
#pragma omp parallel
    {
        long threads = omp_get_num_threads(), thread = omp_get_thread_num();
#pragma omp for schedule(static)
        for (long k = 0; k < pairs; k++) {
            const bf16 *one = g + 2 * k * m, *two = 2 * k + 1 < rows ? one + m : NULL;
            for (long t = 0; t < tiles; t += 8) { /* of which three vectors hold eight */
                pair words[8 * ROWS];
                for (long c = 0; c < 8 * ROWS; c += LANES)
                    _mm512_storeu_si512(words + c, two_rows(one + t * ROWS + c, two ? two + t * ROWS + c : NULL, first(m - t * ROWS - c)));
                for (long i = 0; i < 8 && t + i < tiles; i++) memcpy(packed + ((t + i) * pairs + k) * ROWS, words + i * ROWS, ROWS * 4);
            }
        }
        long next = tiles * panels * thread / threads, end = tiles * panels * (thread + 1) / threads;
        pair *panel = take(room_of(pairs * PANEL * 4), pairs * PANEL * 4);
        while (next < end) {
            long p = next / tiles, from = next % tiles, to = from + end - next < tiles ? from + end - next : tiles;
            long column = p * PANEL, here = n - column < PANEL ? n - column : PANEL;
            pack_columns(x + column, rows, n, here, panel);
            for (long t = from; t < to; t++)
                run_rows(m - t * ROWS, packed + t * pairs * ROWS, 1, ROWS, pairs, NULL, 0, panel, NULL, y + t * ROWS * n + column, n, here, 0);
            next += to - from;
        }
    }
}
