"""Triton kernels of the plain product of linear attention.

    y_i = phi_q_i S / (phi_q_i . z),   S = sum_j phi_k_j v_j^T,   z = sum_j phi_k_j

Inputs are float32 or half as wide; rotations, features, sums and products are float32. A program has one image and head
and walks over its tokens in blocks: over all of them where there are few, over a part of them where there are many;
then S and z of the parts are added outside. Nothing is added by atomics: the same numbers come out every time.

Queries and keys are turned as they are loaded, in the coordinates of the planes, by a table of cosines and sines; their
gradients are turned back as they are stored, and those of the planes' frequencies are summed on the way.

The precision of each product stands in `erpe.model.kernels`.
"""

# mypy: disallow-untyped-defs=False

from __future__ import annotations

import triton
import triton.language as tl

from erpe.model.kernels.gpu.blocks import load, place, store, turn_of
from erpe.model.kernels.gpu.walks import averages, key_slopes, key_sums, query_slopes, store_planes


@triton.jit
def forward(
    q, k, v, w, table, places, basis, y, sums, z, top, heads, n, d, dv, m, p,
    q_image, q_head, q_row, k_image, k_head, k_row, v_image, v_head, v_row, y_image, y_head, y_row, w_head, w_row,
    q_eps, k_eps, norm, EXP: tl.constexpr, PROJECTED: tl.constexpr, TURN: tl.constexpr, BASIS: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, M: tl.constexpr, BLOCK: tl.constexpr,
):
    """All of an image's head: y, and what a backward pass needs again, S (m, dv), z (m) and the largest exponent."""
    pair = tl.program_id(0)
    image, head = pair // heads, pair % heads
    q, k = place(q, image, head, q_image, q_head, q_row), place(k, image, head, k_image, k_head, k_row)
    v, y = place(v, image, head, v_image, v_head, v_row), place(y, image, head, y_image, y_head, y_row)
    weights, features = load((w + head * w_head, w_row), tl.arange(0, D), d, m, M), tl.arange(0, M)
    turn = turn_of(table, places, basis, head, heads, n, d, p, D, BASIS)
    s, z_rows, values, highest = key_sums(
        k, v, weights, turn, 0, n, n, d, dv, m, k_eps, norm, EXP, PROJECTED, TURN, BASIS, D, DV, M, BLOCK
    )
    if EXP:  # in the place of a pass of its own over the keys
        s += k_eps * tl.where(features < m, 1.0, 0.0)[:, None] * values[None, :]
        z_rows += k_eps * n * tl.where(features < m, 1.0, 0.0)
    store((sums + pair * m * dv, dv), s, features, m, dv, DV)
    tl.store(z + pair * m + features, z_rows, mask=features < m)
    tl.store(top + pair, highest)
    averages(
        q, y, weights, turn, s, z_rows, 0, n, n, d, dv, m, q_eps, EXP, PROJECTED, TURN, BASIS, D, DV, M, BLOCK
    )


@triton.jit
def forward_sums(
    k, v, w, table, places, basis, sums, z, values, top, heads, part, n, d, dv, m, p,
    k_image, k_head, k_row, v_image, v_head, v_row, w_head, w_row, k_eps, norm,
    EXP: tl.constexpr, PROJECTED: tl.constexpr, TURN: tl.constexpr, BASIS: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, M: tl.constexpr, BLOCK: tl.constexpr,
):
    """The first of two passes: what `key_sums` gives of each part of the keys, (pairs, parts, ..)."""
    pair, chunk, chunks = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    image, head = pair // heads, pair % heads
    k = place(k, image, head, k_image, k_head, k_row)
    v = place(v, image, head, v_image, v_head, v_row)
    weights, features = load((w + head * w_head, w_row), tl.arange(0, D), d, m, M), tl.arange(0, M)
    turn = turn_of(table, places, basis, head, heads, n, d, p, D, BASIS)
    first, numbers = chunk * part, tl.arange(0, DV)
    s, z_rows, value_sums, highest = key_sums(
        k, v, weights, turn, first, tl.minimum(first + part, n), n, d, dv, m, k_eps, norm,
        EXP, PROJECTED, TURN, BASIS, D, DV, M, BLOCK,
    )
    at = pair * chunks + chunk
    store((sums + at * m * dv, dv), s, features, m, dv, DV)
    tl.store(z + at * m + features, z_rows, mask=features < m)
    tl.store(values + at * dv + numbers, value_sums, mask=numbers < dv)
    tl.store(top + at, highest)


@triton.jit
def forward_averages(
    q, w, table, places, basis, y, sums, z, heads, part, n, d, dv, m, p, q_image, q_head, q_row, y_image, y_head, y_row,
    w_head, w_row, q_eps, EXP: tl.constexpr, PROJECTED: tl.constexpr, TURN: tl.constexpr, BASIS: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, M: tl.constexpr, BLOCK: tl.constexpr,
):
    """The second: y of a part of the queries."""
    pair, first = tl.program_id(0), tl.program_id(1) * part
    image, head = pair // heads, pair % heads
    q = place(q, image, head, q_image, q_head, q_row)
    y = place(y, image, head, y_image, y_head, y_row)
    weights, features = load((w + head * w_head, w_row), tl.arange(0, D), d, m, M), tl.arange(0, M)
    turn = turn_of(table, places, basis, head, heads, n, d, p, D, BASIS)
    s = load((sums + pair * m * dv, dv), features, m, dv, DV)
    z_rows, last = tl.load(z + pair * m + features, mask=features < m, other=0.0), tl.minimum(first + part, n)
    averages(
        q, y, weights, turn, s, z_rows, first, last, n, d, dv, m, q_eps,
        EXP, PROJECTED, TURN, BASIS, D, DV, M, BLOCK,
    )


@triton.jit
def backward(
    q, k, v, d_y, w, table, places, basis, sums, z, top, d_q, d_k, d_v, d_planes, heads, n, d, dv, m, p,
    q_image, q_head, q_row, k_image, k_head, k_row, v_image, v_head, v_row, dy_image, dy_head, dy_row,
    dq_image, dq_head, dq_row, dk_image, dk_head, dk_row, dv_image, dv_head, dv_row, w_head, w_row, q_eps, k_eps, norm,
    EXP: tl.constexpr, PROJECTED: tl.constexpr, TURN: tl.constexpr, BASIS: tl.constexpr, LEARNS: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, M: tl.constexpr, BLOCK: tl.constexpr,
):
    """All gradients of an image's head."""
    pair = tl.program_id(0)
    image, head = pair // heads, pair % heads
    q, k = place(q, image, head, q_image, q_head, q_row), place(k, image, head, k_image, k_head, k_row)
    v, d_y = place(v, image, head, v_image, v_head, v_row), place(d_y, image, head, dy_image, dy_head, dy_row)
    d_q, d_k = place(d_q, image, head, dq_image, dq_head, dq_row), place(d_k, image, head, dk_image, dk_head, dk_row)
    d_v = place(d_v, image, head, dv_image, dv_head, dv_row)
    weights, features = load((w + head * w_head, w_row), tl.arange(0, D), d, m, M), tl.arange(0, M)
    turn = turn_of(table, places, basis, head, heads, n, d, p, D, BASIS)
    s = load((sums + pair * m * dv, dv), features, m, dv, DV)
    z_rows = tl.load(z + pair * m + features, mask=features < m, other=0.0)
    d_s, d_z, d_fy, d_fx = query_slopes(
        q, d_y, d_q, weights, turn, s, z_rows, 0, n, n, d, dv, m, q_eps,
        EXP, PROJECTED, TURN, BASIS, LEARNS, D, DV, M, BLOCK,
    )
    d_fy, d_fx = key_slopes(
        k, v, d_k, d_v, weights, turn, d_s, d_z, d_fy, d_fx, tl.load(top + pair), 0, n, n, d, dv, m, k_eps, norm,
        EXP, PROJECTED, TURN, BASIS, LEARNS, D, DV, M, BLOCK,
    )
    store_planes(d_planes, pair, d_fy, d_fx, p, D, LEARNS)


@triton.jit
def backward_queries(
    q, d_y, w, table, places, basis, sums, z, d_q, d_sums, d_z, d_planes, heads, part, n, d, dv, m, p,
    q_image, q_head, q_row, dy_image, dy_head, dy_row, dq_image, dq_head, dq_row, w_head, w_row, q_eps,
    EXP: tl.constexpr, PROJECTED: tl.constexpr, TURN: tl.constexpr, BASIS: tl.constexpr, LEARNS: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, M: tl.constexpr, BLOCK: tl.constexpr,
):
    """The first of two passes: gradients of a part of the queries; of S, z and planes by them, (pairs, parts, ..)."""
    pair, chunk, chunks = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    image, head = pair // heads, pair % heads
    q, d_y = place(q, image, head, q_image, q_head, q_row), place(d_y, image, head, dy_image, dy_head, dy_row)
    d_q = place(d_q, image, head, dq_image, dq_head, dq_row)
    weights, features = load((w + head * w_head, w_row), tl.arange(0, D), d, m, M), tl.arange(0, M)
    turn = turn_of(table, places, basis, head, heads, n, d, p, D, BASIS)
    s = load((sums + pair * m * dv, dv), features, m, dv, DV)
    z_rows, first = tl.load(z + pair * m + features, mask=features < m, other=0.0), chunk * part
    d_s, d_zs, d_fy, d_fx = query_slopes(
        q, d_y, d_q, weights, turn, s, z_rows, first, tl.minimum(first + part, n), n, d, dv, m, q_eps,
        EXP, PROJECTED, TURN, BASIS, LEARNS, D, DV, M, BLOCK,
    )
    at = pair * chunks + chunk
    store((d_sums + at * m * dv, dv), d_s, features, m, dv, DV)
    tl.store(d_z + at * m + features, d_zs, mask=features < m)
    store_planes(d_planes, at, d_fy, d_fx, p, D, LEARNS)


@triton.jit
def backward_keys(
    k, v, w, table, places, basis, d_sums, d_z, top, d_k, d_v, d_planes, heads, part, n, d, dv, m, p,
    k_image, k_head, k_row, v_image, v_head, v_row, dk_image, dk_head, dk_row, dv_image, dv_head, dv_row, w_head, w_row,
    k_eps, norm, EXP: tl.constexpr, PROJECTED: tl.constexpr, TURN: tl.constexpr, BASIS: tl.constexpr,
    LEARNS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, M: tl.constexpr, BLOCK: tl.constexpr,
):
    """The second: gradients of a part of the keys and values, and of planes by them."""
    pair, chunk, chunks = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    image, head = pair // heads, pair % heads
    k, v = place(k, image, head, k_image, k_head, k_row), place(v, image, head, v_image, v_head, v_row)
    d_k, d_v = place(d_k, image, head, dk_image, dk_head, dk_row), place(d_v, image, head, dv_image, dv_head, dv_row)
    weights, features = load((w + head * w_head, w_row), tl.arange(0, D), d, m, M), tl.arange(0, M)
    turn = turn_of(table, places, basis, head, heads, n, d, p, D, BASIS)
    d_s = load((d_sums + pair * m * dv, dv), features, m, dv, DV)
    d_zs, none = tl.load(d_z + pair * m + features, mask=features < m, other=0.0), tl.zeros((D // 2,), tl.float32)
    first, at = chunk * part, pair * chunks + chunk
    d_fy, d_fx = key_slopes(
        k, v, d_k, d_v, weights, turn, d_s, d_zs, none, none, tl.load(top + pair), first, tl.minimum(first + part, n),
        n, d, dv, m, k_eps, norm, EXP, PROJECTED, TURN, BASIS, LEARNS, D, DV, M, BLOCK,
    )
    store_planes(d_planes, at, d_fy, d_fx, p, D, LEARNS)
