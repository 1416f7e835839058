"""What the kernels take, as `kernels/*.h` and `*.c` declare it, and how tensors become that."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from erpe.model.features import KINDS, Maps
from erpe.model.rotation import Rotation


def _longs(names: str) -> list[tuple[str, Any]]:
    return [(name, ctypes.c_long) for name in names.split()]


def _pointers(names: str) -> list[tuple[str, Any]]:
    return [(name, ctypes.c_void_p) for name in names.split()]


class CTurn(ctypes.Structure):
    """`Turn` of product.h."""

    _fields_ = [*_longs("outside h w folded"), *_pointers("along basis basis_t y x")]


class CMap(ctypes.Structure):
    """`Map` of product.h."""

    _fields_ = [
        ("kind", ctypes.c_int), ("eps", ctypes.c_float), ("norm", ctypes.c_float),
        *_longs("size w_head w_t_head"), *_pointers("w w_t"), ("turn", CTurn),
    ]  # fmt: skip


class CMasked(ctypes.Structure):
    """`Masked` of masked.c."""

    _fields_ = [*_longs("images heads h w m dv"), ("q", CMap), ("k", CMap)]


class CLinear(ctypes.Structure):
    """`Linear` of linear.c."""

    _fields_ = [*_longs("images heads n m dv"), ("q", CMap), ("k", CMap)]


class CView(ctypes.Structure):
    """`View` of product.h."""

    _fields_ = [("at", ctypes.c_void_p), *_longs("image head row")]


class Turn(NamedTuple):
    """All of a `Rotation` but its frequencies, which may learn: what is not differentiated."""

    basis: Tensor | None
    y: Tensor
    x: Tensor
    outside: int
    folds: bool
    learns: bool = False
    """Whether gradients of the frequencies are wanted: known to the backward pass alone, for vmap hides it before."""

    @classmethod
    def of(cls, rotation: Rotation) -> Turn:
        """Take a rotation apart: all but its planes."""
        _, y, x, outside, basis, folds = rotation
        return cls(basis, y, x, outside, folds)

    def rotation(self, planes: Tensor, like: Tensor) -> Rotation:
        """Return the whole rotation again."""
        return Rotation(planes, self.y, self.x, self.outside, self.basis, self.folds)


def whole(n: int) -> int:
    """As in product.h."""
    return -(-n // 16) * 16


def _widened(x: Tensor) -> Tensor:
    """(.., n) -> (.., whole n), zeros behind."""
    missing = whole(x.shape[-1]) - x.shape[-1]
    return (pad(x, (0, missing)) if missing else x).contiguous()


class Projections(NamedTuple):
    """w (G, D, whole m) for one head or each; for a backward pass its transpose (G, m, whole D); m."""

    w: Tensor
    w_t: Tensor | None
    m: int


def projections(w: Tensor | None, back: bool) -> Projections | None:
    """Of w (D, m), or (H, D, m)."""
    if w is None:
        return None
    wide = _widened(w if w.ndim == 3 else w[None])
    return Projections(wide, _widened(wide[..., : w.shape[-1]].mT) if back else None, w.shape[-1])


class Tables(NamedTuple):
    """A rotation as the kernels take it: real (H, h + w, whole D), the basis (D, whole D) and its transpose; y and x
    where gradients of angles are wanted."""

    along: Tensor
    basis: Tensor | None
    basis_t: Tensor | None
    y: Tensor | None
    x: Tensor | None
    h: int
    w: int
    folded: bool


def tables(along: Tensor | None, turn: Turn | None, d: int) -> Tables | None:
    """Of a rotation of vectors of size D."""
    if along is None or turn is None:
        return None
    missing = whole(d) // 2 - along.shape[-1]
    phases = (pad(along, (0, missing), value=1.0) if missing else along).contiguous()
    wide, turned = (None, None) if turn.basis is None else (_widened(turn.basis), _widened(turn.basis.T))
    y, x = (turn.y, turn.x) if turn.learns else (None, None)
    folded = turn.folds and d % (2 * whole(1)) == 0               # halves as wide as a column of results, or twice that
    return Tables(torch.view_as_real(phases), wide, turned, y, x, len(turn.y), len(turn.x), folded)


def _pointers_to(tensors: Iterable[Tensor | None]) -> list[int]:
    return [0 if x is None else x.data_ptr() for x in tensors]


def _maps(q: Tensor, w: Projections | None, maps: Maps, turn: Tables | None = None) -> list[CMap]:
    places: list[int] = [0, 0, 0, 0]
    if w:
        heads = [x.stride(0) if x is not None and len(x) > 1 else 0 for x in w[:2]]
        places = [*heads, *_pointers_to(w[:2])]
    turned = CTurn()
    if turn:
        turned = CTurn(q.shape[2] - turn.h * turn.w, turn.h, turn.w, turn.folded, *_pointers_to(turn[:-3]))
    return [CMap(KINDS.index(each.kind), each.eps, each.norm, q.shape[-1], *places, turned) for each in maps]


def masked_sizes(q: Tensor, v: Tensor, c: Tensor, w: Projections | None, maps: Maps) -> CMasked:
    """For `masked_forward` and `masked_backward`."""
    h, columns = ((side + 1) // 2 for side in c.shape[1:])
    return CMasked(*q.shape[:2], h, columns, w.m if w else q.shape[-1], v.shape[-1], *_maps(q, w, maps))


def linear_sizes(q: Tensor, v: Tensor, w: Projections | None, maps: Maps, turn: Tables | None) -> CLinear:
    """For `linear_forward` and `linear_backward`."""
    return CLinear(*q.shape[:3], w.m if w else q.shape[-1], v.shape[-1], *_maps(q, w, maps, turn))
