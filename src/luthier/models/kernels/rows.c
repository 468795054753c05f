/* What stands between products, each a pass or three over its rows: norms, rotary positions, activations, the loss. Numbers are bfloat16, inside fp32, and
 * rounded where transformers' modules round.
 */
#include "tiles.h"

#include <math.h>

/* Rounded to bfloat16, and wide again. */
INLINE __m512 once(__m512 x) { return wide(narrow(x)); }

/* out = w * round(r x), r = 1 / sqrt(mean(x^2) + eps); RMSNorm (Zhang & Sennrich 2019). r is given where `again`. */
void luthier_norm(const bf16 *x, const bf16 *w, bf16 *out, float *scale, long tokens, long n, float eps, int again) {
#pragma omp parallel for schedule(static)
    for (long t = 0; t < tokens; t++) {
        const bf16 *row = x + t * n;
        if (!again) {
            __m512 sum = _mm512_setzero_ps();
            for (long c = 0; c < n; c += LANES) {
                __m512 v = read16(row + c, first(n - c));
                sum = _mm512_fmadd_ps(v, v, sum);
            }
            scale[t] = 1 / __builtin_sqrtf(_mm512_reduce_add_ps(sum) / n + eps);
        }
        __m512 r = _mm512_set1_ps(scale[t]);
        for (long c = 0; c < n; c += LANES) {
            __mmask16 mask = first(n - c);
            write16(out + t * n + c, _mm512_mul_ps(once(_mm512_mul_ps(read16(row + c, mask), r)), read16(w + c, mask)), mask);
        }
    }
}

/* into = skip + r (u - r^2 x mean(u x)), u = g w; no `skip`, nothing added. */
void luthier_norm_backward(const bf16 *g, const bf16 *x, const float *scale, const bf16 *w, const bf16 *skip, bf16 *into, long tokens,
                           long n) {
#pragma omp parallel for schedule(static)
    for (long t = 0; t < tokens; t++) {
        __m512 sum = _mm512_setzero_ps();
        for (long c = 0; c < n; c += LANES) {
            __mmask16 mask = first(n - c);
            __m512 u = _mm512_mul_ps(read16(g + t * n + c, mask), read16(w + c, mask));
            sum = _mm512_fmadd_ps(u, read16(x + t * n + c, mask), sum);
        }
        __m512 r = _mm512_set1_ps(scale[t]);
        __m512 along = _mm512_set1_ps(_mm512_reduce_add_ps(sum) / n * scale[t] * scale[t]);
        for (long c = 0; c < n; c += LANES) {
            __mmask16 mask = first(n - c);
            __m512 u = _mm512_mul_ps(read16(g + t * n + c, mask), read16(w + c, mask));
            __m512 found = _mm512_mul_ps(_mm512_fnmadd_ps(along, read16(x + t * n + c, mask), u), r);
            if (skip) found = _mm512_add_ps(found, read16(skip + t * n + c, mask));
            write16(into + t * n + c, found, mask);
        }
    }
}

/* into (n), fp32, = sum over rows of g round(r x); of g x where there is no scale. Some rows at a time, whose pages the processor remembers: down a whole
 * column each number is on a page of its own. */
void luthier_norm_weight(const bf16 *g, const bf16 *x, const float *scale, float *into, long tokens, long n) {
    enum { ROWS_AT_ONCE = 64 };
#pragma omp parallel
    for (long start = 0; !start || start < tokens; start += ROWS_AT_ONCE) { /* once where there are no rows: zeros */
        long stop = start + ROWS_AT_ONCE < tokens ? start + ROWS_AT_ONCE : tokens;
#pragma omp for schedule(static) nowait
        for (long c = 0; c < n; c += LANES) {
            __mmask16 mask = first(n - c);
            __m512 sum = start ? _mm512_maskz_loadu_ps(mask, into + c) : _mm512_setzero_ps();
            for (long t = start; t < stop; t++) {
                __m512 given = read16(x + t * n + c, mask), normed = scale ? once(_mm512_mul_ps(given, _mm512_set1_ps(scale[t]))) : given;
                sum = _mm512_fmadd_ps(read16(g + t * n + c, mask), normed, sum);
            }
            _mm512_mask_storeu_ps(into + c, mask, sum);
        }
    }
}

/* Rotary positions: of each head (d) channel i turns with i + d / 2, by cos and sin (T, d); `turn` is -1 for the way back. out may be x. */
void luthier_rotate(const bf16 *x, const bf16 *cosines, const bf16 *sines, bf16 *out, long tokens, long heads, long d, float turn) {
    long half = d / 2;
    __m512 way = _mm512_set1_ps(turn);
#pragma omp parallel for schedule(static)
    for (long t = 0; t < tokens; t++)
        for (long h = 0; h < heads; h++) {
            const bf16 *from = x + (t * heads + h) * d;
            bf16 *to = out + (t * heads + h) * d;
            for (long c = 0; c < half; c += LANES) {
                __mmask16 mask = first(half - c);
                __m512 one = read16(from + c, mask), two = read16(from + half + c, mask);
                __m512 cosine = read16(cosines + t * d + c, mask), sine = _mm512_mul_ps(read16(sines + t * d + c, mask), way);
                write16(to + c, _mm512_sub_ps(once(_mm512_mul_ps(one, cosine)), once(_mm512_mul_ps(two, sine))), mask);
                write16(to + half + c, _mm512_add_ps(once(_mm512_mul_ps(two, cosine)), once(_mm512_mul_ps(one, sine))), mask);
            }
        }
}

enum { SILU, GELU, RELU };

INLINE __m512 sigmoid(__m512 x) {
    __m512 down = exp16(_mm512_sub_ps(_mm512_setzero_ps(), _mm512_abs_ps(x))); /* e^-|x| */
    __m512 one = _mm512_set1_ps(1), found = _mm512_div_ps(one, _mm512_add_ps(one, down));
    return _mm512_mask_mul_ps(found, _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_LT_OQ), found, down);
}

/* An activation and its derivative. GELU by its tanh formula (Hendrycks & Gimpel 2016): tanh(z) = 2 sigmoid(2 z) - 1, so it is x sigmoid(2 z). */
INLINE __m512 activated(const int kind, __m512 x, __m512 *slope) {
    __m512 one = _mm512_set1_ps(1), zero = _mm512_setzero_ps();
    if (kind == RELU) {
        *slope = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, zero, _CMP_NLE_UQ), one);
        return _mm512_max_ps(zero, x); /* the second, where one is NaN */
    }
    __m512 z = x, dz = one;
    if (kind == GELU) {
        const __m512 a = _mm512_set1_ps(1.5957691216f), b = _mm512_set1_ps(0.0713548163f); /* 2 sqrt(2 / pi), and 0.044715 times it */
        __m512 square = _mm512_mul_ps(x, x);
        z = _mm512_mul_ps(x, _mm512_fmadd_ps(square, b, a));
        dz = _mm512_fmadd_ps(square, _mm512_mul_ps(b, _mm512_set1_ps(3)), a);
    }
    __m512 s = sigmoid(z);
    __m512 found = _mm512_mul_ps(x, s); /* its slope: s + x s (1 - s) dz */
    *slope = _mm512_fmadd_ps(_mm512_mul_ps(found, _mm512_sub_ps(one, s)), dz, s);
    return found;
}

INLINE void activate(const int kind, const bf16 *g, const bf16 *u, bf16 *out, long size) {
#pragma omp parallel for schedule(static)
    for (long c = 0; c < size; c += LANES) {
        __mmask16 mask = first(size - c);
        __m512 slope, found = activated(kind, read16(g + c, mask), &slope);
        write16(out + c, u ? _mm512_mul_ps(once(found), read16(u + c, mask)) : found, mask);
    }
}

/* out = act(g) * u, or act(g) without u. */
void luthier_activate(int kind, const bf16 *g, const bf16 *u, bf16 *out, long size) {
    switch (kind) {
    case SILU: activate(SILU, g, u, out, size); break;
    case GELU: activate(GELU, g, u, out, size); break;
    default: activate(RELU, g, u, out, size);
    }
}

INLINE void activate_backward(const int kind, const bf16 *upstream, const bf16 *g, const bf16 *u, bf16 *into_g, bf16 *into_u, bf16 *again,
                              long size) {
#pragma omp parallel for schedule(static)
    for (long c = 0; c < size; c += LANES) {
        __mmask16 mask = first(size - c);
        __m512 slope, into = read16(upstream + c, mask), found = activated(kind, read16(g + c, mask), &slope);
        if (again) write16(again + c, u ? _mm512_mul_ps(once(found), read16(u + c, mask)) : found, mask);
        if (u) {
            __m512 through = read16(u + c, mask);
            write16(into_u + c, _mm512_mul_ps(into, found), mask);
            into = _mm512_mul_ps(into, through);
        }
        write16(into_g + c, _mm512_mul_ps(into, slope), mask);
    }
}

/* The gradients of g, and of u if there is one; into_g may be upstream, and into_u u. `again`, if wanted, is what luthier_activate gave. */
void luthier_activate_backward(int kind, const bf16 *upstream, const bf16 *g, const bf16 *u, bf16 *into_g, bf16 *into_u, bf16 *again,
                               long size) {
    switch (kind) {
    case SILU: activate_backward(SILU, upstream, g, u, into_g, into_u, again, size); break;
    case GELU: activate_backward(GELU, upstream, g, u, into_g, into_u, again, size); break;
    default: activate_backward(RELU, upstream, g, u, into_g, into_u, again, size);
    }
}

/* Cross-entropy of each row of logits (rows, n): losses (rows), fp32; and the gradient, softmax - (1 - e) one-hot - e / n, where `into` is. `e` is the share
 * of all tokens, label smoothing (Szegedy et al. 2016). */
void luthier_cross_entropy(const bf16 *logits, const int64_t *labels, float *losses, bf16 *into, long rows, long n, float e) {
#pragma omp parallel for schedule(static)
    for (long t = 0; t < rows; t++) {
        const bf16 *row = logits + t * n;
        __m512 most = _mm512_set1_ps(-INFINITY), sum = _mm512_setzero_ps(), all = _mm512_setzero_ps();
        for (long c = 0; c < n; c += LANES) {
            __mmask16 mask = first(n - c);
            most = _mm512_mask_max_ps(most, mask, most, read16(row + c, mask));
        }
        __m512 top = _mm512_set1_ps(_mm512_reduce_max_ps(most));
        for (long c = 0; c < n; c += LANES) {
            __mmask16 mask = first(n - c);
            __m512 x = _mm512_sub_ps(read16(row + c, mask), top);
            sum = _mm512_mask_add_ps(sum, mask, sum, exp16(x));
            all = _mm512_mask_add_ps(all, mask, all, x);
        }
        float total = _mm512_reduce_add_ps(sum), label = _mm512_cvtss_f32(read16(row + labels[t], 1)) - _mm512_cvtss_f32(top);
        losses[t] = logf(total) - (1 - e) * label - (e ? e * _mm512_reduce_add_ps(all) / n : 0);
        if (!into) continue;
        __m512 part = _mm512_set1_ps(1 / total), even = _mm512_set1_ps(e / n);
        for (long c = 0; c < n; c += LANES) {
            __mmask16 mask = first(n - c), mine = labels[t] >= c && labels[t] < c + LANES ? (__mmask16)(1u << (labels[t] - c)) : 0;
            __m512 x = _mm512_fmsub_ps(exp16(_mm512_sub_ps(read16(row + c, mask), top)), part, even);
            write16(into + t * n + c, _mm512_mask_sub_ps(x, mine, x, _mm512_set1_ps(1 - e)), mask);
        }
    }
}
