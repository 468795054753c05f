/* y = x W^T, or x W, of many rows with a weight as it stands in a model; with what a linear adds, and the product of two thin matrices beside it.
 *
 * Panels of 64 columns of y: a thread packs the part of W that they take, and runs x through it, six rows at a time. The panels, one behind the other,
 * are divided among the threads as one length of work, wherever that cuts; every number is computed by one thread in one order.
 */
#include "tiles.h"

#include <omp.h>

#define PANEL 64
#define DEEP 2048 /* of the summed dimension: so much of a panel stays in a core's cache */
#define GROUP 64  /* tiles that go through all parts of a deeper panel together */

/* A weight in 4 bits (NormalFloat, Dettmers et al. 2023): two numbers a byte, the first one high; number i is code[q_i] scale[i / 64], rounded. Rows are
 * multiples of 64. */
typedef struct {
    const uint8_t *packed;
    const float *scale, *code;
} in_4_bits;

/* Rows of a weight (columns of y, n of `row` numbers) as a panel: words of two neighbours of a row, (n / 2, PANEL). */
static void pack_rows(const bf16 *w, long n, long row, long columns, pair *panel) {
    for (long j = 0; j < PANEL; j += LANES) {
        long k = 0;
        for (; k + LANES <= n / 2; k += LANES) {
            __m512i r[LANES];
#pragma GCC unroll 16
            for (int i = 0; i < LANES; i++)
                r[i] = j + i < columns ? _mm512_loadu_si512((const pair *)(w + (j + i) * row) + k) : _mm512_setzero_si512();
            transpose(r);
#pragma GCC unroll 16
            for (int i = 0; i < LANES; i++) _mm512_store_si512(panel + (k + i) * PANEL + j, r[i]);
        }
        for (; k < n / 2; k++)
            for (long i = 0; i < LANES; i++) panel[k * PANEL + j + i] = j + i < columns ? ((const pair *)(w + (j + i) * row))[k] : 0;
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
    for (long j = 0; j < PANEL; j += LANES)
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

/* `pack_columns` of the part of W (n, row) from `start` and `column` on: n is even, row a multiple of 64, as many as a panel has. */
static void pack_columns_of_4_bits(in_4_bits w, long start, long column, long n, long row, pair *panel) {
    __m512 code = _mm512_loadu_ps(w.code);
    for (long k = 0; k < n; k += 2)
        for (long j = 0; j < PANEL; j += LANES) {
            long i = (start + k) * row + column + j;
            __m512i one = _mm512_cvtepu16_epi32(numbers_of_4_bits(w, i, code));
            __m512i two = _mm512_cvtepu16_epi32(numbers_of_4_bits(w, i + row, code));
            _mm512_store_si512(panel + k / 2 * PANEL + j, _mm512_or_si512(one, _mm512_slli_epi32(two, 16)));
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

/* What stands on the left: word (i, k) of a tile at `at` + i * row + k * next, tiles of six rows `tile` apart. */
typedef struct {
    const pair *at;
    long row, next, tile;
} left_side;

/* What stands on the right: W (n, columns), or by rows (columns, n), as it is or in 4 bits; to y are added a bias, `low` (rows, r) times
 * `thin` (r, columns), y. */
typedef struct {
    const bf16 *w, *bias, *low, *thin;
    in_4_bits few;
    long n, columns, r;
    int by_rows, add;
} right_side;

/* Some rows of a tile through a part of a panel, with the thin matrix's behind it: the first part begins y, the last writes it; between them `sums` holds
 * it. */
INLINE void run(const int rows, left_side x, const pair *panel, long pairs, const right_side *w, const pair *low, long column, float *sums,
                bf16 *y, int is_first, int is_last) {
    __m512 sum[ROWS][4];
    long here = w->columns - column;
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
        __mmask16 mask = first(here - j * LANES);
        __m512 begin = w->bias ? read16(w->bias + column + j * LANES, mask) : _mm512_setzero_ps();
#pragma GCC unroll 6
        for (int i = 0; i < rows; i++)
            sum[i][j] = !is_first ? _mm512_load_ps(sums + i * PANEL + j * LANES)
                        : w->add  ? _mm512_add_ps(begin, read16(y + i * w->columns + column + j * LANES, mask))
                                  : begin;
    }
    sum_up(rows, x.at, x.row, x.next, panel, pairs, sum);
    if (low && is_last) sum_up(rows, low, w->r / 2, 1, panel + pairs * PANEL, w->r / 2, sum);
#pragma GCC unroll 6
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) {
            if (is_last) write16(y + i * w->columns + column + j * LANES, sum[i][j], first(here - j * LANES));
            else _mm512_store_ps(sums + i * PANEL + j * LANES, sum[i][j]);
        }
}

static void run_rows(long rows, left_side x, const pair *panel, long pairs, const right_side *w, const pair *low, long column, float *sums,
                     bf16 *y, int is_first, int is_last) {
    switch (rows < ROWS ? rows : ROWS) {
    case 1: run(1, x, panel, pairs, w, low, column, sums, y, is_first, is_last); break;
    case 2: run(2, x, panel, pairs, w, low, column, sums, y, is_first, is_last); break;
    case 3: run(3, x, panel, pairs, w, low, column, sums, y, is_first, is_last); break;
    case 4: run(4, x, panel, pairs, w, low, column, sums, y, is_first, is_last); break;
    case 5: run(5, x, panel, pairs, w, low, column, sums, y, is_first, is_last); break;
    default: run(6, x, panel, pairs, w, low, column, sums, y, is_first, is_last);
    }
}

/* Tiles from `from` on, before `to`, through one panel of columns. */
static void through_panel(left_side x, const right_side *w, bf16 *y, long rows, long column, long from, long to, pair *panel, float *sums) {
    long here = w->columns - column < PANEL ? w->columns - column : PANEL;
    long parts = w->n > DEEP ? (w->n + DEEP - 1) / DEEP : 1;
    for (long part = 0; part < parts; part++) {
        long start = part * DEEP, n = w->n - start < DEEP ? w->n - start : DEEP, pairs = (n + 1) / 2;
        if (w->few.packed && w->by_rows) pack_rows_of_4_bits(w->few, column, start, n, w->n, here, panel);
        else if (w->few.packed) pack_columns_of_4_bits(w->few, start, column, n, w->columns, panel);
        else if (w->by_rows) pack_rows(w->w + column * w->n + start, n, w->n, here, panel);
        else pack_columns(w->w + start * w->columns + column, n, w->columns, here, panel);
        if (w->low && part == parts - 1) pack_columns(w->thin + column, w->r, w->columns, here, panel + pairs * PANEL);
        for (long t = from; t < to; t++) {
            const pair *low = w->low ? (const pair *)(w->low + t * ROWS * w->r) : NULL;
            left_side tile = {x.at + t * x.tile + start / 2 * x.next, x.row, x.next, 0};
            run_rows(rows - t * ROWS, tile, panel, pairs, w, low, column, sums + (t - from) * ROWS * PANEL, y + t * ROWS * w->columns,
                     part == 0, part == parts - 1);
        }
    }
}

/* This thread's part of y (rows, columns). */
static void multiply(left_side x, const right_side *w, bf16 *y, long rows) {
    long tiles = (rows + ROWS - 1) / ROWS, panels = (w->columns + PANEL - 1) / PANEL;
    long threads = omp_get_num_threads(), thread = omp_get_thread_num();
    long next = tiles * panels * thread / threads, end = tiles * panels * (thread + 1) / threads;
    int deep = w->n > DEEP;
    size_t panel_size = ((deep ? DEEP : rounded(w->n, 2)) + w->r) * PANEL * 2, sums_size = deep ? GROUP * ROWS * PANEL * 4 : 0;
    room *own = room_of(panel_size + sums_size);
    pair *panel = take(own, panel_size);
    float *sums = take(own, sums_size);
    while (next < end) {
        long from = next % tiles, to = from + end - next < tiles ? from + end - next : tiles;
        if (deep && to - from > GROUP) to = from + GROUP;
        through_panel(x, w, y, rows, next / tiles * PANEL, from, to, panel, sums);
        next += to - from;
    }
}

/* y (rows, columns) = x (rows, n) W, W's columns being its rows where `by_rows`; + bias; + low (rows, r) thin (r, columns); + y where `add`. n and r are
 * even. W is `w`, or in 4 bits `packed` with `scale` and `code`. */
void luthier_product(const bf16 *x, const bf16 *w, const uint8_t *packed, const float *scale, const float *code, const bf16 *bias,
                     const bf16 *low, const bf16 *thin, bf16 *y, long rows, long n, long columns, long r, int by_rows, int add) {
    const right_side matrix = {w, bias, low, thin, {packed, scale, code}, n, columns, r, by_rows, add};
#pragma omp parallel
    multiply((left_side){(const pair *)x, n / 2, 1, ROWS * (n / 2)}, &matrix, y, rows);
}

/* y (m, n) = g^T x: g (rows, m), x (rows, n). `packed`, (m rounded up to 6, rows rounded up to 2), is for g: by six columns, words of two neighbouring
 * rows. */
void luthier_gradient(const bf16 *g, const bf16 *x, bf16 *y, pair *packed, long rows, long m, long n) {
    long tiles = (m + ROWS - 1) / ROWS, pairs = (rows + 1) / 2;
    const right_side matrix = {x, NULL, NULL, NULL, {NULL, NULL, NULL}, rows, n, 0, 0, 0};
#pragma omp parallel
    {
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
        multiply((left_side){packed, 1, ROWS, pairs * ROWS}, &matrix, y, m);
    }
}
