"""Starts the kernels of linear.py: blocks, parts, strides, and what lies between two passes."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from erpe.model.features import Maps
from erpe.model.kernels.cpu import plain, side_by_side
from erpe.model.kernels.gpu import linear, wide

FEW = 256
"""Up to so many tokens one program walks over all tokens of an image's head."""

BLOCK = 16
"""Tokens that a program takes at once. Four warps of 32 threads do it, eight where D, Dv or m is above 64: no register
is spilled, and up to 32 with m = 64 three programs or more fit on a multiprocessor. The time was never measured."""

PART = 512
"""So many tokens has a part where there are more."""

Made = tuple[Tensor, Tensor, Tensor]
"""S (B, H, m, Dv), z (B, H, m) and the largest exponent of the keys (B, H)."""


class Turn(NamedTuple):
    """How queries and keys are turned, as the kernels take it."""

    table: Tensor | None = None
    """(2, H, N, P) cosines and sines of the planes' angles; None: they are not turned."""
    places: Tensor | None = None
    """(2, N), see `Rotation.places`."""
    basis: Tensor | None = None
    """(D, D), see `Rotation`."""

    def given(self, q: Tensor) -> list[Tensor]:
        """All three; in the place of one that is not there something that is not read."""
        return [q if x is None else x.contiguous() for x in self]


class Sizes(NamedTuple):
    """Numbers of a call that its kernels share."""

    images: int
    heads: int
    n: int
    d: int
    dv: int
    m: int
    p: int
    """Planes that are turned."""

    @property
    def pairs(self) -> int:
        """Images times heads."""
        return self.images * self.heads

    @property
    def parts(self) -> int:
        """Of the tokens."""
        return 1 if self.n <= FEW else -(-self.n // PART)


def sizes_of(q: Tensor, v: Tensor, w: Tensor | None, turn: Turn) -> Sizes:
    """Of q (B, H, N, D), v (B, H, N, Dv) and w (D, m) or (H, D, m)."""
    images, heads, n, d = q.shape
    planes = 0 if turn.table is None else turn.table.shape[-1]
    return Sizes(images, heads, n, d, v.shape[-1], d if w is None else w.shape[-1], planes)


def constants(size: Sizes, w: Tensor | None, maps: Maps, turn: Turn) -> dict[str, Any]:
    """What a kernel is compiled for."""
    return {
        "EXP": maps.k.kind == "exp of key", "PROJECTED": w is not None,
        "TURN": turn.table is not None, "BASIS": turn.basis is not None,
        "D": wide(size.d), "DV": wide(size.dv), "M": wide(size.m), "BLOCK": BLOCK,
        "num_warps": 8 if max(size.d, size.dv, size.m) > 64 else 4,
    }  # fmt: skip


def strides(*tensors: Tensor) -> tuple[int, ...]:
    """Of images, heads and rows, one tensor after the other."""
    return tuple(stride for x in tensors for stride in x.stride()[:3])


def table(w: Tensor | None, q: Tensor) -> tuple[Tensor, int, int]:
    """Projections for the kernels, their stride over heads and over rows; without any, something that is not read."""
    if w is None:
        return q, 0, 0
    w = w.contiguous()
    return w, w.stride(0) if w.ndim == 3 else 0, w.stride(-2)


def forward(q: Tensor, k: Tensor, v: Tensor, w: Tensor | None, maps: Maps, turn: Turn) -> tuple[Tensor, Made]:
    """y (B, H, N, Dv), and what a backward pass needs again.

    Args:
        q, k: (B, H, N, D), of which, turned, `maps` make features (B, H, N, m).
        v: (B, H, N, Dv).
        w: projections (D, m) for the maps, or (H, D, m); default: m is D.
    """
    q, k, v = (plain(x) for x in (q, k, v))
    size = sizes_of(q, v, w, turn)
    fixed, (weights, *steps), tables = constants(size, w, maps, turn), table(w, q), turn.given(q)
    shape, eps, pairs = size[2:], (maps.q.eps, maps.k.eps), (size.images, size.heads, size.parts)
    y, room = side_by_side(v), dict[str, Any](dtype=torch.float32, device=q.device)
    sums = torch.empty(*pairs, size.m, size.dv, **room)
    z, top = torch.empty(*pairs, size.m, **room), torch.empty(pairs, **room)
    if size.n <= FEW:
        linear.forward[(size.pairs,)](
            q, k, v, weights, *tables, y, sums, z, top, size.heads, *shape, *strides(q, k, v, y), *steps, *eps,
            maps.k.norm, **fixed,
        )  # fmt: skip
        return y, (sums[:, :, 0], z[:, :, 0], top[:, :, 0])
    values, grid = torch.empty(*pairs, size.dv, **room), (size.pairs, size.parts)
    linear.forward_sums[grid](
        k, v, weights, *tables, sums, z, values, top, size.heads, PART, *shape, *strides(k, v), *steps, eps[1],
        maps.k.norm, **fixed,
    )  # fmt: skip
    made = added(sums, z, values, top, size.n, maps)
    linear.forward_averages[grid](
        q, weights, *tables, y, *made[:2], size.heads, PART, *shape, *strides(q, y), *steps, eps[0], **fixed
    )
    return y, made


def added(sums: Tensor, z: Tensor, values: Tensor, top: Tensor, n: int, maps: Maps) -> Made:
    """S, z and the largest exponent of all parts together."""
    if maps.k.kind != "exp of key":
        return sums.sum(2), z.sum(2), top[:, :, 0].contiguous()
    highest = top.amax(2)                                         # (B, H)
    factor = (top - highest[..., None]).exp()                     # (B, H, parts)
    sums = (sums * factor[..., None, None]).sum(2) + maps.k.eps * values.sum(2)[:, :, None]
    return sums, (z * factor[..., None]).sum(2) + maps.k.eps * n, highest


def backward(
    q: Tensor, k: Tensor, v: Tensor, w: Tensor | None, maps: Maps, turn: Turn, learns: bool, made: Made, d_y: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, shaped as they are, and of the planes (2, H, P), if those learn, else (2, H, 0); the
    arguments as for `forward`, d_y (B, H, N, Dv)."""
    q, k, v, d_y = (plain(x) for x in (q, k, v, d_y))
    sums, z, top = (x.contiguous() for x in made)
    size = sizes_of(q, v, w, turn)
    fixed, (weights, *steps), tables = constants(size, w, maps, turn), table(w, q), turn.given(q)
    fixed, shape, eps = fixed | {"LEARNS": learns}, size[2:], (maps.q.eps, maps.k.eps)
    d_q, d_k, d_v = (side_by_side(x) for x in (q, k, v))
    passes = 1 if size.n <= FEW else 2
    planes = sums.new_empty(passes, size.images, size.heads, size.parts, 2, size.p if learns else 0)
    if size.n <= FEW:
        linear.backward[(size.pairs,)](
            q, k, v, d_y, weights, *tables, sums, z, top, d_q, d_k, d_v, planes, size.heads, *shape,
            *strides(q, k, v, d_y, d_q, d_k, d_v), *steps, *eps, maps.k.norm, **fixed,
        )  # fmt: skip
    else:
        grid = (size.pairs, size.parts)
        d_sums, d_z = (x.new_empty(*x.shape[:2], size.parts, *x.shape[2:]) for x in (sums, z))
        linear.backward_queries[grid](
            q, d_y, weights, *tables, sums, z, d_q, d_sums, d_z, planes[0], size.heads, PART, *shape,
            *strides(q, d_y, d_q), *steps, eps[0], **fixed,
        )  # fmt: skip
        linear.backward_keys[grid](
            k, v, weights, *tables, d_sums.sum(2), d_z.sum(2), top, d_k, d_v, planes[1], size.heads, PART, *shape,
            *strides(k, v, d_k, d_v), *steps, eps[1], maps.k.norm, **fixed,
        )  # fmt: skip
    return d_q, d_k, d_v, planes.sum((0, 1, 3)).transpose(0, 1).contiguous()
