"""Triton kernels of the masked product of linear attention, by tiles of weights that are never written to memory.

    num_i = sum_j A_ij v_j,    den_i = sum_j A_ij,    A_ij = (phi_q_i . phi_k_j) exp(bias[r_j - r_i] - top_i)

`top` is the largest log-weight that a query reaches, so no running maximum is needed. A program of `forward` and
`query_slopes` has a block of queries and walks over the keys, one of `key_slopes` the other way round, one of
`pair_slopes` a tile of pairs and walks over images. Nothing is added by atomics.

All contractions are one product in tf32 with operands rounded to nearest: `tests/test_triton.py` holds the errors
against float64 below 1e-3.
"""

# mypy: disallow-untyped-defs=False

from __future__ import annotations

import triton
import triton.language as tl

from erpe.model.kernels.gpu.blocks import load, product, store


@triton.jit
def weights(bias, top, i, j, n, h, w):
    """exp(bias - top) (queries, keys); zero where there is no query or no key. `top` is (queries)."""
    offset = (j // w)[None, :] - (i // w)[:, None] + h - 1
    offset = offset * (2 * w - 1) + (j % w)[None, :] - (i % w)[:, None] + w - 1
    there = (i < n)[:, None] & (j < n)[None, :]
    return tl.exp(tl.load(bias + offset, mask=there, other=float("-inf")) - top[:, None])


@triton.jit
def forward(
    phi_q, phi_k, v, bias, top, num, den, heads, n, h, w, m, dv,
    M: tl.constexpr, DV: tl.constexpr, BLOCK: tl.constexpr,
):
    """num and den of a block of queries. All is contiguous: (pairs, n, ..), bias (heads, offsets), top (heads, n)."""
    pair, i = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at, head = pair.to(tl.int64) * n, pair % heads
    bias += head * (2 * h - 1) * (2 * w - 1)
    q, own_top = load((phi_q + at * m, m), i, n, m, M), tl.load(top + head * n + i, mask=i < n, other=0.0)
    sums, total = tl.zeros((BLOCK, DV), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for begin in range(0, n, BLOCK):
        j = begin + tl.arange(0, BLOCK)
        a = product(q, tl.trans(load((phi_k + at * m, m), j, n, m, M))) * weights(bias, own_top, i, j, n, h, w)
        sums += product(a, load((v + at * dv, dv), j, n, dv, DV))
        total += tl.sum(a, axis=1)
    store((num + at * dv, dv), sums, i, n, dv, DV)
    tl.store(den + at + i, total, mask=i < n)


@triton.jit
def query_slopes(
    phi_k, v, bias, top, d_num, d_den, d_q, heads, n, h, w, m, dv,
    M: tl.constexpr, DV: tl.constexpr, BLOCK: tl.constexpr,
):
    """Gradients of the features of a block of queries."""
    pair, i = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at, head = pair.to(tl.int64) * n, pair % heads
    bias += head * (2 * h - 1) * (2 * w - 1)
    own_top = tl.load(top + head * n + i, mask=i < n, other=0.0)
    d_n, d_d = load((d_num + at * dv, dv), i, n, dv, DV), tl.load(d_den + at + i, mask=i < n, other=0.0)
    sums = tl.zeros((BLOCK, M), tl.float32)
    for begin in range(0, n, BLOCK):
        j = begin + tl.arange(0, BLOCK)
        d_a = product(d_n, tl.trans(load((v + at * dv, dv), j, n, dv, DV))) + d_d[:, None]
        sums += product(d_a * weights(bias, own_top, i, j, n, h, w), load((phi_k + at * m, m), j, n, m, M))
    store((d_q + at * m, m), sums, i, n, m, M)


@triton.jit
def key_slopes(
    phi_q, phi_k, v, bias, top, d_num, d_den, d_k, d_v, heads, n, h, w, m, dv,
    M: tl.constexpr, DV: tl.constexpr, BLOCK: tl.constexpr,
):
    """Gradients of the features of a block of keys, and of its values."""
    pair, j = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at, head = pair.to(tl.int64) * n, pair % heads
    bias += head * (2 * h - 1) * (2 * w - 1)
    k, own_v = load((phi_k + at * m, m), j, n, m, M), load((v + at * dv, dv), j, n, dv, DV)
    k_sums, v_sums = tl.zeros((BLOCK, M), tl.float32), tl.zeros((BLOCK, DV), tl.float32)
    for begin in range(0, n, BLOCK):
        i = begin + tl.arange(0, BLOCK)
        c = weights(bias, tl.load(top + head * n + i, mask=i < n, other=0.0), i, j, n, h, w)
        q, d_n = load((phi_q + at * m, m), i, n, m, M), load((d_num + at * dv, dv), i, n, dv, DV)
        v_sums += product(tl.trans(product(q, tl.trans(k)) * c), d_n)
        d_a = product(d_n, tl.trans(own_v)) + tl.load(d_den + at + i, mask=i < n, other=0.0)[:, None]
        k_sums += product(tl.trans(d_a * c), q)
    store((d_k + at * m, m), k_sums, j, n, m, M)
    store((d_v + at * dv, dv), v_sums, j, n, dv, DV)


@triton.jit
def pair_slopes(
    phi_q, phi_k, v, bias, top, d_num, d_den, d_log_c, images, heads, part, first, rows, n, h, w, m, dv,
    M: tl.constexpr, DV: tl.constexpr, BLOCK: tl.constexpr,
):
    """Gradients of the log-weights of a tile of pairs, added over a part of the images: (parts, heads, rows, n), of
    `rows` queries from the `first` on."""
    tiles = tl.cdiv(n, BLOCK)
    row = tl.program_id(0) // tiles * BLOCK + tl.arange(0, BLOCK)
    i, j = first + row, tl.program_id(0) % tiles * BLOCK + tl.arange(0, BLOCK)
    head, chunk = tl.program_id(1), tl.program_id(2)
    sums = tl.zeros((BLOCK, BLOCK), tl.float32)
    for image in range(chunk * part, tl.minimum(chunk * part + part, images)):
        at = (image * heads + head).to(tl.int64) * n
        a = product(load((phi_q + at * m, m), i, n, m, M), tl.trans(load((phi_k + at * m, m), j, n, m, M)))
        d_n, d_d = load((d_num + at * dv, dv), i, n, dv, DV), tl.load(d_den + at + i, mask=i < n, other=0.0)
        sums += a * (product(d_n, tl.trans(load((v + at * dv, dv), j, n, dv, DV))) + d_d[:, None])
    own_top = tl.load(top + head * n + i, mask=i < n, other=0.0)
    c = weights(bias + head * (2 * h - 1) * (2 * w - 1), own_top, i, j, n, h, w)
    there = (row < rows)[:, None] & (j < n)[None, :]
    place = ((chunk * heads + head).to(tl.int64) * rows + row[:, None]) * n + j[None, :]
    tl.store(d_log_c + place, sums * c, mask=there)
