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
def load(at, rows, n, stride, size, WIDE: tl.constexpr):
    """Rows of numbers as float32 (rows, WIDE); zero beyond `n` rows and `size` numbers."""
    columns = tl.arange(0, WIDE)
    inside = (rows[:, None] < n) & (columns[None, :] < size)
    return tl.load(at + rows[:, None] * stride + columns[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def store(at, x, rows, n, stride, size, WIDE: tl.constexpr):
    """The reverse of `load`."""
    columns = tl.arange(0, WIDE)
    inside = (rows[:, None] < n) & (columns[None, :] < size)
    tl.store(at + rows[:, None] * stride + columns[None, :], x.to(at.dtype.element_ty), mask=inside)


@triton.jit
def place(at, image, head, image_stride, head_stride):
    """Where an image's head begins."""
    return at + image.to(tl.int64) * image_stride + head.to(tl.int64) * head_stride


@triton.jit
def projected(x, w, PROJECTED: tl.constexpr):
    """(rows, D) -> (rows, M)."""
    if PROJECTED:
        return tl.dot(x, w, input_precision="tf32x3")
    else:
        return x


@triton.jit
def query_features(x, w, m, eps, EXP: tl.constexpr, PROJECTED: tl.constexpr, M: tl.constexpr):
    """Features of queries (rows, M), and by what slopes of features become slopes of projections."""
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
