/* Linear attention in parts that stay in cache, for CPUs, in float32. Called by compiled.py, which says what each array
 * is. A pair is one image and head. OpenMP's functions are those that torch has loaded: both share one set of threads.
 */

#define LANES 8
#define WIDTH 16 /* of a column of results: two vectors; every D, Dv and row of a tile is a multiple of it */

int omp_get_thread_num(void);

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int bits __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

#if defined(EACH_CPU) /* given on the command line */
#elif defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define EACH_CPU __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define EACH_CPU
#endif
#if defined(__clang__)
#define SHUFFLE(x, y, ...) __builtin_shufflevector(x, y, __VA_ARGS__)
#else
#define SHUFFLE(x, y, ...) __builtin_shuffle(x, y, (bits){__VA_ARGS__})
#endif
#define SWAPPED(x) SHUFFLE(x, x, 1, 0, 3, 2, 5, 4, 7, 6) /* each pair of neighbours */
#define INLINE static inline __attribute__((always_inline))

INLINE long least(long a, long b) { return a < b ? a : b; }
INLINE long whole(long n) { return (n + WIDTH - 1) / WIDTH * WIDTH; }

INLINE float total(vec x) {
    x += SHUFFLE(x, x, 4, 5, 6, 7, 0, 1, 2, 3);
    x += SHUFFLE(x, x, 2, 3, 0, 1, 6, 7, 4, 5);
    return x[0] + x[1];
}

/* Sums and maxima go lane by lane: a compiler must not do that by itself, since the order of a sum matters. */
INLINE float dot(const float *a, const float *b, long length) {
    vec sums = {0};
    float rest = 0;
    long i = 0;
    for (; i + LANES <= length; i += LANES) sums += *(const vec *)(a + i) * *(const vec *)(b + i);
    for (; i < length; i++) rest += a[i] * b[i];
    return total(sums) + rest;
}

INLINE float sum(const float *x, long length) {
    vec sums = {0};
    float rest = 0;
    long i = 0;
    for (; i + LANES <= length; i += LANES) sums += *(const vec *)(x + i);
    for (; i < length; i++) rest += x[i];
    return total(sums) + rest;
}

/* The higher of two, lane by lane. */
INLINE void raise(vec *x, vec other) {
    bits more = other > *x;
    *x = (vec)(((bits)other & more) | ((bits)*x & ~more));
}

/* The largest, or `top`. */
INLINE float largest(const float *x, long length, float top) {
    vec tops = (vec){0} + top;
    long i = 0;
    for (; i + LANES <= length; i += LANES) raise(&tops, *(const vec *)(x + i));
    raise(&tops, SHUFFLE(tops, tops, 4, 5, 6, 7, 0, 1, 2, 3));
    raise(&tops, SHUFFLE(tops, tops, 2, 3, 0, 1, 6, 7, 4, 5));
    top = tops[0] > tops[1] ? tops[0] : tops[1];
    for (; i < length; i++) top = x[i] > top ? x[i] : top;
    return top;
}

/* A block of LANES x LANES entries, transposed: quarters change places, then their quarters, then single entries. */
INLINE void flip(vec *x) {
    for (int i = 0; i < LANES; i++)
        if (!(i & 4)) {
            vec a = x[i], b = x[i + 4];
            x[i] = SHUFFLE(a, b, 0, 1, 2, 3, 8, 9, 10, 11), x[i + 4] = SHUFFLE(a, b, 4, 5, 6, 7, 12, 13, 14, 15);
        }
    for (int i = 0; i < LANES; i++)
        if (!(i & 2)) {
            vec a = x[i], b = x[i + 2];
            x[i] = SHUFFLE(a, b, 0, 1, 8, 9, 4, 5, 12, 13), x[i + 2] = SHUFFLE(a, b, 2, 3, 10, 11, 6, 7, 14, 15);
        }
    for (int i = 0; i < LANES; i++)
        if (!(i & 1)) {
            vec a = x[i], b = x[i + 1];
            x[i] = SHUFFLE(a, b, 0, 8, 2, 10, 4, 12, 6, 14), x[i + 1] = SHUFFLE(a, b, 1, 9, 3, 11, 5, 13, 7, 15);
        }
}

/* x (rows, columns) -> (columns, rows), whose rows have `next` entries, zeros behind. */
INLINE void transpose(const float *x, long rows, long columns, float *out, long next) {
    long i = 0;
    for (; i + LANES <= rows; i += LANES)
        for (long c = 0; c < columns; c += LANES) {
            vec part[LANES];
            for (int r = 0; r < LANES; r++) part[r] = *(const vec *)(x + (i + r) * columns + c);
            flip(part);
            for (int r = 0; r < LANES; r++) *(vec *)(out + (c + r) * next + i) = part[r];
        }
    for (; i < next; i++)
        for (long c = 0; c < columns; c++) out[c * next + i] = i < rows ? x[i * columns + c] : 0;
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

/* A rotation of planes of two coordinates, by the place of a token in a grid of w columns; `outside` tokens before it stay
 * as they are. `along` (h + w, whole size) has the cos and sin of each plane for each row, then for each column, the next
 * head's follow; none: nothing is turned. Coordinates are the usual ones, or in a basis (size, whole
 * size); basis_t is its transpose. y and x are the places of rows and columns, if slopes of the angles are wanted. In a
 * `folded` basis the second half of the rows is the first one, with the other sign in the first half of the columns. */
typedef struct {
    long outside, h, w, folded;
    const float *along, *basis, *basis_t, *y, *x;
} Turn;

/* What makes features of numbers x (size), when they have been turned. If there is a w (size, whole width of the features),
 * they are of projections of the coordinates; w_t is its transpose (width, whole size), the next head's are w_head
 * entries on, 0 if all have one. Without it they are of the numbers in the usual basis. Exponents lose norm |x|^2. */
typedef struct {
    enum { PLAIN, RELU, EXP_OF_QUERY, EXP_OF_KEY } kind;
    float eps, norm;
    long size, w_head, w_t_head;
    const float *w, *w_t;
    Turn turn;
} Map;

static const Map AS_IT_IS;

INLINE Map of_head(Map map, long head) {
    if (map.w) map.w += head * map.w_head, map.w_t += head * map.w_t_head;
    if (map.turn.w) map.turn.along += head * (map.turn.h + map.turn.w) * whole(map.size);
    return map;
}

/* Planes (x, y) times phases (cos, sin), both as complex numbers; the phases conjugated with `sense` -1. */
INLINE void times(float *planes, const float *phases, float sense) {
    vec x = *(vec *)planes, phase = *(const vec *)phases, signs = {-sense, sense, -sense, sense, -sense, sense, -sense, sense};
    vec cos = SHUFFLE(phase, phase, 0, 0, 2, 2, 4, 4, 6, 6), sin = SHUFFLE(phase, phase, 1, 1, 3, 3, 5, 5, 7, 7);
    *(vec *)planes = x * cos + SWAPPED(x) * (sin * signs);
}

/* How many of the tokens from `token` on are outside the grid. */
INLINE long outside(Turn turn, long token) { return token < turn.outside ? turn.outside - token : 0; }

/* Tokens (rows, whole size) from `token` on, each by its angle. */
INLINE void rotate(Map map, long token, float *at, long rows, float sense) {
    long size = whole(map.size), first = outside(map.turn, token), place = token + first - map.turn.outside;
    long row = place / map.turn.w, column = place % map.turn.w;
    for (long i = 0; i < first * size; i += LANES) /* by nothing, in which what is no number stays none */
        *(vec *)(at + i) += 0 * SWAPPED(*(vec *)(at + i));
    for (long i = first; i < rows; i++) {
        const float *y = map.turn.along + row * size, *x = map.turn.along + (map.turn.h + column) * size;
        for (long c = 0; c < size; c += LANES) {
            vec phase = *(const vec *)(y + c);
            times((float *)&phase, x + c, 1);
            times(at + i * size + c, (const float *)&phase, sense);
        }
        if (++column == map.turn.w) column = 0, row++;
    }
}

/* Numbers (rows, size) -> coordinates in the basis. A folded one takes half of the products: its first half sees the
 * difference of the halves of x alone, its second half their sum; `room` is for them, it may be x. */
INLINE void enter(Map map, const float *x, long row, long rows, float *out, float *room) {
    long size = whole(map.size), half = size / 2;
    const float *basis = map.turn.basis;
    if (!map.turn.folded) {
        product(rows, size, map.size, x, row, 1, basis, size, out, size, 0);
        return;
    }
    for (long i = 0; i < rows; i++, x += row)
        for (long c = 0; c < half; c += LANES) {
            vec first = *(const vec *)(x + c), second = *(const vec *)(x + half + c);
            *(vec *)(room + i * size + c) = first - second;
            *(vec *)(room + i * size + half + c) = first + second;
        }
    product(rows, half, half, room, size, 1, basis, size, out, size, 0);
    product(rows, half, half, room + half, size, 1, basis + half, size, out + half, size, 0);
}

/* Coordinates (rows, whole size) in the basis -> the numbers. */
INLINE void leave(Map map, const float *coordinates, long rows, float *out) {
    long size = whole(map.size), half = size / 2;
    const float *basis_t = map.turn.basis_t;
    if (!map.turn.folded) {
        product(rows, size, map.size, coordinates, size, 1, basis_t, size, out, size, 0);
        return;
    }
    product(rows, half, half, coordinates, size, 1, basis_t, size, out, size, 0);
    product(rows, half, half, coordinates + half, size, 1, basis_t + half * size, size, out + half, size, 0);
    for (long i = 0; i < rows; i++, out += size)
        for (long c = 0; c < half; c += LANES) {
            vec difference = *(vec *)(out + c), both = *(vec *)(out + half + c);
            *(vec *)(out + c) = both + difference;
            *(vec *)(out + half + c) = both - difference;
        }
}

/* Numbers (rows, size) of tokens from `token` on, turned; zeros behind them up to the whole size. `room` is as large. */
INLINE void turn(Map map, long token, const float *x, long row, long rows, float *out, float *room) {
    long size = whole(map.size);
    if (map.turn.basis) enter(map, x, row, rows, out, room);
    else
        for (long i = 0; i < rows; i++)
            for (long c = 0; c < size; c++) out[i * size + c] = c < map.size ? x[i * row + c] : 0;
    rotate(map, token, out, rows, 1);
}

/* Numbers (rows, size) of tokens from `token` on -> what the map is of, zeros behind them up to the whole width. What was
 * turned is left in `turned`; `out` has room for the whole size, too. */
INLINE void project(Map map, long token, const float *x, long row, long rows, long columns, float *turned, float *out) {
    long width = whole(columns), next = row;
    const float *y = x;
    if (map.turn.w) turn(map, token, x, row, rows, turned, out), y = turned, next = whole(map.size);
    if (map.w) product(rows, width, map.size, y, next, 1, map.w, width, out, width, 0);
    else if (map.turn.basis) leave(map, y, rows, out);
    for (long i = 0; i < rows; i++, x += row, y += next, out += width) {
        if (!map.w && !map.turn.basis) {
            for (long c = 0; c < columns; c++) out[c] = y[c];
            for (long c = columns; c < width; c++) out[c] = 0;
        }
        if (map.norm) {
            float loss = map.norm * dot(x, x, map.size);
            for (long c = 0; c < columns; c++) out[c] -= loss;
        }
    }
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

/* Slopes of what was turned -> of the angles: each plane's is the second of its entries less the first; times the places
 * of the tokens, their sums are added to `d_planes` (2, whole size). */
INLINE void sum_angles(Map map, long token, const float *slope, const float *turned, long rows, float *d_planes) {
    long size = whole(map.size), first = outside(map.turn, token), place = token + first - map.turn.outside;
    long row = place / map.turn.w, column = place % map.turn.w;
    for (long i = first; i < rows; i++) {
        float y = map.turn.y[row], x = map.turn.x[column];
        for (long c = 0; c < size; c += LANES) {
            vec plane = *(const vec *)(turned + i * size + c);
            vec angle = SWAPPED(plane) * *(const vec *)(slope + i * size + c);
            *(vec *)(d_planes + c) += y * angle;
            *(vec *)(d_planes + size + c) += x * angle;
        }
        if (++column == map.turn.w) column = 0, row++;
    }
}

/* What belongs to a rotation: what `project` left, and where slopes of the planes' frequencies are summed. */
typedef struct {
    float *turned, *d_planes;
} Turned;

static const Turned NOT_TURNED = {0, 0};

/* Slopes of what was turned, used up like that -> of x (rows, whole size), wherever they are then. */
INLINE float *turn_back(Map map, long token, float *slope, Turned known, long rows) {
    long size = whole(map.size);
    if (map.turn.y) sum_angles(map, token, slope, known.turned, rows, known.d_planes);
    rotate(map, token, slope, rows, -1);
    if (!map.turn.basis) return slope;
    leave(map, slope, rows, known.turned);
    return known.turned;
}

/* Slopes of features of tokens from `token` on, which are used up -> of the numbers. `room` is for `rows` numbers. */
INLINE void give(Map map, long token, float *slope, const float *features, const float *x, long x_row, Turned known,
                 long rows, long columns, float *out, long row, float *room) {
    long width = whole(columns), size = whole(map.size), next = map.w ? size : width;
    float *d = slope;
    for (long i = 0; i < rows; i++, d += width, features += width) {
        if (map.kind == RELU)
            for (long c = 0; c < columns; c++) d[c] = features[c] > map.eps ? d[c] : 0;
        else if (map.kind != PLAIN)
            for (long c = 0; c < columns; c++) d[c] *= features[c] - map.eps;
    }
    if (map.w) product(rows, size, columns, slope, width, 1, map.w_t, size, room, size, 0);
    else if (map.turn.basis) enter(map, slope, width, rows, room, slope);
    d = map.w || map.turn.basis ? room : slope;
    if (map.turn.w) d = turn_back(map, token, d, known, rows);
    for (long i = 0; i < rows; i++, slope += width, out += row, x += x_row, d += next) {
        for (long c = 0; c < (map.w ? map.size : columns); c++) out[c] = d[c];
        if (map.norm) {
            float factor = 2 * map.norm * sum(slope, columns);
            for (long c = 0; c < map.size; c++) out[c] -= factor * x[c];
        }
    }
}
