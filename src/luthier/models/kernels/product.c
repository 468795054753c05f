/* y = x W^T, or x W, of many rows with a weight as it stands in a model; with what a linear adds, and the product of two thin matrices beside it.
 *
 * Panels of columns of y: a thread packs the part of W that they take, and runs x through it, a tile of rows at a time. The panels, one behind the other,
 * are divided among the threads as one length of work, wherever that cuts; every number is computed by one thread in one order.
 */
#include "panels.h"

#include <omp.h>

#ifdef __AMX_BF16__
#define WIDE (10L << 15) /* words of panels that stay in a core's second cache */
#define ROWS_OF_TEAM 256 /* at least: with fewer, packing W would cost too much of their time */
#else
#define WIDE 0L
#define ROWS_OF_TEAM (1L << 40)
#endif
#define DEEP 2048          /* of the summed dimension: so much of a panel stays in a core's cache */
#define GROUP (384 / ROWS) /* tiles that go through all parts of a deeper panel together */

/* What stands on the right: W (n, columns), or by rows (columns, n), as it is or in 4 bits; to y are added a bias, `low` (rows, r) times
 * `thin` (r, columns), y. */
typedef struct {
    const bf16 *w, *bias, *low, *thin;
    in_4_bits few;
    long n, columns, r;
    int by_rows, add;
} right_side;

/* Memory of a thread: panels, sums of tiles between their parts, and what one tile needs. */
typedef struct {
    pair *panel, *aside;
    float *sums;
} workspace;

/* Up to ROWS rows of x through a part of a panel, which stands before column `column` of y: the first part begins y, the last writes it and takes `low` along;
 * between them `sums` holds it. */
typedef struct {
    const pair *x, *panel;
    long x_row, pairs, words, column, columns;
    const bf16 *low; /* of these rows, or none */
    pair *aside;
    float *sums;
    bf16 *y;
    int is_first, is_last;
} passage;

/* What y begins with: 16 numbers from `column` on of row i. */
INLINE __m512 beginning(const right_side *w, const bf16 *y, long column, __mmask16 mask) {
    __m512 begin = w->bias ? read16(w->bias + column, mask) : _mm512_setzero_ps();
    return w->add ? _mm512_add_ps(begin, read16(y + column, mask)) : begin;
}

#ifdef __AMX_BF16__

/* Words of a panel's part: its last ones stand with those of the thin matrix in tiles of their own. */
static long words_in_panel(long pairs, long r) { return pairs / DEPTH * DEPTH + rounded(pairs % DEPTH + r / 2, DEPTH); }

/* Words that a tile needs aside: for the sums of two blocks, and for its rows' last words and those of `low`. */
static long words_aside(long r) { return ROWS * (2 * PANEL + rounded(DEPTH - 1 + r / 2, DEPTH)); }

/* A block's rows that have yet to be written, from `next` on, `at_once` at a time: sums (rows, PANEL) into y's columns from `column` on. */
typedef struct {
    const right_side *w;
    const float *sums;
    bf16 *y;
    long column, rows, next, at_once;
} unwritten;

INLINE void write_some(void *given) {
    unwritten *u = given;
    const right_side *w = u->w;
    long stop = least(u->rows, u->next + u->at_once), here = w->columns - u->column;
    __mmask32 mask = here < PANEL ? (1u << here) - 1 : ~0u;
    for (; u->next < stop; u->next++) {
        const float *from = u->sums + u->next * PANEL;
        bf16 *y = u->y + u->next * w->columns;
        __m512 one = _mm512_load_ps(from), two = _mm512_load_ps(from + LANES);
        if (w->bias || w->add) {
            one = _mm512_add_ps(one, beginning(w, y, u->column, first(here)));
            two = _mm512_add_ps(two, beginning(w, y, u->column + LANES, first(here - LANES)));
        }
        _mm512_mask_storeu_epi16(y + u->column, mask, (__m512i)_mm512_cvtne2ps_pbh(two, one));
    }
}

/* A block's sums are rounded and written while the units work on the next one. */
static void run_rows(long rows, const passage *p, const right_side *w) {
    long rest = p->pairs % DEPTH, steps = p->pairs / DEPTH, behind = p->low ? w->r / 2 : 0, more = (rest + behind + DEPTH - 1) / DEPTH;
    pair *tail = p->aside + ROWS * 2 * PANEL;
    if (more) memset(tail, 0, ROWS * more * DEPTH * 4);
    for (long i = 0; more && i < rows; i++) {
        memcpy(tail + i * more * DEPTH, p->x + i * p->x_row + steps * DEPTH, rest * 4);
        if (behind) memcpy(tail + i * more * DEPTH + rest, p->low + i * w->r, behind * 4);
    }
    shape_for(rows);
    long times = steps + more + 1; /* that some of the block before is written: after each step, and once after all */
    unwritten last = {w, NULL, p->y, 0, 0, 0, (rows + times - 1) / times};
    for (long j = 0, odd = 0; j < p->columns; j += PANEL, odd = !odd) {
        float *sums = p->is_first && p->is_last ? (float *)p->aside + odd * ROWS * PANEL : p->sums + j * ROWS;
        any_block(rows, rounded(least(p->columns - j, PANEL), LANES), p->x, p->x_row, steps, tail, more, p->panel + j * p->words, PANEL, sums, PANEL,
                  !p->is_first, write_some, &last);
        write_some(&last);
        last.sums = sums;
        last.column = p->column + j;
        last.next = 0;
        last.rows = p->is_last ? rows : 0;
    }
    last.at_once = rows;
    write_some(&last);
}

#else

static long words_in_panel(long pairs, long r) { return pairs + r / 2; }

static long words_aside(long r) {
    (void)r;
    return 0;
}

INLINE void sum_up(const int rows, const pair *a, long a_row, const pair *panel, long pairs, __m512 sum[ROWS][4]) {
    for (long k = 0; k < pairs; k++) {
        __m512i right[4];
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) right[j] = _mm512_load_si512(panel + k * PANEL + j * LANES);
#pragma GCC unroll 6
        for (int i = 0; i < rows; i++) {
            __m512i left = _mm512_set1_epi32((int)a[i * a_row + k]);
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++) sum[i][j] = _mm512_dpbf16_ps(sum[i][j], (__m512bh)left, (__m512bh)right[j]);
        }
    }
}

INLINE void run(const int rows, const passage *p, const right_side *w) {
    __m512 sum[ROWS][4];
    long here = w->columns - p->column;
    bf16 *y = p->y + p->column;
#pragma GCC unroll 6
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++)
            sum[i][j] = p->is_first ? beginning(w, p->y + i * w->columns, p->column + j * LANES, first(here - j * LANES))
                                    : _mm512_load_ps(p->sums + i * PANEL + j * LANES);
    sum_up(rows, p->x, p->x_row, p->panel, p->pairs, sum);
    if (p->low) sum_up(rows, (const pair *)p->low, w->r / 2, p->panel + p->pairs * PANEL, w->r / 2, sum);
#pragma GCC unroll 6
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) {
            if (p->is_last) write16(y + i * w->columns + j * LANES, sum[i][j], first(here - j * LANES));
            else _mm512_store_ps(p->sums + i * PANEL + j * LANES, sum[i][j]);
        }
}

static void run_rows(long rows, const passage *p, const right_side *w) {
    switch (rows) {
    case 1: run(1, p, w); break;
    case 2: run(2, p, w); break;
    case 3: run(3, p, w); break;
    case 4: run(4, p, w); break;
    case 5: run(5, p, w); break;
    default: run(6, p, w);
    }
}

#endif

/* Tiles of rows from `from` on, before `to`, through one panel of columns. */
static void through_panels(const pair *x, long x_row, const right_side *w, bf16 *y, long rows, long column, long width, long from,
                           long to, workspace own) {
    long here = w->columns - column < width ? w->columns - column : width;
    long parts = w->n > DEEP ? (w->n + DEEP - 1) / DEEP : 1;
    for (long part = 0; part < parts; part++) {
        int is_last = part == parts - 1;
        long start = part * DEEP, n = w->n - start < DEEP ? w->n - start : DEEP, pairs = (n + 1) / 2, r = w->low && is_last ? w->r : 0;
        long words = words_in_panel(pairs, r);
        if (!w->by_rows && w->few.packed) pack_columns_of_4_bits(w->few, start, column, n, w->columns, here, own.panel, words * PANEL);
        else if (!w->by_rows) pack_columns(w->w + start * w->columns + column, n, w->columns, here, own.panel, words * PANEL);
        for (long j = 0; w->by_rows && j < here; j += PANEL) {
            long some = here - j < PANEL ? here - j : PANEL;
            if (w->few.packed) pack_rows_of_4_bits(w->few, column + j, start, n, w->n, some, own.panel + j * words);
            else pack_rows(w->w + (column + j) * w->n + start, n, w->n, some, own.panel + j * words);
        }
        if (r) pack_columns(w->thin + column, r, w->columns, here, own.panel + pairs * PANEL, words * PANEL);
        for (long j = 0; j < here; j += PANEL)
            memset(own.panel + j * words + (pairs + r / 2) * PANEL, 0, (words - pairs - r / 2) * PANEL * 4);
        for (long t = from; t < to; t++) {
            long row = t * ROWS;
            const passage p = {x + row * x_row + start / 2, own.panel, x_row, pairs, words, column, here, r ? w->low + row * w->r : NULL, own.aside,
                               own.sums + (t - from) * ROWS * width, y + row * w->columns, part == 0, is_last};
            run_rows(rows - row < ROWS ? rows - row : ROWS, &p, w);
        }
    }
}

/* Columns of y whose panels, of so many words each, a thread packs at once: its share of a team's, as far as they stay in its cache. */
static long width_of(long columns, long words, long team) {
    long share = columns > team ? (columns + team - 1) / team : 1, most = WIDE / (words + 1) / PANEL * PANEL;
    if (most < PANEL) most = PANEL;
    long groups = (share + most - 1) / most;
    return rounded((share + groups - 1) / groups, PANEL);
}

/* This thread's part of y (rows, columns), from x whose rows are x_row words apart. Teams of threads have rows of their own, and pack all of W; a team's
 * threads divide its tiles times the groups of panels, as one length of work. */
static void multiply(const pair *x, long x_row, const right_side *w, bf16 *y, long rows) {
    long threads = omp_get_num_threads(), thread = omp_get_thread_num(), teams = 1;
    for (long some = 2; some <= threads && some * ROWS_OF_TEAM <= rows; some++)
        if (threads % some == 0) teams = some;
    long team = threads / teams, mine = thread / team;
    int deep = w->n > DEEP;
    long words = words_in_panel(deep ? DEEP / 2 : (w->n + 1) / 2, w->r), width = width_of(w->columns, words, team);
    long all = (rows + ROWS - 1) / ROWS, begin = all * mine / teams, tiles = all * (mine + 1) / teams - begin;
    long groups = (w->columns + width - 1) / width;
    long next = tiles * groups * (thread % team) / team, end = tiles * groups * (thread % team + 1) / team;
    size_t panel_size = words * width * 4, aside_size = words_aside(w->r) * 4, sums_size = deep ? GROUP * ROWS * width * 4 : 0;
    room *r = room_of(panel_size + aside_size + sums_size);
    const workspace own = {take(r, panel_size), take(r, aside_size), take(r, sums_size)};
    begin_products();
    while (next < end) {
        long from = next % tiles, to = from + end - next < tiles ? from + end - next : tiles;
        if (deep && to - from > GROUP) to = from + GROUP;
        through_panels(x, x_row, w, y, rows, next / tiles * width, width, begin + from, begin + to, own);
        next += to - from;
    }
    end_products();
}

/* y (rows, columns) = x (rows, n) W, W's columns being its rows where `by_rows`; + bias; + low (rows, r) thin (r, columns); + y where `add`. n and r are
 * even. W is `w`, or in 4 bits `packed` with `scale` and `code`. */
void luthier_product(const bf16 *x, const bf16 *w, const uint8_t *packed, const float *scale, const float *code, const bf16 *bias,
                     const bf16 *low, const bf16 *thin, bf16 *y, long rows, long n, long columns, long r, int by_rows, int add) {
    const right_side matrix = {w, bias, low, thin, {packed, scale, code}, n, columns, low ? r : 0, by_rows, add};
#pragma omp parallel
    multiply((const pair *)x, n / 2, &matrix, y, rows);
}

/* y (m, n) = g^T x: g (rows, m), x (rows, n). `turned`, (m, rows rounded up to 2), is for g^T. */
void luthier_gradient(const bf16 *g, const bf16 *x, bf16 *y, pair *turned, long rows, long m, long n) {
    long pairs = (rows + 1) / 2;
    const right_side matrix = {x, NULL, NULL, NULL, {NULL, NULL, NULL}, rows, n, 0, 0, 0};
#pragma omp parallel
    {
#pragma omp for schedule(static)
        for (long k = 0; k < pairs; k += LANES) {
            const bf16 *each[2 * LANES];
            long here = rows - 2 * k < 2 * LANES ? rows - 2 * k : 2 * LANES;
            for (long i = 0; i < here; i++) each[i] = g + (2 * k + i) * m;
            pack_turned(each, here, m, turned + k, pairs, pairs - k);
        }
        multiply(turned, pairs, &matrix, y, m);
    }
}
