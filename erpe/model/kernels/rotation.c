#include "product.h"

/* Rotations by themselves: the vector of each token turned by its place. Tokens come in parts of PART. */

#define PART 64

typedef struct {
    long images, heads, n;
    Map x;
} Rotated;

INLINE void copy(const float *x, long x_row, long rows, long columns, float *out, long row) {
    for (long i = 0; i < rows; i++)
        for (long c = 0; c < columns; c++) out[i * row + c] = x[i * x_row + c];
}

EACH_CPU static void turn_pair(Rotated s, long pair, View x, View y, float *turned) {
    s.x = of_head(s.x, pair % s.heads);
    for (long first = 0; first < s.n; first += PART) {
        long rows = least(PART, s.n - first);
        turn(s.x, first, start(x, s.heads, pair, first), x.row, rows, turned);
        copy(turned, whole(s.x.size), rows, s.x.size, start(y, s.heads, pair, first), y.row);
    }
}

EACH_CPU static void turn_pair_back(Rotated s, long pair, View y, View d_y, View d_x, float *d_planes, float *turned) {
    s.x = of_head(s.x, pair % s.heads);
    long size = whole(s.x.size);
    float *slope = turned + PART * size;
    Turned known = {turned, d_planes + 2 * pair * size};
    for (long c = 0; s.x.turn.y && c < 2 * size; c++) known.d_planes[c] = 0;
    for (long first = 0; first < s.n; first += PART) {
        long rows = least(PART, s.n - first);
        project(AS_IT_IS, 0, start(y, s.heads, pair, first), y.row, rows, s.x.size, 0, turned);
        project(AS_IT_IS, 0, start(d_y, s.heads, pair, first), d_y.row, rows, s.x.size, 0, slope);
        copy(turn_back(s.x, first, slope, known, rows), size, rows, s.x.size, start(d_x, s.heads, pair, first), d_x.row);
    }
}

/* Entries of scratch. */
long rotation_forward_room(Rotated s, int threads) { return threads * PART * whole(s.x.size); }
long rotation_backward_room(Rotated s, int threads) { return threads * 2 * PART * whole(s.x.size); }

void rotation_forward(Rotated s, int threads, View x, View y, float *room) {
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (long pair = 0; pair < s.images * s.heads; pair++)
        turn_pair(s, pair, x, y, room + omp_get_thread_num() * PART * whole(s.x.size));
}

void rotation_backward(Rotated s, int threads, View y, View d_y, View d_x, float *d_planes, float *room) {
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (long pair = 0; pair < s.images * s.heads; pair++)
        turn_pair_back(s, pair, y, d_y, d_x, d_planes, room + omp_get_thread_num() * 2 * PART * whole(s.x.size));
}
