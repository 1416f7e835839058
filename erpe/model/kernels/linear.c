#include "product.h"

/* The plain product
 *
 *     y_i = phi_q_i S / (phi_q_i . z),   S = sum_j phi_k_j v_j^T,   z = sum_j phi_k_j
 *
 * of features phi. Tokens come in parts of PART.
 */

#define PART 48

typedef struct {
    long images, heads, n, m, dv;
    Map q, k;
} Linear;

INLINE void transpose(const float *x, long rows, long columns, float *out) {
    for (long i = 0; i < rows; i++)
        for (long c = 0; c < columns; c++) out[c * rows + i] = x[i * columns + c];
}

INLINE float dot(const float *a, const float *b, long length) {
    vec sums = {0};
    for (long i = 0; i < length; i += LANES) sums += *(const vec *)(a + i) * *(const vec *)(b + i);
    return total(sums);
}

INLINE void add(float *sum, float factor, const float *x, long length) {
    for (long i = 0; i < length; i += LANES) *(vec *)(sum + i) += factor * *(const vec *)(x + i);
}

/* The largest exponent of a pair's keys; `room` is for a part. */
INLINE float top_of_keys(Linear s, long pair, View k, float *room) {
    float top = -3e38f;
    for (long first = 0; s.k.kind == EXP_OF_KEY && first < s.n; first += PART) {
        long rows = least(PART, s.n - first);
        project(s.k, start(k, s.heads, pair, first), k.row, rows, s.m, room);
        top = highest(room, rows, s.m, top);
    }
    return top;
}

EACH_CPU static void attend_pair(Linear s, long pair, View q, View k, View v, View y, float *sums, float *z, float *den,
                                 float *phi, float *values) {
    s.q = of_head(s.q, pair % s.heads), s.k = of_head(s.k, pair % s.heads);
    long m = whole(s.m), dv = whole(s.dv);
    sums += pair * m * dv, z += pair * m, den += pair * s.n;
    float top = top_of_keys(s, pair, k, phi);
    for (long c = 0; c < m; c++) z[c] = 0;
    for (long first = 0; first < s.n; first += PART) {
        long rows = least(PART, s.n - first);
        take(s.k, top, start(k, s.heads, pair, first), k.row, rows, s.m, phi);
        take(AS_IT_IS, 0, start(v, s.heads, pair, first), v.row, rows, s.dv, values);
        product(m, dv, rows, phi, 1, m, values, dv, sums, dv, first > 0);
        for (long i = 0; i < rows; i++) add(z, 1, phi + i * m, m);
    }
    for (long first = 0; first < s.n; first += PART) {
        long rows = least(PART, s.n - first);
        take(s.q, 0, start(q, s.heads, pair, first), q.row, rows, s.m, phi);
        product(rows, dv, m, phi, m, 1, sums, dv, values, dv, 0);
        float *out = start(y, s.heads, pair, first);
        for (long i = 0; i < rows; i++, out += y.row) {
            den[first + i] = dot(phi + i * m, z, m);
            float factor = 1 / den[first + i];
            for (long c = 0; c < s.dv; c++) out[c] = values[i * dv + c] * factor;
        }
    }
}

EACH_CPU static void attend_back(Linear s, long pair, View q, View k, View v, View y, View d_y, const float *sums,
                                 const float *z, const float *den, View d_q, View d_k, View d_v, float *phi,
                                 float *values, float *slope, float *turned, float *d_sums, float *d_z, float *room) {
    s.q = of_head(s.q, pair % s.heads), s.k = of_head(s.k, pair % s.heads);
    long m = whole(s.m), dv = whole(s.dv);
    sums += pair * m * dv, z += pair * m, den += pair * s.n;
    transpose(sums, m, dv, turned);
    for (long c = 0; c < m; c++) d_z[c] = 0;
    for (long first = 0; first < s.n; first += PART) {
        long rows = least(PART, s.n - first);
        take(s.q, 0, start(q, s.heads, pair, first), q.row, rows, s.m, phi);
        take(AS_IT_IS, 0, start(d_y, s.heads, pair, first), d_y.row, rows, s.dv, values);
        const float *result = start(y, s.heads, pair, first);
        for (long i = 0; i < rows; i++, result += y.row) {
            float factor = 1 / den[first + i], d_den = 0, *d_num = values + i * dv;
            for (long c = 0; c < s.dv; c++) {
                d_num[c] *= factor;
                d_den -= d_num[c] * result[c];
            }
            add(d_z, d_den, phi + i * m, m);
            for (long c = 0; c < m; c++) slope[i * m + c] = d_den * z[c];
        }
        product(m, dv, rows, phi, 1, m, values, dv, d_sums, dv, first > 0);
        product(rows, m, dv, values, dv, 1, turned, m, slope, m, 1);
        give(s.q, slope, phi, start(q, s.heads, pair, first), q.row, rows, s.m, start(d_q, s.heads, pair, first), d_q.row,
             room);
    }
    transpose(d_sums, m, dv, turned);
    float top = top_of_keys(s, pair, k, phi);
    for (long first = 0; first < s.n; first += PART) {
        long rows = least(PART, s.n - first);
        take(AS_IT_IS, 0, start(v, s.heads, pair, first), v.row, rows, s.dv, values);
        for (long i = 0; i < rows; i++)
            for (long c = 0; c < m; c++) slope[i * m + c] = d_z[c];
        product(rows, m, dv, values, dv, 1, turned, m, slope, m, 1);
        take(s.k, top, start(k, s.heads, pair, first), k.row, rows, s.m, phi);
        give(s.k, slope, phi, start(k, s.heads, pair, first), k.row, rows, s.m, start(d_k, s.heads, pair, first), d_k.row,
             room);
        product(rows, dv, m, phi, m, 1, d_sums, dv, values, dv, 0);
        give(AS_IT_IS, values, values, values, dv, rows, s.dv, start(d_v, s.heads, pair, first), d_v.row, room);
    }
}

INLINE long room_of_one(Linear s) {
    long m = whole(s.m), dv = whole(s.dv);
    return PART * (2 * m + dv + whole(s.q.size)) + 2 * m * dv + m;
}

/* Entries of scratch. */
long linear_forward_room(Linear s, int threads) { return threads * room_of_one(s); }
long linear_backward_room(Linear s, int threads) { return threads * room_of_one(s); }

void linear_forward(Linear s, int threads, View q, View k, View v, View y, float *sums, float *z, float *den,
                    float *room) {
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (long pair = 0; pair < s.images * s.heads; pair++) {
        float *phi = room + omp_get_thread_num() * room_of_one(s);
        attend_pair(s, pair, q, k, v, y, sums, z, den, phi, phi + PART * whole(s.m));
    }
}

void linear_backward(Linear s, int threads, View q, View k, View v, View y, View d_y, const float *sums, const float *z,
                     const float *den, View d_q, View d_k, View d_v, float *room) {
    long m = whole(s.m), dv = whole(s.dv);
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (long pair = 0; pair < s.images * s.heads; pair++) {
        float *phi = room + omp_get_thread_num() * room_of_one(s), *values = phi + PART * m;
        float *slope = values + PART * dv, *turned = slope + PART * m, *d_sums = turned + m * dv;
        attend_back(s, pair, q, k, v, y, d_y, sums, z, den, d_q, d_k, d_v, phi, values, slope, turned, d_sums,
                    d_sums + m * dv, d_sums + m * dv + m);
    }
}
