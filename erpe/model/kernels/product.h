/* Linear attention in parts that stay in cache, for CPUs, in float32. Called by compiled.py, which says what each array
 * is. A pair is one image and head. OpenMP's functions are those that torch has loaded: both share one set of threads.
 */

#define LANES 8
#define WIDTH 16 /* of a column of results: two vectors; every D, Dv and row of a tile is a multiple of it */

int omp_get_thread_num(void);

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int bits __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define EACH_CPU __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define EACH_CPU
#endif
#define INLINE static inline __attribute__((always_inline))

INLINE long least(long a, long b) { return a < b ? a : b; }
INLINE long whole(long n) { return (n + WIDTH - 1) / WIDTH * WIDTH; }

INLINE float total(vec x) {
    float sum = 0;
    for (int lane = 0; lane < LANES; lane++) sum += x[lane];
    return sum;
}

/* `rows` x WIDTH results of a row-major b (inner, ..), kept in registers. */
INLINE void block(const int rows, long inner, const float *a, long a_row, long a_column, const float *b, long b_row,
                  float *c, long c_row, int add) {
    vec sum[6][2];
    for (int r = 0; r < rows; r++)
        for (int half = 0; half < 2; half++)
            sum[r][half] = add ? *(const vec *)(c + r * c_row + half * LANES) : (vec){0};
    for (long i = 0; i < inner; i++) {
        vec left = *(const vec *)(b + i * b_row), right = *(const vec *)(b + i * b_row + LANES);
        for (int r = 0; r < rows; r++) {
            float x = a[r * a_row + i * a_column];
            sum[r][0] += x * left;
            sum[r][1] += x * right;
        }
    }
    for (int r = 0; r < rows; r++)
        for (int half = 0; half < 2; half++)
            *(vec *)(c + r * c_row + half * LANES) = sum[r][half];
}

/* c (rows, columns) = a b, or += with `add`. The strides of a are free, so it may be a transpose. */
EACH_CPU static void product(long rows, long columns, long inner, const float *a, long a_row, long a_column, const float *b,
                    long b_row, float *c, long c_row, int add) {
    for (long column = 0; column < columns; column += WIDTH) {
        long r = 0;
        for (; r + 6 <= rows; r += 6)
            block(6, inner, a + r * a_row, a_row, a_column, b + column, b_row, c + r * c_row + column, c_row, add);
        a += r * a_row;
        float *rest = c + r * c_row + column;
        switch (rows - r) {
        case 1: block(1, inner, a, a_row, a_column, b + column, b_row, rest, c_row, add); break;
        case 2: block(2, inner, a, a_row, a_column, b + column, b_row, rest, c_row, add); break;
        case 3: block(3, inner, a, a_row, a_column, b + column, b_row, rest, c_row, add); break;
        case 4: block(4, inner, a, a_row, a_column, b + column, b_row, rest, c_row, add); break;
        case 5: block(5, inner, a, a_row, a_column, b + column, b_row, rest, c_row, add); break;
        }
        a -= r * a_row;
    }
}

/* x <= 0 -> e^x, to a unit or two in the last place; nothing is smaller than e^-87. Source: Cephes, expf. */
INLINE void exponentials(float *at, long length) {
    const float round = 12582912; /* 1.5 * 2^23: adding it leaves the nearest integer in the last bits */
    for (long i = 0; i < length; i += LANES) {
        vec x = *(vec *)(at + i), least = (vec){0} - 87;
        bits low = x < least;
        x = (vec)(((bits)x & ~low) | ((bits)least & low));
        vec shifted = x * 1.44269504f + round, n = shifted - round, r = x - n * 0.693359375f + n * 2.12194440e-4f;
        vec p = (((1.9875691500e-4f * r + 1.3981999507e-3f) * r + 8.3334519073e-3f) * r + 4.1665795894e-2f) * r;
        p = (p + 1.6666665459e-1f) * r + 5.0000001201e-1f;
        bits power = ((bits)shifted + (127 - 0x4B400000)) << 23;
        *(vec *)(at + i) = (p * r * r + r + 1) * (vec)power;
    }
}

/* A view of four axes (images, heads, tokens, entries); the stride of the last one is 1. */
typedef struct {
    float *at;
    long image, head, row;
} View;

INLINE float *start(View x, long heads, long pair, long token) {
    return x.at + pair / heads * x.image + pair % heads * x.head + token * x.row;
}

/* What makes features of numbers: of x (size), or of its projections if there is a w (size, whole width of the features);
 * w_t is its transpose (whole width, whole size). The next head's are w_head entries on, 0 if all have one. Exponents
 * lose norm |x|^2. */
typedef struct {
    enum { PLAIN, RELU, EXP_OF_QUERY, EXP_OF_KEY } kind;
    float eps, norm;
    long size, w_head, w_t_head;
    const float *w, *w_t;
} Map;

static const Map AS_IT_IS = {PLAIN, 0, 0, 0, 0, 0, 0, 0};

INLINE Map of_head(Map map, long head) {
    if (map.w) map.w += head * map.w_head, map.w_t += head * map.w_t_head;
    return map;
}

/* Numbers (rows, size) -> what the map is of, zeros behind them up to the whole width. */
INLINE void project(Map map, const float *x, long row, long rows, long columns, float *out) {
    long width = whole(columns);
    if (map.w) product(rows, width, map.size, x, row, 1, map.w, width, out, width, 0);
    for (long i = 0; i < rows; i++, x += row, out += width) {
        if (!map.w) {
            for (long c = 0; c < columns; c++) out[c] = x[c];
            for (long c = columns; c < width; c++) out[c] = 0;
        }
        if (map.norm) {
            float square = 0;
            for (long c = 0; c < map.size; c++) square += x[c] * x[c];
            for (long c = 0; c < columns; c++) out[c] -= map.norm * square;
        }
    }
}

INLINE float largest(const float *x, long columns, float top) {
    for (long c = 0; c < columns; c++) top = x[c] > top ? x[c] : top;
    return top;
}

/* The largest of some exponents, or what it was. */
INLINE float highest(const float *x, long rows, long columns, float top) {
    for (long i = 0; i < rows; i++, x += whole(columns)) top = largest(x, columns, top);
    return top;
}

/* What `project` made -> features. Exponents of keys lose `top`, those of a query their own largest. */
INLINE void finish(Map map, float top, long rows, long columns, float *out) {
    long width = whole(columns);
    for (long i = 0; i < rows; i++, out += width) {
        if (map.kind == RELU)
            for (long c = 0; c < columns; c++) out[c] = out[c] < 0 ? 0 : out[c]; /* what is no number stays none */
        else if (map.kind != PLAIN) {
            float shift = map.kind == EXP_OF_KEY ? top : largest(out, columns, out[0]);
            for (long c = 0; c < width; c++) out[c] = c < columns ? out[c] - shift : 0;
            exponentials(out, width);
            for (long c = columns; c < width; c++) out[c] = 0;
        }
        for (long c = 0; c < columns; c++) out[c] += map.eps;
    }
}

/* Both. */
INLINE void take(Map map, float top, const float *x, long row, long rows, long columns, float *out) {
    project(map, x, row, rows, columns, out);
    finish(map, top, rows, columns, out);
}

/* Slopes of features, which are used up -> of the numbers. `room` is for a part of `rows` numbers. */
INLINE void give(Map map, float *slope, const float *features, const float *x, long x_row, long rows, long columns,
                 float *out, long row, float *room) {
    long width = whole(columns), size = whole(map.size);
    float *d = slope;
    for (long i = 0; i < rows; i++, d += width, features += width) {
        if (map.kind == RELU)
            for (long c = 0; c < columns; c++) d[c] = features[c] > map.eps ? d[c] : 0;
        else if (map.kind != PLAIN)
            for (long c = 0; c < columns; c++) d[c] *= features[c] - map.eps;
    }
    if (map.w) product(rows, size, columns, slope, width, 1, map.w_t, size, room, size, 0);
    for (long i = 0; i < rows; i++, slope += width, out += row, x += x_row, room += map.w ? size : 0) {
        if (!map.w)
            for (long c = 0; c < columns; c++) out[c] = slope[c];
        else {
            float sum = 0;
            if (map.norm)
                for (long c = 0; c < columns; c++) sum += slope[c];
            for (long c = 0; c < map.size; c++) out[c] = room[c] - 2 * map.norm * sum * x[c];
        }
    }
}
