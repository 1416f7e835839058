"""What the kernels have in common: rows in and out, products, features of a block of tokens."""

# mypy: disallow-untyped-defs=False

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def nearest(x):
    """The tf32 number nearest to each: tensor cores cut the lower 13 bits off, which makes all sums too small."""
    return ((x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)


@triton.jit
def product(a, b):
    """a b by tensor cores in tf32."""
    return tl.dot(nearest(a), nearest(b), input_precision="tf32")


@triton.jit
def load(at, rows, n, size, WIDE: tl.constexpr):
    """Rows of numbers as float32 (rows, WIDE), from `at`: where the first is, and the stride of rows. Zero beyond `n`
    rows and `size` numbers."""
    columns = tl.arange(0, WIDE)
    inside = (rows[:, None] < n) & (columns[None, :] < size)
    return tl.load(at[0] + rows[:, None] * at[1] + columns[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def store(at, x, rows, n, size, WIDE: tl.constexpr):
    """The reverse of `load`."""
    columns = tl.arange(0, WIDE)
    inside = (rows[:, None] < n) & (columns[None, :] < size)
    tl.store(at[0] + rows[:, None] * at[1] + columns[None, :], x.to(at[0].dtype.element_ty), mask=inside)


@triton.jit
def place(at, image, head, image_stride, head_stride, row_stride):
    """Where the rows of an image's head are."""
    return at + image.to(tl.int64) * image_stride + head.to(tl.int64) * head_stride, row_stride


@triton.jit
def turn_of(table, places, basis, head, heads, n, d, p, D: tl.constexpr, BASIS: tl.constexpr):
    """What turns the vectors of a head: where cosines and sines of its angles are, and the places of tokens, in `p`
    planes; the basis (D, D)."""
    axes = load((basis, d), tl.arange(0, D), d, d, D) if BASIS else 0.0
    return table + head * n * p, table + (heads + head) * n * p, places, p, axes


@triton.jit
def angles(turn, rows, n, D: tl.constexpr, TURN: tl.constexpr):
    """Cosines and sines (rows, D / 2) of the angles of the planes; those beyond the last do not turn."""
    if TURN:
        t = tl.arange(0, D // 2)
        at, inside = rows[:, None] * turn[3] + t[None, :], (rows[:, None] < n) & (t[None, :] < turn[3])
        return tl.load(turn[0] + at, mask=inside, other=1.0), tl.load(turn[1] + at, mask=inside, other=0.0)
    else:
        return 0.0, 0.0


@triton.jit
def pairs_of(x, ROWS: tl.constexpr, D: tl.constexpr):
    """Both coordinates of each plane, (rows, D / 2) each."""
    return tl.split(tl.reshape(x, (ROWS, D // 2, 2)))


@triton.jit
def turned(x, cos, sin, ROWS: tl.constexpr, D: tl.constexpr):
    """Vectors (rows, D) turned in the planes of adjacent numbers."""
    a, b = pairs_of(x, ROWS, D)
    return tl.reshape(tl.join(a * cos - b * sin, a * sin + b * cos), (ROWS, D))


@triton.jit
def placed(x, turn, cos, sin, ROWS: tl.constexpr, D: tl.constexpr, TURN: tl.constexpr, BASIS: tl.constexpr):
    """Vectors (rows, D) in the coordinates of the planes, turned."""
    if BASIS:
        x = tl.dot(x, turn[4], input_precision="tf32x3")
    if TURN:
        x = turned(x, cos, sin, ROWS, D)
    return x


@triton.jit
def unplaced(x, turn, cos, sin, ROWS: tl.constexpr, D: tl.constexpr, TURN: tl.constexpr, BASIS: tl.constexpr):
    """The reverse of `placed`."""
    if TURN:
        x = turned(x, cos, -sin, ROWS, D)
    if BASIS:
        x = product(x, tl.trans(turn[4]))
    return x


@triton.jit
def plane_slopes(x, d_x, turn, rows, n, ROWS: tl.constexpr, D: tl.constexpr):
    """Gradients of the frequencies (D / 2) along both axes, by some turned vectors and their gradients."""
    (a, b), (d_a, d_b) = pairs_of(x, ROWS, D), pairs_of(d_x, ROWS, D)
    d_angle = a * d_b - b * d_a
    y = tl.load(turn[2] + rows, mask=rows < n, other=0.0)
    x = tl.load(turn[2] + n + rows, mask=rows < n, other=0.0)
    return tl.sum(y[:, None] * d_angle, axis=0), tl.sum(x[:, None] * d_angle, axis=0)


@triton.jit
def projected(x, w, PROJECTED: tl.constexpr):
    """(rows, D) -> (rows, M)."""
    if PROJECTED:
        return tl.dot(x, w, input_precision="tf32x3")
    else:
        return x


@triton.jit
def query_features(x, w, m, eps, EXP: tl.constexpr, PROJECTED: tl.constexpr, M: tl.constexpr):
    """Features of queries (rows, M), and by what gradients of features become gradients of projections."""
    y = projected(x, w, PROJECTED)
    known = (tl.arange(0, M) < m)[None, :]
    if EXP:
        y = tl.where(known, y, float("-inf"))
        phi = tl.exp(y - tl.max(y, axis=1)[:, None])
        return phi, phi
    else:
        return tl.where(known, tl.maximum(y, 0.0) + eps, 0.0), tl.where(y > 0.0, 1.0, 0.0)


@triton.jit
def key_exponents(x, w, rows, n, m, norm, PROJECTED: tl.constexpr, M: tl.constexpr):
    """Exponents of keys (rows, M); minus infinity where there is no key or no feature."""
    y = projected(x, w, PROJECTED) - norm * tl.sum(x * x, axis=1)[:, None]
    return tl.where((rows < n)[:, None] & (tl.arange(0, M) < m)[None, :], y, float("-inf"))


@triton.jit
def key_features(x, w, rows, n, m, top, eps, norm, EXP: tl.constexpr, PROJECTED: tl.constexpr, M: tl.constexpr):
    """As `query_features`, of keys; `top` is the largest exponent."""
    known = (rows < n)[:, None] & (tl.arange(0, M) < m)[None, :]
    if EXP:
        e = tl.exp(key_exponents(x, w, rows, n, m, norm, PROJECTED, M) - top)
        return tl.where(known, e + eps, 0.0), e
    else:
        y = projected(x, w, PROJECTED)
        return tl.where(known, tl.maximum(y, 0.0) + eps, 0.0), tl.where(y > 0.0, 1.0, 0.0)
