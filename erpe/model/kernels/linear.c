#include "product.h"

/* The plain product
 *
 *     y_i = phi_q_i S / (phi_q_i . z),   S = sum_j phi_k_j v_j^T,   z = sum_j phi_k_j
 *
 * of features phi. Tokens come in parts of PART.
 */

#define PART 64

typedef struct {
    long images, heads, n, m, dv;
    Map q, k;
} Linear;

INLINE void add(float *sum, float factor, const float *x, long length) {
    for (long i = 0; i < length; i += LANES) *(vec *)(sum + i) += factor * *(const vec *)(x + i);
}

/* Scratch of a thread, parts of tokens and sums. */
typedef struct {
    float *phi, *values, *slope, *turned, *other, *sums_t, *d_sums, *d_z;
} Room;

/* Of a token: its features, or what it takes to make them. */
INLINE long widest(Linear s) { return whole(s.m > s.q.size ? s.m : s.q.size); }

INLINE long room_of_one(Linear s) {
    long m = whole(s.m), dv = whole(s.dv);
    return PART * (widest(s) + m + dv + 2 * whole(s.q.size)) + 2 * m * dv + m;
}

INLINE Room room_of(Linear s, float *all) {
    long m = whole(s.m), dv = whole(s.dv), size = whole(s.q.size);
    Room r = {.phi = all + omp_get_thread_num() * room_of_one(s)};
    r.values = r.phi + PART * widest(s), r.slope = r.values + PART * dv, r.turned = r.slope + PART * m;
    r.other = r.turned + PART * size, r.sums_t = r.other + PART * size, r.d_sums = r.sums_t + m * dv;
    r.d_z = r.d_sums + m * dv;
    return r;
}

/* Features of queries from `first` on. */
INLINE void take_queries(Linear s, View q, long pair, long first, long rows, Room r) {
    project(s.q, first, start(q, s.heads, pair, first), q.row, rows, s.m, r.turned, r.phi);
    finish(s.q, 0, rows, s.m, r.phi);
}

/* Those of v, or of slopes of y. */
INLINE void take_values(Linear s, View x, long pair, long first, long rows, Room r) {
    project(AS_IT_IS, 0, start(x, s.heads, pair, first), x.row, rows, s.dv, 0, r.values);
}

/* The largest exponent of a pair's keys. */
INLINE float top_of_keys(Linear s, View k, long pair, Room r) {
    float top = -3e38f;
    for (long first = 0; s.k.kind == EXP_OF_KEY && first < s.n; first += PART) {
        long rows = least(PART, s.n - first);
        project(s.k, first, start(k, s.heads, pair, first), k.row, rows, s.m, r.turned, r.phi);
        top = highest(r.phi, rows, s.m, top);
    }
    return top;
}

/* Features of keys from `first` on, whose `top` was asked for before; where all are one part, their projections are there. */
INLINE void take_keys(Linear s, float top, View k, long pair, long first, long rows, Room r) {
    if (s.k.kind != EXP_OF_KEY || s.n > PART)
        project(s.k, first, start(k, s.heads, pair, first), k.row, rows, s.m, r.turned, r.phi);
    finish(s.k, top, rows, s.m, r.phi);
}

EACH_CPU static void attend_pair(Linear s, long pair, View q, View k, View v, View y, float *sums, float *z, float *den,
                                 Room r) {
    s.q = of_head(s.q, pair % s.heads), s.k = of_head(s.k, pair % s.heads);
    long m = whole(s.m), dv = whole(s.dv);
    sums += pair * m * dv, z += pair * m, den += pair * s.n;
    float top = top_of_keys(s, k, pair, r);
    for (long c = 0; c < m; c++) z[c] = 0;
    for (long first = 0; first < s.n; first += PART) {
        long rows = least(PART, s.n - first);
        take_keys(s, top, k, pair, first, rows, r);
        take_values(s, v, pair, first, rows, r);
        product(m, dv, rows, r.phi, 1, m, r.values, dv, sums, dv, first > 0);
        for (long i = 0; i < rows; i++) add(z, 1, r.phi + i * m, m);
    }
    for (long first = 0; first < s.n; first += PART) {
        long rows = least(PART, s.n - first);
        take_queries(s, q, pair, first, rows, r);
        product(rows, dv, s.m, r.phi, m, 1, sums, dv, r.values, dv, 0);
        float *out = start(y, s.heads, pair, first);
        for (long i = 0; i < rows; i++, out += y.row) {
            den[first + i] = dot(r.phi + i * m, z, m);
            float share = 1 / den[first + i];
            for (long c = 0; c < s.dv; c++) out[c] = r.values[i * dv + c] * share;
        }
    }
}

EACH_CPU static void attend_back(Linear s, long pair, View q, View k, View v, View y, View d_y, const float *sums,
                                 const float *z, const float *den, View d_q, View d_k, View d_v, float *d_planes,
                                 Room r) {
    s.q = of_head(s.q, pair % s.heads), s.k = of_head(s.k, pair % s.heads);
    long m = whole(s.m), dv = whole(s.dv), size = whole(s.q.size);
    sums += pair * m * dv, z += pair * m, den += pair * s.n;
    Turned turned = {r.turned, d_planes + 2 * pair * size};
    for (long c = 0; s.q.turn.y && c < 2 * size; c++) turned.d_planes[c] = 0;
    transpose(sums, m, dv, r.sums_t, m);
    for (long c = 0; c < m; c++) r.d_z[c] = 0;
    for (long first = 0; first < s.n; first += PART) {
        long rows = least(PART, s.n - first);
        take_queries(s, q, pair, first, rows, r);
        take_values(s, d_y, pair, first, rows, r);
        const float *result = start(y, s.heads, pair, first);
        for (long i = 0; i < rows; i++, result += y.row) {
            float share = 1 / den[first + i], *d_num = r.values + i * dv;
            for (long c = 0; c < s.dv; c++) d_num[c] *= share;
            float d_den = -dot(d_num, result, s.dv);
            add(r.d_z, d_den, r.phi + i * m, m);
            for (long c = 0; c < m; c++) r.slope[i * m + c] = d_den * z[c];
        }
        product(m, dv, rows, r.phi, 1, m, r.values, dv, r.d_sums, dv, first > 0);
        product(rows, m, dv, r.values, dv, 1, r.sums_t, m, r.slope, m, 1);
        give(s.q, first, r.slope, r.phi, start(q, s.heads, pair, first), q.row, turned, rows, s.m,
             start(d_q, s.heads, pair, first), d_q.row, r.other);
    }
    transpose(r.d_sums, m, dv, r.sums_t, m);
    float top = top_of_keys(s, k, pair, r);
    for (long first = 0; first < s.n; first += PART) {
        long rows = least(PART, s.n - first);
        take_values(s, v, pair, first, rows, r);
        for (long i = 0; i < rows; i++)
            for (long c = 0; c < m; c++) r.slope[i * m + c] = r.d_z[c];
        product(rows, m, dv, r.values, dv, 1, r.sums_t, m, r.slope, m, 1);
        take_keys(s, top, k, pair, first, rows, r);
        product(rows, dv, m, r.phi, m, 1, r.d_sums, dv, r.values, dv, 0);
        give(AS_IT_IS, 0, r.values, r.values, r.values, dv, NOT_TURNED, rows, s.dv, start(d_v, s.heads, pair, first),
             d_v.row, 0);
        give(s.k, first, r.slope, r.phi, start(k, s.heads, pair, first), k.row, turned, rows, s.m,
             start(d_k, s.heads, pair, first), d_k.row, r.other);
    }
}

/* Entries of scratch. */
long linear_forward_room(Linear s, int threads) { return threads * room_of_one(s); }
long linear_backward_room(Linear s, int threads) { return threads * room_of_one(s); }

void linear_forward(Linear s, int threads, View q, View k, View v, View y, float *sums, float *z, float *den,
                    float *room) {
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (long pair = 0; pair < s.images * s.heads; pair++)
        attend_pair(s, pair, q, k, v, y, sums, z, den, room_of(s, room));
}

void linear_backward(Linear s, int threads, View q, View k, View v, View y, View d_y, const float *sums, const float *z,
                     const float *den, View d_q, View d_k, View d_v, float *d_planes, float *room) {
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (long pair = 0; pair < s.images * s.heads; pair++)
        attend_back(s, pair, q, k, v, y, d_y, sums, z, den, d_q, d_k, d_v, d_planes, room_of(s, room));
}
