"""Position encodings. Two seams: `rotate` (rotary.py: rope, circulant) and `log_weights` (general).

Positions are whole patches, r = (y, x). A class token, if there is one, is token 0; it lies outside the
grid: it is not rotated, and the general encoding has scalars of its own for it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Generator, Tensor, nn

from erpe.config import AttentionConfig
from erpe.model.features import Maps
from erpe.model.general_attention import masked_product
from erpe.model.grid import keep_grid
from erpe.model.kernel_abi import Rotation
from erpe.model.low_rank import fourier_product, series
from erpe.model.tiles import window_top
from erpe.model.toeplitz import toeplitz_dense, toeplitz_matmul


class Shape(NamedTuple):
    """What a layer is built for."""

    grid: tuple[int, int]
    """(h, w) patches, row-major."""
    heads: int
    """H."""
    head_dim: int
    """D of q and k."""
    cls: bool = False
    """Token 0 is a class token."""

    @property
    def tokens(self) -> int:
        """N."""
        return self.grid[0] * self.grid[1] + self.cls


class Encoding(nn.Module):
    """No relative position: the identity rotation, no weights. The base of the others."""

    def __init__(self, config: AttentionConfig, shape: Shape, generator: Generator) -> None:
        super().__init__()
        self.shape = shape
        if config.encoding != "none":
            keep_grid(self, shape.grid, shape.cls)

    def rotate(self, *vectors: Tensor) -> tuple[Tensor, ...]:
        """Each (B, H, N, D), turned by the rotation of its token's position."""
        return vectors

    def align(self, q: Tensor, k: Tensor) -> tuple[Tensor, ...]:
        """As `rotate`, but in whatever orthonormal basis is cheapest: enough where only q . k matters."""
        return self.rotate(q, k)

    def frame(self, like: Tensor) -> Tensor | None:
        """The basis of `align`, columns in (D, D), in the dtype and on the device of `like`; None: the usual one."""
        return None

    def rotation(self, like: Tensor) -> tuple[Tensor | None, Rotation | None]:
        """`align` for the kernels: frequencies (2, H, P), and their tables, which are not differentiated; if any."""
        return None, None

    def log_weights(self) -> Tensor | None:
        """(H, N, N), what is added to the logits; None: nothing."""
        return None


class GeneralRPE(Encoding):
    """The most general relative encoding: a learned log-weight of each 2-D offset and head.

        C[i, j] = exp(bias[r_j - r_i]);   logits + bias for softmax, K(q, k) * C for linear attention

    `bias` (H, 2h-1, 2w-1) at [dy + h - 1, dx + w - 1] with (dy, dx) = position of key minus position of query;
    zero at the start, which is no encoding. `cls_bias` (3, H): patch to class token, class token to patch,
    class token to itself.
    Source: Luo et al. 2021 (NeurIPS), equations 6 and 10-13, with two axes as for its ImageNet model.
    """

    def __init__(self, config: AttentionConfig, shape: Shape, generator: Generator) -> None:
        super().__init__(config, shape, generator)
        h, w = shape.grid
        self.rank = config.rank
        self.bias = nn.Parameter(zeros(shape.heads, 2 * h - 1, 2 * w - 1))
        self.cls_bias = nn.Parameter(zeros(3, shape.heads)) if shape.cls else None
        if self.rank:
            series(shape.grid, self.rank, self.bias.dtype, self.bias.device)  # made once, not in the first pass

    def log_weights(self) -> Tensor:
        """(H, N, N) dense."""
        patches = toeplitz_dense(self.bias)                       # (H, hw, hw)
        if self.cls_bias is None:
            return patches
        to_cls, from_cls, own = self.cls_bias[:, :, None, None]   # (H, 1, 1) each
        n = patches.shape[-1]
        first = torch.cat([own, from_cls.expand(-1, 1, n)], dim=2)
        rest = torch.cat([to_cls.expand(-1, n, 1), patches], dim=2)
        return torch.cat([first, rest], dim=1)                    # (H, N, N)

    def mix(self, q: Tensor, k: Tensor, v: Tensor, w: Tensor | None, maps: Maps) -> Tensor:
        """Averages of v over the keys, with weights C (phi_q . phi_k).

        Args:
            q, k: (B, H, N, D), of which `maps` make phi_q and phi_k (B, H, N, m), by projections w (D, m).
            v: (B, H, N, Dv).
        Returns:
            (B, H, N, Dv).
        """
        bias = full_precision(self.bias)
        if self.cls_bias is None and not self.rank:
            return masked_product(q, k, v, bias, None, w, maps)[0]
        highest = bias.flatten(1).amax(1, keepdim=True)           # (H, 1)
        top = (highest.expand(-1, self.shape.grid[0] * self.shape.grid[1]) if self.rank else window_top(bias)).detach()
        phi_q, phi_k = maps.q(q, w), maps.k(k, w)
        if self.cls_bias is None:
            num, den = self.product(phi_q, phi_k, v, bias, top)
            return num / den[..., None]
        to_cls, from_cls, own = full_precision(self.cls_bias)[:, :, None]           # (H, 1) each
        top = torch.maximum(top, to_cls.detach())                 # (H, hw)
        patches = phi_q[:, :, 1:]
        num, den = self.product(patches, phi_k[:, :, 1:], v[:, :, 1:], bias, top)
        a = (patches @ phi_k[:, :, :1].mT) * (to_cls - top).exp()[..., None]     # (B, H, hw, 1)  to the class token
        num, den = num + a * v[:, :, :1], den + a[..., 0]
        c = torch.cat([own, from_cls.expand(-1, top.shape[1])], dim=1)              # (H, N)  from the class token
        a = (phi_q[:, :, :1] @ phi_k.mT) * (c - c.detach().amax(1, keepdim=True)).exp()[:, None]
        return torch.cat([a @ v / a.sum(-1, keepdim=True), num / den[..., None]], dim=2)

    def product(
        self, phi_q: Tensor, phi_k: Tensor, v: Tensor, bias: Tensor, top: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Sums of weighed values, and of weights, over the patches alone; log-weights lose a query's `top` (H, hw)."""
        if self.rank is None:
            y, den = masked_product(phi_q, phi_k, v, bias, top)
            return y * den[..., None], den
        known = series(self.shape.grid, self.rank, bias.dtype, bias.device)
        return fourier_product(phi_q, phi_k, v, (bias - top[:, :1, None]).exp(), known)

    def relative_weights(self) -> tuple[Tensor, Tensor | None]:
        """exp(bias) and exp(cls_bias), each head divided by its largest: a factor that cancels in the quotient."""
        top = self.bias.flatten(1).amax(1)                        # (H,)
        if self.cls_bias is None:
            return (self.bias - top.detach()[:, None, None]).exp(), None
        top = torch.maximum(top, self.cls_bias.amax(0)).detach()
        return (self.bias - top[:, None, None]).exp(), (self.cls_bias - top).exp()

    def weigh(self, x: Tensor) -> Tensor:
        """C x by FFT, never forming C: (B, H, F, N) -> (B, H, F, N)."""
        c, c_cls = (None if table is None else table.to(x.dtype) for table in self.relative_weights())
        assert c is not None
        patches = x[..., 1:] if self.shape.cls else x
        y = toeplitz_matmul(c, patches.unflatten(-1, self.shape.grid)).flatten(-2)
        if c_cls is None:
            return y
        to_cls, from_cls, own = c_cls[:, :, None, None]           # (H, 1, 1) each
        first = x[..., :1]                                        # (B, H, F, 1)
        cls = from_cls * patches.sum(-1, keepdim=True) + own * first
        return torch.cat([cls, y + to_cls * first], dim=-1)


def zeros(*size: int) -> Tensor:
    """Zeros in float32 on the CPU, whatever torch's defaults are."""
    return torch.zeros(size, dtype=torch.float32, device="cpu")


def full_precision(x: Tensor) -> Tensor:
    """At least float32: half precision loses angles and small weights."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
