"""Toeplitz matrices on a 2-D grid: the mask C of the general relative position encoding."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.fft import irfft2, rfft2
from torch.nn.functional import pad

from erpe.errors import ShapeError


class Mask(NamedTuple):
    """Log-weights of pairs of tokens: one for each offset of a key from a query on an (h, w) grid."""

    grid: tuple[int, int]
    """(h, w)."""
    bias: Tensor
    """(H, 2h-1, 2w-1), zero offset in the centre."""
    cls: Tensor | None = None
    """(3, H), where token 0 is a class token: patch to class token, class token to patch, class token to itself."""

    def dense(self) -> Tensor:
        """(H, N, N)."""
        patches = toeplitz_dense(self.bias)                       # (H, hw, hw)
        if self.cls is None:
            return patches
        to_cls, from_cls, own = self.cls[:, :, None, None]        # (H, 1, 1) each
        n = patches.shape[-1]
        first = torch.cat([own, from_cls.expand(-1, 1, n)], dim=2)
        rest = torch.cat([to_cls.expand(-1, n, 1), patches], dim=2)
        return torch.cat([first, rest], dim=1)                    # (H, N, N)


def toeplitz_dense(c: Tensor) -> Tensor:
    """Return the block-Toeplitz matrix of a table of offsets.

        T[i, j] = c[j - i],      i, j on the (h, w) grid, row-major

    Args:
        c: (H, 2h-1, 2w-1), weight of each offset j - i, zero offset in the centre.
    Returns:
        (H, N, N) with N = h w.
    """
    h, w = (c.shape[-2] + 1) // 2, (c.shape[-1] + 1) // 2
    if torch.compiler.is_compiling():  # windows would get a gradient of atomic additions, in no fixed order
        rows = _diagonals(c, w).permute(0, 2, 3, 1)               # (H, x, x', 2h-1)
        return _diagonals(rows, h).permute(0, 3, 1, 4, 2).reshape(-1, h * w, h * w)
    windows = c.unfold(-2, h, 1).unfold(-2, w, 1)                 # (H, h, w, h, w)  starting at the last query
    return windows.flip(-4, -3).reshape(-1, h * w, h * w)         # (H, N, N)


def _diagonals(c: Tensor, n: int) -> Tensor:
    """The Toeplitz matrix of n queries and n keys on a line: (.., 2n-1) -> (.., n, n)."""
    many = c[..., None, :].expand(*c.shape[:-1], n, 2 * n - 1).flatten(-2)
    return pad(many, (0, n)).unflatten(-1, (n, 2 * n))[..., :n].flip(-2)            # each row begins one later


def offset_sums(x: Tensor) -> Tensor:
    """Sum what belongs to one offset: the transpose of `toeplitz_dense`, also of parts of the grid.

    Args:
        x: (H, y, x, y', x'), queries of y whole rows and keys of y'; x = x' = w.
    Returns:
        (H, y + y' - 1, 2w-1), offsets from first key less last query to last key less first query.
    """
    lines = _along_diagonals(x.transpose(2, 3))                   # (H, y, y', 2w-1)
    return _along_diagonals(lines.permute(0, 3, 1, 2)).mT


def _along_diagonals(x: Tensor) -> Tensor:
    """Sums along diagonals: (.., a, b) -> (.., a + b - 1), the lower left corner first."""
    a, b = x.shape[-2:]
    rows = pad(x.flip(-2), (0, a)).flatten(-2)[..., : a * (a + b - 1)]              # each row begins one later
    return rows.unflatten(-1, (a, a + b - 1)).sum(-2)


def toeplitz_matmul(c: Tensor, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
    """Apply that matrix without forming it: a circular correlation on a padded grid, O(N log N).

        y[i] = sum_j c[j - i] x[j],      i, j on the (h, w) grid

    Args:
        c: (H, 2h-1, 2w-1), weight of each offset j - i, zero offset in the centre.
        x: (B, H, F, h, w).
        size: padded grid, at least (2h-1, 2w-1); default: (2h, 2w), which factors better.
    Returns:
        (B, H, F, h, w).
    Raises:
        ShapeError: the offsets of `c` do not span the grid of `x`, or `size` is too small.
    Source: Luo et al. 2021 (NeurIPS), section 3.2, on two axes. Dense twin: `toeplitz_dense`.
    """
    h, w = x.shape[-2:]
    span = (2 * h - 1, 2 * w - 1)
    size = size or (2 * h, 2 * w)
    if c.shape[-2:] != span:
        raise ShapeError(f"a ({h}, {w}) grid has offsets {span}, got {tuple(c.shape[-2:])}")
    if size[0] < span[0] or size[1] < span[1]:
        raise ShapeError(f"offsets {span} do not fit on a circular grid of {size}")
    circular = pad(c, (0, size[1] - span[1], 0, size[0] - span[0]))
    circular = circular.roll((1 - h, 1 - w), dims=(-2, -1))       # (H, *size)  zero offset to index 0
    c_hat = rfft2(circular).conj()[:, None]                       # (H, 1, ..)  conjugate: offsets are j - i, not i - j
    y = irfft2(c_hat * rfft2(x, s=size), s=size)                  # (B, H, F, *size)
    return y[..., :h, :w]                                         # (B, H, F, h, w)
