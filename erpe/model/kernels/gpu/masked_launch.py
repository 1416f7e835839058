"""Starts the kernels of masked.py."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from erpe.model.kernels.gpu import masked, wide
from erpe.model.toeplitz import offset_sums

BLOCK, SMALL, WARPS = 32, 16, 4
"""Queries, and keys, of a tile, of one where gradients of pairs are added over images, or where Dv or m is above 64,
and the warps that a program has, twice as many where both is so: no register is spilled. Never timed."""

ENTRIES = 2**28
"""So many pairs at most have gradients of their log-weights in memory at once."""

PROGRAMS = 1024
"""About so many programs add gradients of log-weights: images are split into parts until there are that many."""


def forward(phi_q: Tensor, phi_k: Tensor, v: Tensor, bias: Tensor, top: Tensor) -> tuple[Tensor, Tensor]:
    """Numerators (B, H, N, Dv) and denominators (B, H, N) in float32; arguments as for `tiles.tiled_product`."""
    given = [x.contiguous() for x in (phi_q, phi_k, v, bias, top)]
    num = torch.empty(v.shape, dtype=torch.float32, device=v.device)
    den, shape = num.new_empty(v.shape[:3]), sizes(phi_q, v, bias)
    masked.forward[blocks(phi_q, v)](*given, num, den, *shape, **constants(phi_q, v))
    return num, den


def backward(
    phi_q: Tensor, phi_k: Tensor, v: Tensor, bias: Tensor, top: Tensor, d_num: Tensor, d_den: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of phi_q, phi_k, v and bias."""
    given = phi_q, phi_k, v, bias, top, d_num, d_den = [
        x.contiguous() for x in (phi_q, phi_k, v, bias, top, d_num, d_den)
    ]
    d_q, d_k, d_v = torch.empty_like(phi_q), torch.empty_like(phi_k), torch.empty_like(v)
    shape, fixed = sizes(phi_q, v, bias), constants(phi_q, v)
    masked.query_slopes[blocks(phi_q, v)](*given[1:], d_q, *shape, **fixed)
    masked.key_slopes[blocks(phi_q, v)](*given, d_k, d_v, *shape, **fixed)
    return d_q, d_k, d_v, bias_slopes(given, shape, fixed)


def bias_slopes(given: list[Tensor], shape: tuple[int, ...], fixed: dict[str, Any]) -> Tensor:
    """Those of the log-weights (H, 2h-1, 2w-1): over images in the kernel, over pairs of one offset here."""
    images, (heads, n, h, w, *_) = len(given[0]), shape
    total = torch.zeros_like(given[3])
    tiles = -(-n // SMALL)
    rows = min(h, max(1, ENTRIES // (heads * n * w)))             # of the grid, at once
    for first in range(0, h, rows):
        some = min(rows, h - first)
        grid = -(-some * w // SMALL) * tiles
        part = -(-images // min(images, -(-PROGRAMS // (grid * heads))))
        parts = -(-images // part)
        d_log_c = total.new_empty(parts, heads, some * w, n)
        masked.pair_slopes[(grid, heads, parts)](
            *given, d_log_c, images, heads, part, first * w, some * w, *shape[1:],
            **fixed | {"BLOCK": SMALL, "num_warps": WARPS * (1 + (max(fixed["M"], fixed["DV"]) > 64))},
        )  # fmt: skip
        pairs = d_log_c.sum(0).unflatten(2, (h, w)).unflatten(1, (some, w))  # (H, some, w, h, w)
        start = h - first - some
        total[:, start : start + some + h - 1] += offset_sums(pairs)
    return total


def sizes(phi_q: Tensor, v: Tensor, bias: Tensor) -> tuple[int, ...]:
    """heads, n, h, w, m, dv."""
    h, w = ((side + 1) // 2 for side in bias.shape[1:])
    return phi_q.shape[1], phi_q.shape[2], h, w, phi_q.shape[3], v.shape[3]


def block_of(phi_q: Tensor, v: Tensor) -> int:
    """Tokens of a tile."""
    return min(wide(phi_q.shape[2]), BLOCK if max(phi_q.shape[3], v.shape[3]) <= 64 else SMALL)


def blocks(phi_q: Tensor, v: Tensor) -> tuple[int, int]:
    """A program for each block of tokens of each image's head."""
    return phi_q.shape[0] * phi_q.shape[1], -(-phi_q.shape[2] // block_of(phi_q, v))


def constants(phi_q: Tensor, v: Tensor) -> dict[str, Any]:
    """What the kernels are compiled for."""
    return {"M": wide(phi_q.shape[3]), "DV": wide(v.shape[3]), "BLOCK": block_of(phi_q, v), "num_warps": WARPS}
