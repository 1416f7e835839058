#include "product.h"

/* The masked product
 *
 *     y_i = sum_j A_ij v_j / den_i,   den_i = sum_j A_ij,   A_ij = (phi_q_i . phi_k_j) C[r_j - r_i]
 *
 * over a grid of h rows of w tokens. Keys come in tiles of whole grid rows, queries in tiles of QUERIES: nothing of N x N
 * entries is ever kept.
 */

#define QUERIES 64

typedef struct {
    long images, heads, h, w, m, dv;
    Map q, k;
} Masked;

/* Grid rows of a key tile, about 128 tokens; and entries of its rows in memory. */
INLINE long tile_rows(Masked s) { return s.w >= 128 ? 1 : s.h < 128 / s.w ? s.h : 128 / s.w; }
INLINE long tile_width(Masked s) { return whole(tile_rows(s) * s.w); }
INLINE long tiles(Masked s) { return (s.h + tile_rows(s) - 1) / tile_rows(s); }

/* x (N, d) of a pair -> for each key tile (d, width), zeros behind its last token. */
EACH_CPU static void transpose_tiles(Masked s, long d, const float *x, float *out) {
    long step = tile_rows(s) * s.w, width = tile_width(s), n = s.h * s.w;
    for (long first = 0; first < n; first += step, out += d * width)
        transpose(x + first * d, least(step, n - first), d, out, width);
}

/* Where the weights of query i begin for the grid row `row` of keys. */
INLINE long offset(Masked s, long i, long row) {
    return (row - i / s.w + s.h - 1) * (2 * s.w - 1) + s.w - 1 - i % s.w;
}

/* a *= c over one query and `rows` grid rows; its sum. */
INLINE float weigh(Masked s, float *a, const float *c, long rows) {
    vec sums = {0};
    float rest = 0;
    for (long row = 0; row < rows; row++, a += s.w, c += 2 * s.w - 1) {
        long x = 0;
        for (; x + LANES <= s.w; x += LANES) {
            vec part = *(vec *)(a + x) * *(const vec *)(c + x);
            *(vec *)(a + x) = part;
            sums += part;
        }
        for (; x < s.w; x++) rest += a[x] *= c[x];
    }
    return total(sums) + rest;
}

/* In: products p = q . k and slopes of A. Out: A and slopes of p; those of log C are added to its table. */
INLINE void unweigh(Masked s, float *p, float *slope, float d_den, const float *c, float *d_log_c, long rows) {
    long next = 2 * s.w - 1;
    for (long row = 0; row < rows; row++, p += s.w, slope += s.w, c += next, d_log_c += next) {
        long x = 0;
        for (; x + LANES <= s.w; x += LANES) {
            vec weight = *(const vec *)(c + x), a = *(vec *)(p + x) * weight, d = *(vec *)(slope + x) + d_den;
            *(vec *)(p + x) = a;
            *(vec *)(slope + x) = d * weight;
            *(vec *)(d_log_c + x) += a * d;
        }
        for (; x < s.w; x++) {
            float a = p[x] * c[x], d = slope[x] + d_den;
            p[x] = a;
            slope[x] = d * c[x];
            d_log_c[x] += a * d;
        }
    }
}

/* A pair's features, all at once; returns what comes behind them. */
INLINE float *take_whole(Masked s, Map map, View x, long pair, long columns, float *out) {
    long n = s.h * s.w;
    project(map, 0, start(x, s.heads, pair, 0), x.row, n, columns, 0, out);
    finish(map, map.kind == EXP_OF_KEY ? highest(out, n, columns, -3e38f) : 0, n, columns, out);
    return out + n * whole(columns);
}

EACH_CPU static void forward_pair(Masked s, long pair, View q, View k, View v, const float *c, const float *factor,
                                  View y, float *den, float *room) {
    s.q = of_head(s.q, pair % s.heads), s.k = of_head(s.k, pair % s.heads);
    long n = s.h * s.w, m = whole(s.m), dv = whole(s.dv), width = tile_width(s), step = tile_rows(s) * s.w;
    c += pair % s.heads * (2 * s.h - 1) * (2 * s.w - 1), den += pair * n;
    float *phi_q = room, *phi_k = take_whole(s, s.q, q, pair, s.m, phi_q);
    float *values = take_whole(s, s.k, k, pair, s.m, phi_k), *kt = take_whole(s, AS_IT_IS, v, pair, s.dv, values);
    float *a = kt + tiles(s) * width * m, *sums = a + QUERIES * width;
    transpose_tiles(s, m, phi_k, kt);
    for (long first = 0; first < n; first += QUERIES) {
        long queries = least(QUERIES, n - first);
        for (long i = 0; i < queries; i++) den[first + i] = 0;
        for (long t = 0; t < tiles(s); t++) {
            long keys = least(step, n - t * step), row = t * tile_rows(s);
            product(queries, width, m, phi_q + first * m, m, 1, kt + t * m * width, width, a, width, 0);
            for (long i = 0; i < queries; i++)
                den[first + i] += weigh(s, a + i * width, c + offset(s, first + i, row), keys / s.w);
            product(queries, dv, keys, a, width, 1, values + t * step * dv, dv, sums, dv, t > 0);
        }
        float *out = start(y, s.heads, pair, first);
        for (long i = 0; i < queries; i++, out += y.row) {
            float share = 1 / den[first + i];
            for (long x = 0; x < s.dv; x++) out[x] = sums[i * dv + x] * share;
            if (factor) den[first + i] *= factor[pair % s.heads * n + first + i];
        }
    }
}

/* Slopes of y, in `slopes`, and of den, if there are any -> of sum_j A_ij v_j, in place, and of sum_j A_ij. */
INLINE void split(Masked s, long pair, View y, const float *factor, const float *den, const float *d_den, float *slopes,
                  float *d_sum) {
    const float *result = start(y, s.heads, pair, 0);
    for (long i = 0; i < s.h * s.w; i++, result += y.row, slopes += whole(s.dv)) {
        float own = factor ? factor[i] : 1, share = own / den[i];
        for (long x = 0; x < s.dv; x++) slopes[x] *= share;
        d_sum[i] = (d_den ? d_den[i] * own : 0) - dot(slopes, result, s.dv);
    }
}

EACH_CPU static void backward_pair(Masked s, long pair, View q, View k, View v, const float *c, const float *factor,
                                   View y, const float *den, View d_y, const float *d_den, View d_q, View d_k, View d_v,
                                   float *d_log_c, float *room) {
    s.q = of_head(s.q, pair % s.heads), s.k = of_head(s.k, pair % s.heads);
    long n = s.h * s.w, m = whole(s.m), dv = whole(s.dv), table = (2 * s.h - 1) * (2 * s.w - 1);
    long width = tile_width(s), step = tile_rows(s) * s.w;
    c += pair % s.heads * table, d_log_c += pair * table, den += pair * n;
    float *phi_q = room, *phi_k = take_whole(s, s.q, q, pair, s.m, phi_q);
    float *values = take_whole(s, s.k, k, pair, s.m, phi_k), *slopes = take_whole(s, AS_IT_IS, v, pair, s.dv, values);
    float *kt = take_whole(s, AS_IT_IS, d_y, pair, s.dv, slopes), *vt = kt + tiles(s) * width * m;
    float *a = vt + tiles(s) * width * dv, *slope = a + QUERIES * width, *of_q = slope + QUERIES * width;
    float *of_k = of_q + n * m, *of_v = of_k + n * m, *d_sum = of_v + n * dv, *rest = d_sum + n;
    split(s, pair, y, factor ? factor + pair % s.heads * n : 0, den, d_den ? d_den + pair * n : 0, slopes, d_sum);
    transpose_tiles(s, m, phi_k, kt);
    transpose_tiles(s, dv, values, vt);
    for (long t = 0; t < tiles(s); t++) {
        long from = t * step, keys = least(step, n - from), row = t * tile_rows(s);
        for (long first = 0; first < n; first += QUERIES) {
            long queries = least(QUERIES, n - first);
            const float *some_q = phi_q + first * m, *some_d = slopes + first * dv;
            product(queries, width, m, some_q, m, 1, kt + t * m * width, width, a, width, 0);
            product(queries, width, dv, some_d, dv, 1, vt + t * dv * width, width, slope, width, 0);
            for (long i = 0; i < queries; i++) {
                long at = offset(s, first + i, row);
                unweigh(s, a + i * width, slope + i * width, d_sum[first + i], c + at, d_log_c + at, keys / s.w);
            }
            product(keys, dv, queries, a, 1, width, some_d, dv, of_v + from * dv, dv, first > 0);
            product(keys, m, queries, slope, 1, width, some_q, m, of_k + from * m, m, first > 0);
            product(queries, m, keys, slope, width, 1, phi_k + from * m, m, of_q + first * m, m, t > 0);
        }
    }
    float *to_q = start(d_q, s.heads, pair, 0), *to_k = start(d_k, s.heads, pair, 0), *to_v = start(d_v, s.heads, pair, 0);
    give(s.q, 0, of_q, phi_q, start(q, s.heads, pair, 0), q.row, NOT_TURNED, n, s.m, to_q, d_q.row, rest);
    give(s.k, 0, of_k, phi_k, start(k, s.heads, pair, 0), k.row, NOT_TURNED, n, s.m, to_k, d_k.row, rest);
    give(AS_IT_IS, 0, of_v, of_v, of_v, dv, NOT_TURNED, n, s.dv, to_v, d_v.row, rest);
}

/* Entries of the scratch of a thread. */
INLINE long forward_room(Masked s) {
    long m = whole(s.m), dv = whole(s.dv);
    return s.h * s.w * (2 * m + dv) + tile_width(s) * (tiles(s) * m + QUERIES) + QUERIES * dv;
}
INLINE long backward_room(Masked s) {
    long m = whole(s.m), dv = whole(s.dv);
    return s.h * s.w * (4 * m + 3 * dv + 1 + whole(s.q.size)) + tile_width(s) * (tiles(s) * (m + dv) + 2 * QUERIES);
}

long masked_forward_room(Masked s, int threads) { return threads * forward_room(s); }
long masked_backward_room(Masked s, int threads) { return threads * backward_room(s); }

void masked_forward(Masked s, int threads, View q, View k, View v, const float *c, const float *factor, View y,
                    float *den, float *room) {
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (long pair = 0; pair < s.images * s.heads; pair++)
        forward_pair(s, pair, q, k, v, c, factor, y, den, room + omp_get_thread_num() * forward_room(s));
}

void masked_backward(Masked s, int threads, View q, View k, View v, const float *c, const float *factor, View y,
                     const float *den, View d_y, const float *d_den, View d_q, View d_k, View d_v, float *d_log_c,
                     float *room) {
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (long pair = 0; pair < s.images * s.heads; pair++)
        backward_pair(s, pair, q, k, v, c, factor, y, den, d_y, d_den, d_q, d_k, d_v, d_log_c,
                      room + omp_get_thread_num() * backward_room(s));
}
