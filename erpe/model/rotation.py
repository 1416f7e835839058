"""A rotation of vectors by the places of their tokens, as layers hand it to whatever computes attention."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad


class Rotation(NamedTuple):
    """Turns plane t of a head by the angle y fy_t + x fx_t, where a token is at row y and column x of a grid.

    R(a)^T R(b) = R(b - a): products of turned vectors depend on differences of places alone.
    """

    planes: Tensor
    """(2, H, P) frequencies along y and x, in rad per patch, float32 at least; 2 P <= D, further coordinates stay."""
    y: Tensor
    """(h), where the rows are."""
    x: Tensor
    """(w), where the columns are."""
    outside: int = 0
    """Tokens before those of the grid: they are not turned."""
    basis: Tensor | None = None
    """(D, D) orthogonal, columns are the axes of the planes' coordinates; None: the usual ones."""
    folds: bool = False
    """Whether the basis has its first half of rows as the second, with the other sign in the first half of columns."""

    def turn(self, *vectors: Tensor) -> tuple[Tensor, ...]:
        """Turn each (B, H, N, D); computed in the precision of `planes`, given back in its own."""
        return self._each(vectors, back=True)

    def align(self, *vectors: Tensor) -> tuple[Tensor, ...]:
        """Turn each, and leave it in the coordinates of the planes: half of the products, enough where q . k counts."""
        return self._each(vectors, back=False)

    def _each(self, vectors: tuple[Tensor, ...], back: bool) -> tuple[Tensor, ...]:
        with torch.autocast(vectors[0].device.type, enabled=False):
            # CPUs are quickest with complex numbers, which compilers and some GPUs do not know.
            if vectors[0].is_cpu and not torch.compiler.is_compiling():
                phase = self._phase()
                turned = [turn_complex(self._coordinates(x), phase) for x in vectors]
            else:
                angle = self._angle()
                turned = [turn_real(self._coordinates(x), angle.cos(), angle.sin()) for x in vectors]
            if back and self.basis is not None:
                turned = [x @ self.basis.T for x in turned]
            return tuple(x.to(before.dtype) for x, before in zip(turned, vectors, strict=True))

    def _coordinates(self, x: Tensor) -> Tensor:
        x = x.to(self.planes.dtype)
        return x if self.basis is None else x @ self.basis

    def along(self) -> Tensor:
        """(H, h + w, P) complex e^(i angle) of each row, then of each column."""
        steps = (self.y[:, None], self.x[:, None])
        angle = torch.cat([each * f for each, f in zip(steps, self.planes[:, :, None], strict=True)], dim=1)
        return torch.polar(torch.ones_like(angle), angle)

    def places(self) -> Tensor:
        """(2, N), row and column of each token; zero outside the grid."""
        h, w = len(self.y), len(self.x)
        grid = torch.stack([self.y[:, None].expand(h, w), self.x.expand(h, w)]).flatten(1)
        return pad(grid, (self.outside, 0))

    def table(self) -> Tensor:
        """(2, H, N, P) cosines and sines of the angles; no gradients go through it."""
        angle = self._replace(planes=self.planes.detach())._angle()
        return torch.stack([angle.cos(), angle.sin()])

    def _phase(self) -> Tensor:
        """(H, N, P) complex e^(i angle)."""
        # e^(i (y fy + x fx)) is a product: few cosines for many tokens
        along, h = self.along(), len(self.y)
        phase = (along[:, :h, None] * along[:, None, h:]).flatten(1, 2)             # (H, hw, P)
        return pad(phase, (0, 0, self.outside, 0), value=1.0) if self.outside else phase      # R(0) = I

    def _angle(self) -> Tensor:
        """(H, N, P) in rad."""
        return angles(self.planes, self.places())


def angles(planes: Tensor, places: Tensor) -> Tensor:
    """(H, N, P) in rad: of planes (2, H, P) at places (2, N)."""
    (fy, fx), (y, x) = planes[:, :, None], places[:, None, :, None]                 # (H, 1, P) and (1, N, 1) each
    return y * fy + x * fx


def turn_complex(x: Tensor, phase: Tensor) -> Tensor:
    """Turn adjacent channel pairs (2t, 2t+1) by the angles of `phase`; further channels stay.

    Args:
        x: (B, H, N, D).
        phase: (H, N, P) complex of modulus one, 2 P <= D.
    Returns:
        (B, H, N, D).
    Source: Su et al. 2021 (RoFormer), equation 34, as one complex product.
    """
    free = x.shape[-1] - 2 * phase.shape[-1]
    if free % 2:
        return torch.cat([turn_complex(x[..., :-1], phase), x[..., -1:]], dim=-1)
    phase = pad(phase, (0, free // 2), value=1.0)                 # one pass over all channels
    pairs = x.unflatten(-1, (-1, 2)).contiguous()
    pairs = pairs.clone() if pairs.storage_offset() % 2 else pairs                  # no complex number begins there
    return torch.view_as_real(torch.view_as_complex(pairs) * phase).flatten(-2)


def turn_real(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`turn_complex` in real numbers: cosines and sines of the angles, (H, N, P) each."""
    turned = 2 * cos.shape[-1]
    first, second = x[..., :turned].unflatten(-1, (-1, 2)).unbind(-1)
    pairs = torch.stack([first * cos - second * sin, first * sin + second * cos], dim=-1).flatten(-2)
    return pairs if turned == x.shape[-1] else torch.cat([pairs, x[..., turned:]], dim=-1)
