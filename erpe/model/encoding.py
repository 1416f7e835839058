"""Position encodings. Two seams: `rotate` (rotary.py: rope, circulant) and `log_weights` (general).

Positions are whole patches, r = (y, x). A class token, if there is one, is token 0; it lies outside the
grid: it is not rotated, and the general encoding has scalars of its own for it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Generator, Tensor, nn

from erpe.config import AttentionConfig
from erpe.model.features import full_precision
from erpe.model.grid import keep_grid
from erpe.model.kernels.low_rank import series
from erpe.model.rotation import Rotation
from erpe.model.toeplitz import Mask


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
    device: str = "cpu"
    """Where it is made; on `meta` it has shapes, and nothing is drawn."""

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

    def turn(self, *vectors: Tensor) -> tuple[Tensor, ...]:
        """`rotate` as one who wrote it expects: in float32 at least, without autocast, given back in its own dtype."""
        if type(self).rotate is Encoding.rotate:
            return vectors
        with torch.autocast(vectors[0].device.type, enabled=False):
            turned = self.rotate(*(full_precision(x) for x in vectors))
        return tuple(x.to(before.dtype) for x, before in zip(turned, vectors, strict=True))

    def rotation(self, like: Tensor) -> Rotation | None:
        """Return what `rotate` does, in the precision and on the device of `like`; None: nothing."""
        return None

    def mask(self) -> Mask | None:
        """Log-weights of the offsets of keys from queries, in float32 at least; None: all are zero."""
        return None

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
        self.bias = nn.Parameter(zeros(shape.heads, 2 * h - 1, 2 * w - 1))
        self.cls_bias = nn.Parameter(zeros(3, shape.heads)) if shape.cls else None
        if config.rank:
            series(shape.grid, config.rank, self.bias.dtype, self.bias.device)  # made once, not in the first pass

    def mask(self) -> Mask:
        """See `Encoding`."""
        cls = None if self.cls_bias is None else full_precision(self.cls_bias)
        return Mask(self.shape.grid, full_precision(self.bias), cls)

    def log_weights(self) -> Tensor:
        """(H, N, N) dense."""
        return Mask(self.shape.grid, self.bias, self.cls_bias).dense()


def zeros(*size: int) -> Tensor:
    """Zeros in float32 on the CPU, whatever torch's defaults are."""
    return torch.zeros(size, dtype=torch.float32, device="cpu")
