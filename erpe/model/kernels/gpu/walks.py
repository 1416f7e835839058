"""What a program of linear.py does on its way over the tokens of an image's head, from `first` to before `last`."""

# mypy: disallow-untyped-defs=False

from __future__ import annotations

import triton
import triton.language as tl

from erpe.model.kernels.gpu.blocks import (
    angles,
    key_exponents,
    key_features,
    load,
    placed,
    plane_slopes,
    product,
    query_features,
    store,
    unplaced,
)


@triton.jit
def key_sums(
    k, v, w, turn, first, last, n, d, dv, m, eps, norm, EXP: tl.constexpr, PROJECTED: tl.constexpr, TURN: tl.constexpr,
    BASIS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, M: tl.constexpr, BLOCK: tl.constexpr,
):
    """S (M, DV) and z (M) over the keys, and the largest exponent; for the exponential map without eps, and the sum of
    the values (DV) for it."""
    sums, z = tl.zeros((M, DV), tl.float32), tl.zeros((M,), tl.float32)
    values, top = tl.zeros((DV,), tl.float32), tl.full((), float("-inf"), tl.float32)
    for begin in range(first, last, BLOCK):
        rows = begin + tl.arange(0, BLOCK)
        cos, sin = angles(turn, rows, n, D, TURN)
        x, v_rows = placed(load(k, rows, n, d, D), turn, cos, sin, BLOCK, D, TURN, BASIS), load(v, rows, n, dv, DV)
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
    q, y, w, turn, sums, z, first, last, n, d, dv, m, eps, EXP: tl.constexpr, PROJECTED: tl.constexpr,
    TURN: tl.constexpr, BASIS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, M: tl.constexpr, BLOCK: tl.constexpr,
):
    """y of the queries."""
    for begin in range(first, last, BLOCK):
        rows = begin + tl.arange(0, BLOCK)
        cos, sin = angles(turn, rows, n, D, TURN)
        x = placed(load(q, rows, n, d, D), turn, cos, sin, BLOCK, D, TURN, BASIS)
        phi, _ = query_features(x, w, m, eps, EXP, PROJECTED, M)
        num = product(phi, sums)
        store(y, num / tl.sum(phi * z[None, :], axis=1)[:, None], rows, n, dv, DV)


@triton.jit
def query_slopes(
    q, d_y, d_q, w, turn, sums, z, first, last, n, d, dv, m, eps, EXP: tl.constexpr, PROJECTED: tl.constexpr,
    TURN: tl.constexpr, BASIS: tl.constexpr, LEARNS: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, M: tl.constexpr, BLOCK: tl.constexpr,
):
    """Gradients of the queries; returns those of S (M, DV), z (M) and the planes (D / 2) twice by these queries."""
    d_sums, d_z = tl.zeros((M, DV), tl.float32), tl.zeros((M,), tl.float32)
    d_fy, d_fx = tl.zeros((D // 2,), tl.float32), tl.zeros((D // 2,), tl.float32)
    for begin in range(first, last, BLOCK):
        rows = begin + tl.arange(0, BLOCK)
        cos, sin = angles(turn, rows, n, D, TURN)
        x = placed(load(q, rows, n, d, D), turn, cos, sin, BLOCK, D, TURN, BASIS)
        phi, slope = query_features(x, w, m, eps, EXP, PROJECTED, M)
        d_rows = load(d_y, rows, n, dv, DV)
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
        if LEARNS:
            more_y, more_x = plane_slopes(x, d_x, turn, rows, n, BLOCK, D)
            d_fy, d_fx = d_fy + more_y, d_fx + more_x
        store(d_q, unplaced(d_x, turn, cos, sin, BLOCK, D, TURN, BASIS), rows, n, d, D)
    return d_sums, d_z, d_fy, d_fx


@triton.jit
def key_slopes(
    k, v, d_k, d_v, w, turn, d_sums, d_z, d_fy, d_fx, top, first, last, n, d, dv, m, eps, norm,
    EXP: tl.constexpr, PROJECTED: tl.constexpr, TURN: tl.constexpr, BASIS: tl.constexpr, LEARNS: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, M: tl.constexpr, BLOCK: tl.constexpr,
):
    """Gradients of keys and values; returns those of the planes, added to what is given."""
    for begin in range(first, last, BLOCK):
        rows = begin + tl.arange(0, BLOCK)
        cos, sin = angles(turn, rows, n, D, TURN)
        x, v_rows = placed(load(k, rows, n, d, D), turn, cos, sin, BLOCK, D, TURN, BASIS), load(v, rows, n, dv, DV)
        phi, slope = key_features(x, w, rows, n, m, top, eps, norm, EXP, PROJECTED, M)
        store(d_v, product(phi, d_sums), rows, n, dv, DV)
        d_phi = product(v_rows, tl.trans(d_sums)) + d_z[None, :]
        d_y = d_phi * slope
        d_x = d_y
        if PROJECTED:
            d_x = product(d_y, tl.trans(w))
        if EXP:
            d_x -= 2.0 * norm * tl.sum(d_y, axis=1)[:, None] * x
        if LEARNS:
            more_y, more_x = plane_slopes(x, d_x, turn, rows, n, BLOCK, D)
            d_fy, d_fx = d_fy + more_y, d_fx + more_x
        store(d_k, unplaced(d_x, turn, cos, sin, BLOCK, D, TURN, BASIS), rows, n, d, D)
    return d_fy, d_fx


@triton.jit
def store_planes(d_planes, at, d_fy, d_fx, p, D: tl.constexpr, LEARNS: tl.constexpr):
    """Gradients of the planes of the program `at`: (programs, 2, p)."""
    if LEARNS:
        t = tl.arange(0, D // 2)
        tl.store(d_planes + 2 * at * p + t, d_fy, mask=t < p)
        tl.store(d_planes + (2 * at + 1) * p + t, d_fx, mask=t < p)
