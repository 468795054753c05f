/* Attention of rows that stand one after another, in bfloat16 with sums in fp32, without their scores ever whole.
 *
 *     P = softmax(s Q K^T + B)      O = P V
 *     dV = P^T g      dP = g V^T      dS = P * (dP - rowsum(g * O))      dQ = s dS K      dK = s dS^T Q
 *
 * As FlashAttention (Dao et al. 2022, https://arxiv.org/abs/2205.14135): of a row the logarithm of the sum of exponents is kept, and P computed again
 * from it. One task is a key head of one piece. What several pieces add to the same keys is summed in order, so no sum depends on the number
 * of threads.
 */
#include "tiles.h"

#include <math.h>

#define BLOCK 64 /* queries whose scores are made at once */

typedef struct {
    bf16 *at;
    long token, head; /* strides; the last dimension is contiguous */
} heads;

/* A piece: `length` queries from `start` on, and the keys that they see, in `runs` runs of (start, length), at `run`. Of these, query i sees those before
 * `seen - length + i + 1` if causal, all if not. */
typedef struct {
    long start, length, seen, runs;
    const int64_t *run;
} piece;

typedef struct {
    long query_heads, key_heads, width, causal, window, bias_row;
    const bf16 *bias; /* (query heads, bias_row, bias_row), or none */
    float scale;
} how;

/* Pieces one after another, `at` where each begins: (start, length, where its sums stand or -1, runs ...). What one thread does after another are
 * `units`, the first piece of each and behind the last. Keys that several pieces see are `shared`: (first key, keys, pieces, first piece), which then follow one
 * another. */
typedef struct {
    const int64_t *flat, *at, *units, *shared;
    long unit_count, shared_count;
} plan;

static piece read_piece(const plan *p, long one, long *sums) {
    const int64_t *from = p->flat + p->at[one];
    piece found = {from[0], from[1], 0, from[3], from + 4};
    *sums = from[2];
    for (long r = 0; r < found.runs; r++) found.seen += found.run[2 * r + 1];
    return found;
}

/* Where the rows of runs of tokens stand, one after another. */
static const bf16 **rows_of(heads from, long head, const int64_t *run, long runs, const bf16 **into) {
    const bf16 **next = into;
    for (long r = 0; r < runs; r++)
        for (long t = 0; t < run[2 * r + 1]; t++) *next++ = from.at + (run[2 * r] + t) * from.token + head * from.head;
    return into;
}

/* The keys that query i of a piece sees: from `*low` on, before what is returned. */
INLINE long sight(const how *h, const piece *p, long i, long *low) {
    long high = h->causal ? p->seen - p->length + i + 1 : p->seen;
    *low = h->window && high > h->window ? high - h->window : 0;
    return high;
}

/* This thread's pieces, each with one key head. */
static void each_piece(const plan *p, const how *h, void (*run)(const how *, const piece *, long head, const void *given, long sums), const void *given) {
    begin_products();
#pragma omp for collapse(2) schedule(dynamic, 1)
    for (long unit = 0; unit < p->unit_count; unit++)
        for (long head = 0; head < h->key_heads; head++)
            for (long one = p->units[unit]; one < p->units[unit + 1]; one++) {
                long sums;
                piece found = read_piece(p, one, &sums);
                run(h, &found, head, given, sums);
            }
    end_products();
}

INLINE __m512 score(const float *s, const bf16 *bias, long j, __m512 scale, __mmask16 mask) {
    __m512 x = _mm512_maskz_loadu_ps(mask, s + j);
    return bias ? _mm512_fmadd_ps(x, scale, read16(bias + j, mask)) : _mm512_mul_ps(x, scale);
}

INLINE const bf16 *bias_of(const how *h, long head, long i) {
    return h->bias ? h->bias + (head * h->bias_row + i) * h->bias_row : NULL;
}

INLINE __mmask16 between(long j, long low, long high) { return first(high - j) & ~first(low - j); }

typedef struct {
    heads q, k, v, out;
    float *lse;
    long tokens;
} way_there;

static void forward_piece(const how *h, const piece *p, long group, const void *given, long unused) {
    const way_there *w = given;
    (void)unused;
    long width = h->width, across = rounded(width, LANES), seen = rounded(p->seen, KEYS);
    room *r = room_of(seen * (width + across) * 2 + BLOCK * seen * 6 + BLOCK * across * 4 + seen * 8);
    const bf16 **rows_at = take(r, seen * 8);
    pair *keys = take(r, seen * width * 2), *values = take(r, seen * across * 2);
    float *s = take(r, BLOCK * seen * 4), *o = take(r, BLOCK * across * 4);
    bf16 *weights = take(r, BLOCK * seen * 2);
    pack_across(rows_of(w->k, group, p->run, p->runs, rows_at), p->seen, width, seen, keys);
    pack_along(rows_of(w->v, group, p->run, p->runs, rows_at), p->seen, width, seen, across, values);
    __m512 scale = _mm512_set1_ps(h->scale);
    long each = h->query_heads / h->key_heads;
    for (long head = group * each; head < (group + 1) * each; head++)
        for (long begin = 0; begin < p->length; begin += BLOCK) {
            long rows = p->length - begin < BLOCK ? p->length - begin : BLOCK, low;
            long high = rounded(sight(h, p, begin + rows - 1, &low), KEYS);
            const pair *queries = (const pair *)(w->q.at + (p->start + begin) * w->q.token + head * w->q.head);
            product(rows, high, queries, w->q.token / 2, keys, seen, width / 2, s, seen, 0);
            float by[BLOCK];
            for (long i = 0; i < rows; i++) {
                float *row = s + i * seen;
                const bf16 *bias = bias_of(h, head, begin + i);
                long stop = sight(h, p, begin + i, &low);
                __m512 most = _mm512_set1_ps(-INFINITY), sum = _mm512_setzero_ps();
                for (long j = low / LANES * LANES; j < stop; j += LANES) {
                    __mmask16 mask = between(j, low, stop);
                    __m512 x = score(row, bias, j, scale, mask);
                    _mm512_storeu_ps(row + j, x);
                    most = _mm512_mask_max_ps(most, mask, most, x);
                }
                float top = _mm512_reduce_max_ps(most);
                most = _mm512_set1_ps(top);
                bf16 *weight = weights + i * seen;
                memset(weight, 0, high * 2);
                for (long j = low / LANES * LANES; j < stop; j += LANES) {
                    __m512 x = exp16(_mm512_sub_ps(_mm512_loadu_ps(row + j), most));
                    x = _mm512_maskz_mov_ps(between(j, low, stop), x);
                    sum = _mm512_add_ps(sum, x);
                    write16(weight + j, x, 0xffff);
                }
                float total = _mm512_reduce_add_ps(sum);
                by[i] = 1 / total;
                w->lse[head * w->tokens + p->start + begin + i] = top + logf(total);
            }
            product(rows, across, (const pair *)weights, seen / 2, values, across, high / 2, o, across, 0);
            for (long i = 0; i < rows; i++) {
                bf16 *to = w->out.at + (p->start + begin + i) * w->out.token + head * w->out.head;
                for (long c = 0; c < width; c += LANES)
                    write16(to + c, _mm512_mul_ps(_mm512_loadu_ps(o + i * across + c), _mm512_set1_ps(by[i])), first(width - c));
            }
        }
}

void luthier_attend(const plan *p, const how *h, heads q, heads k, heads v, heads out, float *lse, long tokens) {
    const way_there all = {q, k, v, out, lse, tokens};
#pragma omp parallel
    each_piece(p, h, forward_piece, &all);
}

typedef struct {
    heads q, k, v, out, upstream, into_q, into_k, into_v;
    const float *lse;
    float *into_bias; /* (query heads, bias_row, bias_row), or none */
    float *sums;      /* of keys and values of pieces that share them: for each key head (`rows`, 2, d rounded up to 16) */
    long tokens, rows;
} way_back;

/* Writes the gradients of a key and its value: key token `token`, `head`. */
INLINE void write_key(const way_back *w, long token, long head, long width, const float *dk, const float *dv, float scale) {
    bf16 *to_key = w->into_k.at + token * w->into_k.token + head * w->into_k.head;
    bf16 *to_value = w->into_v.at + token * w->into_v.token + head * w->into_v.head;
    for (long c = 0; c < width; c += LANES) {
        write16(to_key + c, _mm512_mul_ps(_mm512_loadu_ps(dk + c), _mm512_set1_ps(scale)), first(width - c));
        write16(to_value + c, _mm512_loadu_ps(dv + c), first(width - c));
    }
}

/* A block's queries, or their gradients, as the left side of a product that sums over queries: (width, BLOCK / 2) words of two. */
static void turn_rows(const bf16 **rows, long count, long width, pair *into) {
    for (long k = 0; k < BLOCK; k += 2 * LANES) pack_turned(rows + k, count - k, width, into + k / 2, BLOCK / 2, LANES);
}

/* Leaves the gradients of keys that others see too at `sums`, if there is such a place. */
static void backward_piece(const how *h, const piece *p, long group, const void *given, long sums) {
    const way_back *w = given;
    long width = h->width, across = rounded(width, LANES), seen = rounded(p->seen, KEYS);
    room *r = room_of(seen * (2 * width + across) * 2 + BLOCK * seen * 14 + BLOCK * across * 8 + seen * across * 16 +
                      (seen + BLOCK) * 8);
    const bf16 **rows_at = take(r, (seen + BLOCK) * 8);
    pair *keys = take(r, seen * width * 2), *values = take(r, seen * width * 2), *keys_along = take(r, seen * across * 2);
    float *s = take(r, BLOCK * seen * 4), *d = take(r, BLOCK * seen * 4), *dq = take(r, BLOCK * across * 4);
    bf16 *into = take(r, BLOCK * seen * 2);                                              /* dS */
    pair *weights_along = take(r, BLOCK * seen * 2), *into_along = take(r, BLOCK * seen * 2); /* P and dS, by pairs of queries */
    pair *queries_turned = take(r, BLOCK * across * 2), *upstream_turned = take(r, BLOCK * across * 2);
    float *dk = take(r, seen * across * 4), *dv = take(r, seen * across * 4), *both = take(r, seen * across * 8); /* dK^T, dV^T */
    pack_across(rows_of(w->v, group, p->run, p->runs, rows_at), p->seen, width, seen, values);
    pack_across(rows_of(w->k, group, p->run, p->runs, rows_at), p->seen, width, seen, keys);
    pack_along(rows_at, p->seen, width, seen, across, keys_along);
    memset(dk, 0, seen * across * 4);
    memset(dv, 0, seen * across * 4);
    __m512 scale = _mm512_set1_ps(h->scale);
    long each = h->query_heads / h->key_heads;
    for (long head = group * each; head < (group + 1) * each; head++)
        for (long begin = 0; begin < p->length; begin += BLOCK) {
            long rows = p->length - begin < BLOCK ? p->length - begin : BLOCK, low, lowest;
            long even = rounded(rows, QUERIES), high = rounded(sight(h, p, begin + rows - 1, &low), KEYS);
            long token = p->start + begin;
            sight(h, p, begin, &lowest);
            lowest = lowest / KEYS * KEYS;
            const int64_t own[2] = {token, rows};
            const bf16 *queries = w->q.at + token * w->q.token + head * w->q.head;
            const bf16 *upstream = w->upstream.at + token * w->upstream.token + head * w->upstream.head;
            turn_rows(rows_of(w->q, head, own, 1, rows_at), rows, width, queries_turned);
            turn_rows(rows_of(w->upstream, head, own, 1, rows_at), rows, width, upstream_turned);
            product(rows, high, (const pair *)queries, w->q.token / 2, keys, seen, width / 2, s, seen, 0);
            product(rows, high, (const pair *)upstream, w->upstream.token / 2, values, seen, width / 2, d, seen, 0);
            for (long i = 0; i < even; i += 2) {
                const bf16 *bias[2];
                float *sum_of_bias[2] = {NULL, NULL};
                __m512 known[2], minus[2];
                long from[2], stop[2];
                for (long e = 0; e < 2; e++) {
                    if (i + e >= rows) {
                        from[e] = stop[e] = 0;
                        continue;
                    }
                    const bf16 *g = upstream + (i + e) * w->upstream.token;
                    const bf16 *out = w->out.at + (token + i + e) * w->out.token + head * w->out.head;
                    __m512 sum = _mm512_setzero_ps();
                    for (long c = 0; c < width; c += LANES)
                        sum = _mm512_fmadd_ps(read16(g + c, first(width - c)), read16(out + c, first(width - c)), sum);
                    minus[e] = _mm512_set1_ps(_mm512_reduce_add_ps(sum));
                    known[e] = _mm512_set1_ps(w->lse[head * w->tokens + token + i + e]);
                    bias[e] = bias_of(h, head, begin + i + e);
                    if (w->into_bias) sum_of_bias[e] = w->into_bias + (head * h->bias_row + begin + i + e) * h->bias_row;
                    stop[e] = sight(h, p, begin + i + e, &from[e]);
                }
                for (long j = lowest; j < high; j += LANES) {
                    __m512i of_weights[2], of_scores[2];
                    for (long e = 0; e < 2; e++) {
                        __mmask16 mask = between(j, from[e], stop[e]);
                        __m512 weight = _mm512_setzero_ps(), change = _mm512_setzero_ps();
                        if (mask) {
                            long at = (i + e) * seen + j;
                            __m512 x = score(s + (i + e) * seen, bias[e], j, scale, mask);
                            weight = _mm512_maskz_mov_ps(mask, exp16(_mm512_sub_ps(x, known[e])));
                            change = _mm512_maskz_mul_ps(mask, weight, _mm512_sub_ps(_mm512_loadu_ps(d + at), minus[e]));
                            if (sum_of_bias[e])
                                _mm512_mask_storeu_ps(sum_of_bias[e] + j, mask,
                                                      _mm512_add_ps(_mm512_maskz_loadu_ps(mask, sum_of_bias[e] + j), change));
                        }
                        __m256i half = narrow(change);
                        _mm256_storeu_si256((__m256i *)(into + (i + e) * seen + j), half);
                        of_scores[e] = _mm512_cvtepu16_epi32(half);
                        of_weights[e] = _mm512_cvtepu16_epi32(narrow(weight));
                    }
                    pair *to = weights_along + i / 2 * seen + j;
                    _mm512_storeu_si512(to, _mm512_or_si512(of_weights[0], _mm512_slli_epi32(of_weights[1], 16)));
                    to = into_along + i / 2 * seen + j;
                    _mm512_storeu_si512(to, _mm512_or_si512(of_scores[0], _mm512_slli_epi32(of_scores[1], 16)));
                }
            }
            long keys_here = high - lowest;
            product(width, keys_here, upstream_turned, BLOCK / 2, weights_along + lowest, seen, even / 2, dv + lowest, seen, 1);
            product(width, keys_here, queries_turned, BLOCK / 2, into_along + lowest, seen, even / 2, dk + lowest, seen, 1);
            product(rows, across, (const pair *)into + lowest / 2, seen / 2, keys_along + lowest / 2 * across, across, keys_here / 2, dq,
                    across, 0);
            for (long i = 0; i < rows; i++) {
                bf16 *to = w->into_q.at + (token + i) * w->into_q.token + head * w->into_q.head;
                for (long c = 0; c < width; c += LANES)
                    write16(to + c, _mm512_mul_ps(_mm512_loadu_ps(dq + i * across + c), scale), first(width - c));
            }
        }
    if (sums >= 0) both = w->sums + (group * w->rows + sums) * 2 * across;
    turn_sums(dk, across, seen, p->seen, both);
    turn_sums(dv, across, seen, p->seen, both + p->seen * across);
    long row = 0;
    for (long run = 0; sums < 0 && run < p->runs; run++)
        for (long t = 0; t < p->run[2 * run + 1]; t++, row++)
            write_key(w, p->run[2 * run] + t, group, width, both + row * across, both + (p->seen + row) * across, h->scale);
}

void luthier_attend_backward(const plan *p, const how *h, const way_back *w) {
    long width = h->width, across = rounded(width, LANES);
#pragma omp parallel
    {
        each_piece(p, h, backward_piece, w);
#pragma omp for collapse(2) schedule(dynamic, 1)
        for (long s = 0; s < p->shared_count; s++)
            for (long head = 0; head < h->key_heads; head++) {
                const int64_t *group = p->shared + 4 * s;
                long keys = group[1];
                float *both = take(room_of(keys * across * 8), keys * across * 8);
                memset(both, 0, keys * across * 8);
                for (long one = group[3]; one < group[3] + group[2]; one++) {
                    long sums, row = 0;
                    piece found = read_piece(p, one, &sums);
                    const float *dk = w->sums + (head * w->rows + sums) * 2 * across, *dv = dk + found.seen * across;
                    for (long run = 0; run < found.runs; run++)
                        for (long t = 0; t < found.run[2 * run + 1]; t++, row++) {
                            float *to = both + (found.run[2 * run] + t - group[0]) * 2 * across;
                            for (long c = 0; c < across; c++) {
                                to[c] += dk[row * across + c];
                                to[across + c] += dv[row * across + c];
                            }
                        }
                }
                for (long t = 0; t < keys; t++)
                    write_key(w, group[0] + t, head, width, both + t * 2 * across, both + (t * 2 + 1) * across, h->scale);
            }
    }
}
