/* Products of small bfloat16 matrices by AMX's units, summed in fp32: 32 x 32 sums in four tiles, from two tiles of each side. */
#ifndef LUTHIER_UNITS_H
#define LUTHIER_UNITS_H

#include "vectors.h"

#define ROWS 32
#define BROAD 32
#define DEPTH 16 /* words of the summed dimension in a tile */
#define KEYS 32  /* multiples of which attention's products have on their sides */
#define QUERIES 32

typedef struct {
    uint8_t palette, start, unused[14];
    uint16_t bytes[16];
    uint8_t rows[16];
} shapes;

static __thread long shaped; /* rows of A for which this thread's tiles are shaped, 0 for none */

/* Around the products of a thread: others shape the tiles too. */
INLINE void begin_products(void) { shaped = 0; }
INLINE void end_products(void) { _tile_release(); }

/* What was written stands in memory from here on: gcc's functions for tiles do not say that they read it. */
INLINE void written(void) { __asm__ volatile("" ::: "memory"); }

/* Tiles 0 to 3 are C's, 4 and 5 A's, 6 and 7 B's. */
static void shape_for(long rows) {
    if (rows == shaped) return;
    volatile shapes found __attribute__((aligned(64))) = {.palette = 1};
    for (int i = 0; i < 8; i++) {
        int upper = i == 0 || i == 1 || i == 4, lower = i == 2 || i == 3 || i == 5;
        found.bytes[i] = 64;
        found.rows[i] = upper && rows < 16 ? rows : lower && rows > 16 && rows < 32 ? rows - 16 : 16;
    }
    written();
    _tile_loadconfig((const void *)&found);
    shaped = rows;
}

/* C (tiles: tall x broad) = or += A B, `steps` tiles of A deep, and then `more` of `tail` (rows, more * DEPTH), which B goes on for. A's rows and B's are
 * a_row and b_pair words apart. After each step `meanwhile(task)` is called, for work that the units do not do. Where A fits (32 rows of 768 numbers), it stays in
 * the first cache, where B, of which each block of a large product reads another part, would take its place: B is loaded past it. Small products lose nothing by that. */
INLINE void block(const int tall, const int broad, const pair *a, long a_row, long steps, const pair *tail, long more, const pair *b,
                  long b_pair, float *c, long c_row, int add, void (*meanwhile)(void *), void *task) {
    written();
    if (add) {
        _tile_loadd(0, c, c_row * 4);
        if (broad > 1) _tile_loadd(1, c + 16, c_row * 4);
        if (tall > 1) _tile_loadd(2, c + 16 * c_row, c_row * 4);
        if (tall > 1 && broad > 1) _tile_loadd(3, c + 16 * c_row + 16, c_row * 4);
    } else {
        _tile_zero(0);
        if (broad > 1) _tile_zero(1);
        if (tall > 1) _tile_zero(2);
        if (tall > 1 && broad > 1) _tile_zero(3);
    }
    for (int part = 0; part < 2; part++) {
        for (long k = 0; k < steps; k++, a += DEPTH, b += DEPTH * b_pair) {
            _tile_loadd(4, a, a_row * 4);
            _tile_stream_loadd(6, b, b_pair * 4);
            if (tall > 1) _tile_loadd(5, a + 16 * a_row, a_row * 4);
            if (broad > 1) _tile_stream_loadd(7, b + 16, b_pair * 4);
            _tile_dpbf16ps(0, 4, 6);
            if (tall > 1) _tile_dpbf16ps(2, 5, 6);
            if (broad > 1) _tile_dpbf16ps(1, 4, 7);
            if (tall > 1 && broad > 1) _tile_dpbf16ps(3, 5, 7);
            meanwhile(task);
        }
        a = tail;
        a_row = more * DEPTH;
        steps = more;
    }
    _tile_stored(0, c, c_row * 4);
    if (broad > 1) _tile_stored(1, c + 16, c_row * 4);
    if (tall > 1) _tile_stored(2, c + 16 * c_row, c_row * 4);
    if (tall > 1 && broad > 1) _tile_stored(3, c + 16 * c_row + 16, c_row * 4);
    written();
}

INLINE void nothing(void *task) { (void)task; }

/* The same for up to ROWS rows, whose tiles are shaped, and up to BROAD columns, a multiple of 16. */
INLINE void any_block(long rows, long columns, const pair *a, long a_row, long steps, const pair *tail, long more, const pair *b, long b_pair,
                      float *c, long c_row, int add, void (*meanwhile)(void *), void *task) {
    if (rows > 16 && columns > 16) block(2, 2, a, a_row, steps, tail, more, b, b_pair, c, c_row, add, meanwhile, task);
    else if (rows > 16) block(2, 1, a, a_row, steps, tail, more, b, b_pair, c, c_row, add, meanwhile, task);
    else if (columns > 16) block(1, 2, a, a_row, steps, tail, more, b, b_pair, c, c_row, add, meanwhile, task);
    else block(1, 1, a, a_row, steps, tail, more, b, b_pair, c, c_row, add, meanwhile, task);
}

/* With nothing to do meanwhile. */
static void small_block(long rows, long columns, const pair *a, long a_row, long steps, const pair *b, long b_pair, float *c, long c_row, int add) {
    any_block(rows, columns, a, a_row, steps, NULL, 0, b, b_pair, c, c_row, add, nothing, NULL);
}

INLINE long least(long one, long other) { return one < other ? one : other; }

/* C (rows x columns, a multiple of 16) = or += A B over `pairs` of the summed dimension. A's word (i, k) stands at a[i * a_row + k], B's (k, j) at
 * b[k * b_pair + j]. */
static void product(long rows, long columns, const pair *a, long a_row, const pair *b, long b_pair, long pairs, float *c, long c_row, int add) {
    long steps = pairs / DEPTH, rest = pairs % DEPTH, done = steps * DEPTH;
    for (long i = 0; i < rows; i += ROWS, a += ROWS * a_row, c += ROWS * c_row) {
        long tall = least(ROWS, rows - i);
        pair tail[ROWS * DEPTH] __attribute__((aligned(64))), behind[DEPTH * BROAD] __attribute__((aligned(64)));
        shape_for(tall);
        for (long row = 0; rest && row < tall; row++)
            _mm512_store_si512(tail + row * DEPTH, _mm512_maskz_loadu_epi32(first(rest), a + row * a_row + done));
        for (long j = 0; j < columns; j += BROAD) {
            long broad = least(BROAD, columns - j);
            if (steps || !rest) small_block(tall, broad, a, a_row, steps, b + j, b_pair, c + j, c_row, add);
            if (!rest) continue;
            memset(behind, 0, sizeof behind);
            for (long k = 0; k < rest; k++) memcpy(behind + k * BROAD, b + (done + k) * b_pair + j, broad * 4);
            small_block(tall, broad, tail, DEPTH, 1, behind, BROAD, c + j, c_row, add || steps);
        }
    }
}

#endif
