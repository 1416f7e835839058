"""Triton kernels of the plain product of linear attention.

    y_i = phi_q_i S / (phi_q_i . z),   S = sum_j phi_k_j v_j^T,   z = sum_j phi_k_j

Inputs are float32 or half as wide; features, sums and products are float32. A program has one image and head and walks
over its tokens in blocks: over all of them where there are few, over a part of them where there are many; then S and z
of the parts are added outside. Nothing is added by atomics: the same numbers come out every time.

The precision of each product stands in `erpe.model.kernels`.
"""

# mypy: disallow-untyped-defs=False

from __future__ import annotations

import triton
import triton.language as tl

from erpe.model.kernels.gpu.blocks import (
    key_exponents,
    key_features,
    load,
    place,
    product,
    query_features,
    store,
)


@triton.jit
def key_sums(
    k, v, w, first, last, n, d, dv, m, k_row, v_row, eps, norm,
    EXP: tl.constexpr, PROJECTED: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, M: tl.constexpr, BLOCK: tl.constexpr,
):
    """S (M, DV) and z (M) over the keys from `first` to before `last`, and the largest exponent; for the exponential
    map without eps, and the sum of the values (DV) for it."""
    sums, z = tl.zeros((M, DV), tl.float32), tl.zeros((M,), tl.float32)
    values, top = tl.zeros((DV,), tl.float32), tl.full((), float("-inf"), tl.float32)
    for begin in range(first, last, BLOCK):
        rows = begin + tl.arange(0, BLOCK)
        x, v_rows = load(k, rows, n, k_row, d, D), load(v, rows, n, v_row, dv, DV)
        if EXP:
            y = key_exponents(x, w, rows, n, m, norm, PROJECTED, M)
            higher = tl.maximum(top, tl.max(tl.max(y, axis=1), axis=0))
            grown = tl.exp(top - higher)
            phi, top = tl.exp(y - higher), higher
            sums, z = sums * grown, z * grown
            values += tl.sum(v_rows, axis=0)
        else:
            phi, _ = key_features(x, w, rows, n, m, top, eps, norm, EXP, PROJECTED, M)
        sums += product(tl.trans(phi), v_rows)
        z += tl.sum(phi, axis=0)
    return sums, z, values, top


@triton.jit
def averages(
    q, y, w, sums, z, first, last, n, d, dv, m, q_row, y_row, eps,
    EXP: tl.constexpr, PROJECTED: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, M: tl.constexpr, BLOCK: tl.constexpr,
):
    """y of the queries from `first` to before `last`."""
    for begin in range(first, last, BLOCK):
        rows = begin + tl.arange(0, BLOCK)
        phi, _ = query_features(load(q, rows, n, q_row, d, D), w, m, eps, EXP, PROJECTED, M)
        num = product(phi, sums)
        store(y, num / tl.sum(phi * z[None, :], axis=1)[:, None], rows, n, y_row, dv, DV)


@triton.jit
def query_slopes(
    q, d_y, d_q, w, sums, z, first, last, n, d, dv, m, q_row, dy_row, dq_row, eps,
    EXP: tl.constexpr, PROJECTED: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, M: tl.constexpr, BLOCK: tl.constexpr,
):
    """Slopes of the queries; returns those of S (M, DV) and z (M) by these queries."""
    d_sums, d_z = tl.zeros((M, DV), tl.float32), tl.zeros((M,), tl.float32)
    for begin in range(first, last, BLOCK):
        rows = begin + tl.arange(0, BLOCK)
        phi, slope = query_features(load(q, rows, n, q_row, d, D), w, m, eps, EXP, PROJECTED, M)
        d_rows = load(d_y, rows, n, dy_row, dv, DV)
        den = tl.where(rows < n, tl.sum(phi * z[None, :], axis=1), 1.0)
        num = product(phi, sums)
        d_den = -tl.sum(d_rows * num, axis=1) / (den * den)
        d_num = d_rows / den[:, None]
        d_sums += product(tl.trans(phi), d_num)
        d_z += tl.sum(phi * d_den[:, None], axis=0)
        d_phi = product(d_num, tl.trans(sums)) + d_den[:, None] * z[None, :]
        d_x = d_phi * slope
        if PROJECTED:
            d_x = product(d_x, tl.trans(w))
        store(d_q, d_x, rows, n, dq_row, d, D)
    return d_sums, d_z


@triton.jit
def key_slopes(
    k, v, d_k, d_v, w, d_sums, d_z, top, first, last, n, d, dv, m, k_row, v_row, dk_row, dv_row, eps, norm,
    EXP: tl.constexpr, PROJECTED: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, M: tl.constexpr, BLOCK: tl.constexpr,
):
    """Slopes of keys and values."""
    for begin in range(first, last, BLOCK):
        rows = begin + tl.arange(0, BLOCK)
        x, v_rows = load(k, rows, n, k_row, d, D), load(v, rows, n, v_row, dv, DV)
        phi, slope = key_features(x, w, rows, n, m, top, eps, norm, EXP, PROJECTED, M)
        store(d_v, product(phi, d_sums), rows, n, dv_row, dv, DV)
        d_phi = product(v_rows, tl.trans(d_sums)) + d_z[None, :]
        d_y = d_phi * slope
        d_x = d_y
        if PROJECTED:
            d_x = product(d_y, tl.trans(w))
        if EXP:
            d_x -= 2.0 * norm * tl.sum(d_y, axis=1)[:, None] * x
        store(d_k, d_x, rows, n, dk_row, d, D)


@triton.jit
def forward(
    q, k, v, w, y, sums, z, top, heads, n, d, dv, m,
    q_image, q_head, q_row, k_image, k_head, k_row, v_image, v_head, v_row, y_image, y_head, y_row, w_head, w_row,
    q_eps, k_eps, norm,
    EXP: tl.constexpr, PROJECTED: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, M: tl.constexpr, BLOCK: tl.constexpr,
):
    """All of an image's head: y, and what a backward pass needs again, S (m, dv), z (m) and the largest exponent."""
    pair = tl.program_id(0)
    image, head = pair // heads, pair % heads
    q, k = place(q, image, head, q_image, q_head), place(k, image, head, k_image, k_head)
    v, y = place(v, image, head, v_image, v_head), place(y, image, head, y_image, y_head)
    table = load(w + head * w_head, tl.arange(0, D), d, w_row, m, M)
    s, z_rows, values, highest = key_sums(
        k, v, table, 0, n, n, d, dv, m, k_row, v_row, k_eps, norm, EXP, PROJECTED, D, DV, M, BLOCK
    )
    if EXP:  # in the place of a pass of its own over the keys
        s += k_eps * tl.where(tl.arange(0, M) < m, 1.0, 0.0)[:, None] * values[None, :]
        z_rows += k_eps * n * tl.where(tl.arange(0, M) < m, 1.0, 0.0)
    features = tl.arange(0, M)
    store(sums + pair * m * dv, s, features, m, dv, dv, DV)
    tl.store(z + pair * m + features, z_rows, mask=features < m)
    tl.store(top + pair, highest)
    averages(q, y, table, s, z_rows, 0, n, n, d, dv, m, q_row, y_row, q_eps, EXP, PROJECTED, D, DV, M, BLOCK)


@triton.jit
def forward_sums(
    k, v, w, sums, z, values, top, heads, part, n, d, dv, m,
    k_image, k_head, k_row, v_image, v_head, v_row, w_head, w_row, k_eps, norm,
    EXP: tl.constexpr, PROJECTED: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, M: tl.constexpr, BLOCK: tl.constexpr,
):
    """The first of two passes: what `key_sums` gives of each part of the keys, (pairs, parts, ..)."""
    pair, chunk, chunks = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    image, head = pair // heads, pair % heads
    k, v = place(k, image, head, k_image, k_head), place(v, image, head, v_image, v_head)
    table = load(w + head * w_head, tl.arange(0, D), d, w_row, m, M)
    first = chunk * part
    s, z_rows, value_sums, highest = key_sums(
        k, v, table, first, tl.minimum(first + part, n), n, d, dv, m, k_row, v_row, k_eps, norm,
        EXP, PROJECTED, D, DV, M, BLOCK,
    )
    at, features, numbers = pair * chunks + chunk, tl.arange(0, M), tl.arange(0, DV)
    store(sums + at * m * dv, s, features, m, dv, dv, DV)
    tl.store(z + at * m + features, z_rows, mask=features < m)
    tl.store(values + at * dv + numbers, value_sums, mask=numbers < dv)
    tl.store(top + at, highest)


@triton.jit
def forward_averages(
    q, w, y, sums, z, heads, part, n, d, dv, m, q_image, q_head, q_row, y_image, y_head, y_row, w_head, w_row, q_eps,
    EXP: tl.constexpr, PROJECTED: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, M: tl.constexpr, BLOCK: tl.constexpr,
):
    """The second: y of a part of the queries."""
    pair, chunk = tl.program_id(0), tl.program_id(1)
    image, head = pair // heads, pair % heads
    q, y = place(q, image, head, q_image, q_head), place(y, image, head, y_image, y_head)
    table = load(w + head * w_head, tl.arange(0, D), d, w_row, m, M)
    features, first = tl.arange(0, M), chunk * part
    s = load(sums + pair * m * dv, features, m, dv, dv, DV)
    z_rows = tl.load(z + pair * m + features, mask=features < m, other=0.0)
    last = tl.minimum(first + part, n)
    averages(q, y, table, s, z_rows, first, last, n, d, dv, m, q_row, y_row, q_eps, EXP, PROJECTED, D, DV, M, BLOCK)


@triton.jit
def backward(
    q, k, v, d_y, w, sums, z, top, d_q, d_k, d_v, heads, n, d, dv, m,
    q_image, q_head, q_row, k_image, k_head, k_row, v_image, v_head, v_row, dy_image, dy_head, dy_row,
    dq_image, dq_head, dq_row, dk_image, dk_head, dk_row, dv_image, dv_head, dv_row, w_head, w_row, q_eps, k_eps, norm,
    EXP: tl.constexpr, PROJECTED: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, M: tl.constexpr, BLOCK: tl.constexpr,
):
    """All slopes of an image's head."""
    pair = tl.program_id(0)
    image, head = pair // heads, pair % heads
    q, k = place(q, image, head, q_image, q_head), place(k, image, head, k_image, k_head)
    v, d_y = place(v, image, head, v_image, v_head), place(d_y, image, head, dy_image, dy_head)
    d_q, d_k = place(d_q, image, head, dq_image, dq_head), place(d_k, image, head, dk_image, dk_head)
    d_v = place(d_v, image, head, dv_image, dv_head)
    table = load(w + head * w_head, tl.arange(0, D), d, w_row, m, M)
    features = tl.arange(0, M)
    s = load(sums + pair * m * dv, features, m, dv, dv, DV)
    z_rows = tl.load(z + pair * m + features, mask=features < m, other=0.0)
    d_s, d_z = query_slopes(
        q, d_y, d_q, table, s, z_rows, 0, n, n, d, dv, m, q_row, dy_row, dq_row, q_eps,
        EXP, PROJECTED, D, DV, M, BLOCK,
    )
    key_slopes(
        k, v, d_k, d_v, table, d_s, d_z, tl.load(top + pair), 0, n, n, d, dv, m, k_row, v_row, dk_row, dv_row,
        k_eps, norm, EXP, PROJECTED, D, DV, M, BLOCK,
    )


@triton.jit
def backward_queries(
    q, d_y, w, sums, z, d_q, d_sums, d_z, heads, part, n, d, dv, m,
    q_image, q_head, q_row, dy_image, dy_head, dy_row, dq_image, dq_head, dq_row, w_head, w_row, q_eps,
    EXP: tl.constexpr, PROJECTED: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, M: tl.constexpr, BLOCK: tl.constexpr,
):
    """The first of two passes: slopes of a part of the queries, and of S and z by them, (pairs, parts, ..)."""
    pair, chunk, chunks = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    image, head = pair // heads, pair % heads
    q, d_y = place(q, image, head, q_image, q_head), place(d_y, image, head, dy_image, dy_head)
    d_q = place(d_q, image, head, dq_image, dq_head)
    table = load(w + head * w_head, tl.arange(0, D), d, w_row, m, M)
    features, first = tl.arange(0, M), chunk * part
    s = load(sums + pair * m * dv, features, m, dv, dv, DV)
    z_rows = tl.load(z + pair * m + features, mask=features < m, other=0.0)
    d_s, d_zs = query_slopes(
        q, d_y, d_q, table, s, z_rows, first, tl.minimum(first + part, n), n, d, dv, m, q_row, dy_row, dq_row, q_eps,
        EXP, PROJECTED, D, DV, M, BLOCK,
    )
    at = pair * chunks + chunk
    store(d_sums + at * m * dv, d_s, features, m, dv, dv, DV)
    tl.store(d_z + at * m + features, d_zs, mask=features < m)


@triton.jit
def backward_keys(
    k, v, w, d_sums, d_z, top, d_k, d_v, heads, part, n, d, dv, m,
    k_image, k_head, k_row, v_image, v_head, v_row, dk_image, dk_head, dk_row, dv_image, dv_head, dv_row, w_head, w_row,
    k_eps, norm,
    EXP: tl.constexpr, PROJECTED: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, M: tl.constexpr, BLOCK: tl.constexpr,
):
    """The second: slopes of a part of the keys and values."""
    pair, chunk = tl.program_id(0), tl.program_id(1)
    image, head = pair // heads, pair % heads
    k, v = place(k, image, head, k_image, k_head), place(v, image, head, v_image, v_head)
    d_k, d_v = place(d_k, image, head, dk_image, dk_head), place(d_v, image, head, dv_image, dv_head)
    table = load(w + head * w_head, tl.arange(0, D), d, w_row, m, M)
    features, first = tl.arange(0, M), chunk * part
    d_s = load(d_sums + pair * m * dv, features, m, dv, dv, DV)
    d_zs = tl.load(d_z + pair * m + features, mask=features < m, other=0.0)
    key_slopes(
        k, v, d_k, d_v, table, d_s, d_zs, tl.load(top + pair), first, tl.minimum(first + part, n), n, d, dv, m,
        k_row, v_row, dk_row, dv_row, k_eps, norm, EXP, PROJECTED, D, DV, M, BLOCK,
    )
