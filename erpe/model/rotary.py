"""Rotations as position encodings: R(r) turns planes of q and k, so that only the difference of positions matters."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Generator, Tensor, nn

from erpe.config import AttentionConfig
from erpe.model.encoding import Encoding, Shape, zeros
from erpe.model.features import full_precision, wide
from erpe.model.rotation import Rotation


class Rotary(Encoding):
    """R(r) turns plane t of a head by the angle y fy_t + x fx_t, so that R(a)^T R(b) = R(b - a)."""

    rows: Tensor
    columns: Tensor
    folds = False
    """See `Rotation`."""

    def __init__(self, config: AttentionConfig, shape: Shape, generator: Generator) -> None:
        super().__init__(config, shape, generator)
        self.size = config.rotated_size(shape.head_dim)
        for axis, count in zip(("rows", "columns"), shape.grid, strict=True):
            self.register_buffer(axis, torch.arange(count, dtype=torch.float32, device="cpu"), persistent=False)

    def planes(self) -> Tensor:
        """(2, H, P) frequencies in rad per patch along y and x."""
        raise NotImplementedError

    def basis(self, like: Tensor) -> Tensor | None:
        """(D, D) orthogonal, columns are the axes of the planes' coordinates; None: the usual ones."""
        return None

    def rotation(self, like: Tensor) -> Rotation:
        """See `Encoding`."""
        planes, y, x = (each.to(wide(like.dtype)) for each in (self.planes(), self.rows, self.columns))
        return Rotation(planes, y, x, int(self.shape.cls), self.basis(planes), self.folds)

    def rotate(self, *vectors: Tensor) -> tuple[Tensor, ...]:
        """Each (B, H, N, D) turned, computed in float32 at least and given back in its own dtype."""
        return self.rotation(vectors[0]).turn(*vectors)


class Rope(Rotary):
    """2-D RoPE; `frequencies` (2, H, D/2) along y and x: a buffer if axial, learned if mixed.

        axial: theta_t = base^(-4t/D), the first D/4 planes along x, the others along y
        mixed: those magnitudes, at a random angle per head, the second half perpendicular to the first

    Source: Su et al. 2021 (RoFormer), equations 15-16; Heo et al. 2024 (RoPE-ViT) for both 2-D forms.
    """

    frequencies: Tensor

    def __init__(self, config: AttentionConfig, shape: Shape, generator: Generator) -> None:
        super().__init__(config, shape, generator)
        mixed = config.rope == "mixed"
        base = config.rope_base or (10.0 if mixed else 100.0)
        # Axial is mixed at angle zero: the first half along x, the perpendicular half along y.
        angle = random_angles(shape.heads, generator) if mixed else zeros(shape.heads, 1)
        frequencies = planar_frequencies(self.size // 2, base, angle)
        if mixed:
            self.frequencies = nn.Parameter(frequencies)
        else:
            self.register_buffer("frequencies", frequencies)

    def planes(self) -> Tensor:
        """(2, H, D/2) rad per patch."""
        return self.frequencies


def random_angles(heads: int, generator: Generator) -> Tensor:
    """(H, 1) rad, float32 on the CPU."""
    return torch.rand(heads, 1, generator=generator, dtype=torch.float32, device="cpu") * 2 * math.pi


def planar_frequencies(planes: int, base: float, angle: Tensor) -> Tensor:
    """Magnitudes base^(-2t/planes) in direction `angle` for the first half of the planes, perpendicular for the rest.

    Args:
        planes: P; an odd one leaves one plane more to the first half.
        angle: (H, 1) rad; 0 is along x.
    Returns:
        (2, H, P) rad per patch along y and x.
    """
    first = -(-planes // 2)
    t = torch.arange(first, dtype=angle.dtype, device=angle.device)
    magnitude = base ** (-2.0 * t / planes)                       # (P/2,)
    x = torch.cat([magnitude * angle.cos(), -magnitude[: planes - first] * angle.sin()], dim=-1)
    y = torch.cat([magnitude * angle.sin(), magnitude[: planes - first] * angle.cos()], dim=-1)
    return torch.stack([y, x])                                    # (2, H, P)


class CirculantString(Rotary):
    """Circulant-STRING: R(r) = exp(y L_y + x L_x), L = C - C^T with C circulant.

    `coefficients` (2, H, D): first columns c of C for y and x. In the real Fourier basis of the circulants R is
    a rotation of planes by theta = 2 Im fft(c), so it is applied there: one small matrix product in, one out.
    At head sizes that is faster than an FFT, and equal to it. Only the odd part of c matters.
    Source: Schenck et al. 2025 (STRING), definition 3.1 and circulant-STRING. Blocks: `circulant_block`.
    """

    def __init__(self, config: AttentionConfig, shape: Shape, generator: Generator) -> None:
        super().__init__(config, shape, generator)
        self.block = config.circulant_block or self.size
        self.folds = self.block == self.size and self.block % 4 == 0
        self.free = self.size // self.block * (2 - self.block % 2)
        """Channels that no rotation reaches: the mean of a block, and its alternating sum if it is even."""
        self.coefficients = nn.Parameter(zeros(2, shape.heads, self.size))
        if config.circulant_init == "normal":
            self.coefficients.data.normal_(0, 0.02, generator=generator)
        elif shape.device != "meta":
            angle = random_angles(shape.heads, generator)
            planes = planar_frequencies((self.size - self.free) // 2, config.rope_base or 10.0, angle)
            self.coefficients.data = planes @ self.sines(planes).T / (2 * self.block)

    def basis(self, like: Tensor) -> Tensor:
        """Return the Fourier basis."""
        return fourier_basis(self.size, self.block, like.dtype, like.device)

    def planes(self) -> Tensor:
        """(2, H, P) rad per patch: theta = 2 Im fft(c) for the frequencies below half the block size."""
        c = full_precision(self.coefficients)
        return (c[..., None] * self.sines(c)).sum(dim=-2)         # no BLAS, whose threads wake longer than this takes

    def sines(self, like: Tensor) -> Tensor:
        """(D, P), by which coefficients give frequencies, in the dtype and on the device of `like`."""
        return fourier_sines(self.size, self.block, like.dtype, like.device)


def fourier_sines(size: int, block: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """-2 sin f for each block and frequency 0 < f < block/2: 2 Im fft(c) is c times this.

    Returns:
        (D, P), in the order of the planes of `fourier_basis`.
    """
    return _fourier(size, block, dtype, device)[1]


def fourier_basis(size: int, block: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the real Fourier basis of block-circulant matrices, columns normalised.

        columns: cos f, -sin f of each block and frequency 0 < f < block/2, the odd ones first, then the position-free
        ones (1, (-1)^n). Half a block on, an odd frequency has the other sign, an even one the same.

    Returns:
        (D, D) orthogonal: `(x @ basis)[2t], [2t+1]` are Re and Im of sqrt(2/block) fft(x)_f, f that of plane t.
    """
    return _fourier(size, block, dtype, device)[0]


@lru_cache(maxsize=64)
def _fourier(size: int, block: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False):  # a cached inference tensor could not be trained through later
        n = torch.arange(block, dtype=torch.float64, device="cpu")
        below = n[: (block + 1) // 2]
        angle = 2 * math.pi / block * torch.outer(n, torch.cat([below[1::2], below[2::2]]))  # (block, planes)
        pairs = torch.stack([angle.cos(), -angle.sin()], dim=-1).flatten(1) * math.sqrt(2 / block)
        ones, signs = torch.ones_like(n), 1 - 2 * (n % 2)
        free = torch.stack([ones, signs][: 2 - block % 2], dim=1) / math.sqrt(block)
        columns = [torch.block_diag(*[part] * (size // block)) for part in (pairs, free)]
        basis = torch.cat(columns, dim=1).to(dtype).to(device)  # some devices have no float64
        return basis, basis[:, 1 : columns[0].shape[1] : 2] * math.sqrt(2 * block)
