"""A general encoding of linear cost: its weights as a truncated Fourier series, a sum of separable terms.

    C[i, j] = c(j - i) = a_0 + sum_f a_f cos(f . (j - i)) + b_f sin(f . (j - i))

cos and sin of a difference are products of those of i and of j, so with `terms` of them the layer is linear attention
with `terms` times the features: O(N terms m D). The series is over the torus of all offsets, its lowest frequencies
first; with as many terms as there are offsets it is exact. Between, it may be off, and is negative in places.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

LEAST = 1e-3
"""Of what the mean weight alone gives, a denominator has at least so much: a truncated series can cross zero."""


class Series(NamedTuple):
    """What depends on the grid alone, R terms: 1, then cosines, then sines."""

    analysis: Tensor
    """(offsets, R): weights of the offsets, row-major, times this are a_0, a_f, b_f."""
    of_query: Tensor
    """(N, R): 1, cos(f . position), sin(f . position)."""


def terms_used(terms: int, grid: tuple[int, int]) -> int:
    """R: an odd number, since a frequency has a cosine and a sine; not more than there are offsets."""
    offsets = (2 * grid[0] - 1) * (2 * grid[1] - 1)
    return min(terms - 1 + terms % 2, offsets)


def series(grid: tuple[int, int], terms: int, dtype: torch.dtype, device: torch.device) -> Series:
    """Return the first `terms_used` terms of a grid's series, made once."""
    return Series(*_series(grid, terms, dtype, device))


@lru_cache(maxsize=16)
def _series(grid: tuple[int, int], terms: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    h, w = grid
    pairs = (terms_used(terms, grid) - 1) // 2
    with torch.inference_mode(False):  # a cached inference tensor could not be trained through later
        waves = [(fy / (2 * h - 1), fx / (2 * w - 1)) for fy in range(h) for fx in range(1 - w, w) if (fy, fx) > (0, 0)]
        waves.sort(key=lambda wave: (math.hypot(*wave), wave))
        frequency = 2 * math.pi * torch.tensor(waves[:pairs], dtype=torch.float64, device="cpu").view(-1, 2)  # (F, 2)
        offsets = _places(range(1 - h, h), range(1 - w, w)) @ frequency.T                     # (offsets, F)
        angle = _places(range(h), range(w)) @ frequency.T         # (N, F)
        weights = torch.cat([offsets.new_ones(len(offsets), 1), 2 * offsets.cos(), 2 * offsets.sin()], dim=1)
        of_query = torch.cat([angle.new_ones(h * w, 1), angle.cos(), angle.sin()], dim=1)
        return (weights / len(offsets)).to(dtype).to(device), of_query.to(dtype).to(device)


def _places(rows: range, columns: range) -> Tensor:
    sides = (torch.tensor(each, dtype=torch.float64, device="cpu") for each in (rows, columns))
    return torch.cartesian_prod(*sides).view(-1, 2)


def fourier_product(phi_q: Tensor, phi_k: Tensor, v: Tensor, c: Tensor, known: Series) -> tuple[Tensor, Tensor]:
    """Numerators and denominators over a grid of (h, w) tokens, row-major.

    Args:
        phi_q, phi_k: (B, H, N, m).
        v: (B, H, N, Dv).
        c: (H, 2h-1, 2w-1), weight of each offset of key minus query, zero offset in the centre.
        known: of this grid, as many terms as there should be.
    Returns:
        num (B, H, N, Dv), den (B, H, N).
    """
    analysis, of_query = known
    pairs = (analysis.shape[1] - 1) // 2
    found = c.flatten(1) @ analysis                               # (H, R)
    a0, a, b = found[:, None, :1], found[:, None, 1 : 1 + pairs], found[:, None, 1 + pairs :]
    cosines, sines = of_query[:, 1 : 1 + pairs], of_query[:, 1 + pairs :]                     # (N, F)
    mean = a0.expand(-1, len(of_query), -1)
    of_key = torch.cat([mean, a * cosines + b * sines, a * sines - b * cosines], dim=-1)      # (H, N, R)
    many_q = (phi_q[..., None, :] * of_query[..., None]).flatten(-2)                          # (B, H, N, R m)
    many_k = (phi_k[..., None, :] * of_key[..., None]).flatten(-2)
    den = (many_q * many_k.sum(dim=-2, keepdim=True)).sum(dim=-1)
    least = LEAST * a0[..., 0] * (phi_q * phi_k.sum(dim=-2, keepdim=True)).sum(dim=-1)
    return many_q @ (many_k.mT @ v), torch.maximum(den, least)
