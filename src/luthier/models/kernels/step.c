/* An optimizer's step and the norm of its gradients, each number read once. */
#include "vectors.h"

/* into[i] = the sum of squares of numbers i block ... (i + 1) block - 1. */
void luthier_squares(const bf16 *x, float *into, long n, long block) {
#pragma omp parallel for schedule(static)
    for (long i = 0; i < (n + block - 1) / block; i++) {
        __m512 sums[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
        long end = (i + 1) * block < n ? (i + 1) * block : n;
        for (long c = i * block; c < end; c += 4 * LANES)
#pragma GCC unroll 4
            for (int k = 0; k < 4; k++) {
                __m512 one = read16(x + c + k * LANES, first(end - c - k * LANES));
                sums[k] = _mm512_fmadd_ps(one, one, sums[k]);
            }
        into[i] = _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(sums[0], sums[1]), _mm512_add_ps(sums[2], sums[3])));
    }
}

/* AdamW (Loshchilov & Hutter 2019) on fp32 masters p, with moments m and v, for a gradient g times `scale`:
 *   m += (1 - b1) (g - m)    v = b2 v + (1 - b2) g^2    p = (1 - decay) p - rate m / (root sqrt(v) + eps)
 * `rate` and `root` are corrected for the bias of the moments. w is p, rounded. */
void luthier_adamw(bf16 *w, float *p, float *m, float *v, const bf16 *g, long n, double scale, double rate, double decay, double b1, double b2,
                   double root, double eps) {
    __m512 by = _mm512_set1_ps(scale), kept = _mm512_set1_ps(1 - decay), down = _mm512_set1_ps(-rate), least = _mm512_set1_ps(eps);
    __m512 more = _mm512_set1_ps(1 - b1), old = _mm512_set1_ps(b2), squares = _mm512_set1_ps(1 - b2), corrected = _mm512_set1_ps(root);
#pragma omp parallel for schedule(static)
    for (long c = 0; c < n; c += LANES) {
        __mmask16 mask = first(n - c);
        __m512 x = _mm512_mul_ps(read16(g + c, mask), by);
        __m512 one = _mm512_maskz_loadu_ps(mask, m + c), two = _mm512_maskz_loadu_ps(mask, v + c);
        one = _mm512_fmadd_ps(_mm512_sub_ps(x, one), more, one);
        two = _mm512_fmadd_ps(two, old, _mm512_mul_ps(_mm512_mul_ps(x, x), squares));
        __m512 below = _mm512_fmadd_ps(_mm512_sqrt_ps(two), corrected, least);
        __m512 master = _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, p + c), kept);
        master = _mm512_fmadd_ps(_mm512_div_ps(one, below), down, master);
        _mm512_mask_storeu_ps(m + c, mask, one);
        _mm512_mask_storeu_ps(v + c, mask, two);
        _mm512_mask_storeu_ps(p + c, mask, master);
        write16(w + c, master, mask);
    }
}
