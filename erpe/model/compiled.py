"""`kernels/` from Python: built when erpe is installed, where there is a C compiler.

Without it, and on other devices and types, torch's operators do the same (masked.py, attention.py).
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from erpe.model.features import AS_THEY_ARE, KINDS, Maps


def _longs(names: str) -> list[tuple[str, Any]]:
    return [(name, ctypes.c_long) for name in names.split()]


def _pointers(names: str) -> list[tuple[str, Any]]:
    return [(name, ctypes.c_void_p) for name in names.split()]


class _Turn(ctypes.Structure):
    _fields_ = [*_longs("outside h w"), *_pointers("along_y along_x basis basis_t y x")]


class _Map(ctypes.Structure):
    _fields_ = [
        ("kind", ctypes.c_int), ("eps", ctypes.c_float), ("norm", ctypes.c_float),
        *_longs("size w_head w_t_head"), *_pointers("w w_t"), ("turn", _Turn),
    ]  # fmt: skip


class _Masked(ctypes.Structure):
    _fields_ = [*_longs("images heads h w m dv"), ("q", _Map), ("k", _Map)]


class _Linear(ctypes.Structure):
    _fields_ = [*_longs("images heads n m dv"), ("q", _Map), ("k", _Map)]


class _Rotated(ctypes.Structure):
    _fields_ = [*_longs("images heads n"), ("x", _Map)]


class _View(ctypes.Structure):
    _fields_ = [("at", ctypes.c_void_p), *_longs("image head row")]


def _load() -> ctypes.CDLL | None:
    """The library beside this file; None: it was not built. It wants the OpenMP that torch brought along."""
    for openmp in (Path(torch.__file__).parent / "lib").glob("libgomp*"):
        ctypes.CDLL(str(openmp), mode=ctypes.RTLD_GLOBAL)
    for path in sorted(Path(__file__).parent.glob("_kernels*.so")):
        try:
            library = ctypes.CDLL(str(path))
            for name, size in {"masked": _Masked, "linear": _Linear, "rotation": _Rotated}.items():
                for way in ("forward", "backward"):
                    function = getattr(library, f"{name}_{way}_room")
                    function.argtypes, function.restype = [size, ctypes.c_int], ctypes.c_long
        except (OSError, AttributeError):  # of another machine, or cut short
            continue
        return library
    return None


LIBRARY = _load()


def serves(*inputs: Tensor) -> bool:
    """Whether the library takes these: not where tools watch torch's operators, as those that count FLOPs do."""
    watched = torch.jit.is_tracing() or torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack()
    if LIBRARY is None or watched:
        return False
    return all(x.device.type == "cpu" and x.dtype == torch.float32 for x in inputs)


def masked_forward(
    q: Tensor, k: Tensor, v: Tensor, c: Tensor, factor: Tensor, w: Tensor | None, maps: Maps
) -> tuple[Tensor, Tensor]:
    """Averages y (B, H, N, Dv) of the masked product, and their denominators (B, H, N).

    Args:
        q, k: (B, H, N, D), of which `maps` make features (B, H, N, m); the last stride is 1, as everywhere here.
        v: (B, H, N, Dv).
        c: (H, 2h-1, 2w-1), weight of each offset of key minus query.
        factor: (H, N), by which a query's denominator is multiplied.
        w: projections (D, m) for the maps, or (H, D, m); none: m is D.
    """
    y, den, weights = _side_by_side(v), v.new_empty(v.shape[:3]), _projections(w)
    size = _masked_size(q, v, c, weights, maps)
    _call("masked_forward", size, q, k, v, c.contiguous(), factor.contiguous(), y, den)
    return y, den


def masked_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    c: Tensor,
    factor: Tensor,
    w: Tensor | None,
    maps: Maps,
    made: tuple[Tensor, Tensor],
    d_y: Tensor,
    d_den: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, shaped as they are, and of log c (H, 2h-1, 2w-1); the rest as for `masked_forward`.

    Args:
        made: what `masked_forward` returned.
        d_y, d_den: slopes of both; none: zeros.
    """
    d_q, d_k, d_v = (_side_by_side(x) for x in (q, k, v))
    d_log_c = v.new_zeros(*v.shape[:2], c.shape[1] * c.shape[2])
    tables, weights = (c.contiguous(), factor.contiguous()), _projections(w)
    size = _masked_size(q, v, c, weights, maps)
    d_den = d_den if d_den is None else d_den.contiguous()
    _call("masked_backward", size, q, k, v, *tables, *made, plain(d_y), d_den, d_q, d_k, d_v, d_log_c)
    return d_q, d_k, d_v, d_log_c.sum(0).view(c.shape)


Made = tuple[Tensor, Tensor, Tensor]
"""What a backward pass needs again: S (B H, .., ..), z (B H, ..) and denominators (B H, N)."""


class Rotation(NamedTuple):
    """What turns queries and keys before the maps, by their places in a grid of h rows and w columns."""

    along_y: Tensor
    """(H, h, P) complex, by which a plane of two coordinates is turned in each row; further ones stay."""
    along_x: Tensor
    """(H, w, P) complex, in each column."""
    basis: Tensor | None
    """(D, D) orthogonal, columns are the axes of the coordinates; none: the usual ones."""
    y: Tensor | None
    """(h), where the rows are, if slopes of the planes' frequencies are wanted."""
    x: Tensor | None
    """(w), where the columns are."""


def linear_forward(
    q: Tensor, k: Tensor, v: Tensor, w: Tensor | None, maps: Maps, rotation: Rotation | None
) -> tuple[Tensor, Made]:
    """y_i = phi_q_i S / (phi_q_i . z), S = sum_j phi_k_j v_j^T, z = sum_j phi_k_j.

    Args:
        q, k: (B, H, N, D), of which `maps` make features (B, H, N, m).
        v: (B, H, N, Dv).
        w: projections (D, m) for the maps, or (H, D, m); none: m is D.
        rotation: of q and k.
    Returns:
        y (B, H, N, Dv).
    """
    weights, turning = _projections(w), _turning(rotation, q.shape[-1])
    size = _linear_size(q, v, weights, maps, turning)
    m, dv, pairs = _whole(size.m), _whole(size.dv), size.images * size.heads
    y, made = _side_by_side(v), (v.new_empty(pairs, m, dv), v.new_empty(pairs, m), v.new_empty(pairs, size.n))
    _call("linear_forward", size, q, k, v, y, *made)
    return y, made


def linear_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor | None,
    maps: Maps,
    rotation: Rotation | None,
    y: Tensor,
    made: Made,
    d_y: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of q, k and v, shaped as they are, and of the frequencies (2, H, P), where slopes of them are wanted.

    Args:
        y, made: what `linear_forward` returned.
        d_y: slopes of y (B, H, N, Dv).
    """
    d_q, d_k, d_v = (_side_by_side(x) for x in (q, k, v))
    weights, turning = _projections(w), _turning(rotation, q.shape[-1])
    size, d_angles = _linear_size(q, v, weights, maps, turning), _angles(rotation, q)
    _call("linear_backward", size, q, k, v, y, plain(d_y), *made, d_q, d_k, d_v, d_angles)
    return d_q, d_k, d_v, _of_planes(rotation, d_angles)


def rotation_forward(x: Tensor, rotation: Rotation) -> Tensor:
    """x (B, H, N, D), turned and left in the basis of the rotation."""
    y, turning = _side_by_side(x), _turning(rotation, x.shape[-1])
    _call("rotation_forward", _Rotated(*x.shape[:3], _maps(x, None, AS_THEY_ARE, turning)[0]), x, y)
    return y


def rotation_backward(rotation: Rotation, y: Tensor, d_y: Tensor) -> tuple[Tensor, Tensor | None]:
    """Gradients of x, shaped as it is, and of the frequencies (2, H, P), where slopes of them are wanted.

    Args:
        y: what `rotation_forward` returned.
        d_y: slopes of y (B, H, N, D).
    """
    d_x, d_angles, turning = _side_by_side(y), _angles(rotation, y), _turning(rotation, y.shape[-1])
    size = _Rotated(*y.shape[:3], _maps(y, None, AS_THEY_ARE, turning)[0])
    _call("rotation_backward", size, y, plain(d_y), d_x, d_angles)
    return d_x, _of_planes(rotation, d_angles)


def _angles(rotation: Rotation | None, x: Tensor) -> Tensor:
    """Room for slopes of angles times places: (B, H, 2, planes, 2), or nothing."""
    wanted = rotation is not None and rotation.y is not None
    return x.new_empty((*x.shape[:2], 2, _whole(x.shape[-1]) // 2, 2) if wanted else 0)


def _of_planes(rotation: Rotation | None, d_angles: Tensor) -> Tensor | None:
    """Those of the frequencies (2, H, P): for each plane, the second less the first."""
    if rotation is None or rotation.y is None:
        return None
    first, second = d_angles.sum(0)[:, :, : rotation.along_y.shape[-1]].unbind(-1)
    return (second - first).transpose(0, 1)


def plain(x: Tensor) -> Tensor:
    """With a last stride of 1, as the kernels want it."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _side_by_side(like: Tensor) -> Tensor:
    """(B, H, N, D) of which a token's heads lie together, as the layers around want it."""
    images, heads, n, d = like.shape
    return like.new_empty(images, n, heads, d).transpose(1, 2)


def _whole(n: int) -> int:
    """As in product.h."""
    return -(-n // 16) * 16


class _Projections(NamedTuple):
    """w (G, D, whole m) and its transpose (G, whole m, whole D) for one head or each; m."""

    w: Tensor
    w_t: Tensor
    m: int


def _projections(w: Tensor | None) -> _Projections | None:
    if w is None:
        return None
    w = w if w.ndim == 3 else w[None]
    d, m = w.shape[1:]
    wide = pad(w, (0, _whole(m) - m)).contiguous()
    return _Projections(wide, pad(wide, (0, 0, 0, _whole(d) - d)).mT.contiguous(), m)


class _Turning(NamedTuple):
    """A rotation as the kernels take it: real (H, h, whole D) and (H, w, whole D), the basis twice as (D, whole D)."""

    along_y: Tensor
    along_x: Tensor
    basis: Tensor | None
    basis_t: Tensor | None
    y: Tensor | None
    x: Tensor | None


def _turning(rotation: Rotation | None, d: int) -> _Turning | None:
    if rotation is None:
        return None
    along_y, along_x, basis, y, x = rotation
    more = _whole(d) // 2 - along_y.shape[-1]
    phases = [torch.view_as_real(pad(each, (0, more), value=1.0).contiguous()) for each in (along_y, along_x)]
    bases = () if basis is None else (basis, basis.T)
    wide, turned = [pad(each, (0, _whole(d) - d)).contiguous() for each in bases] or (None, None)
    return _Turning(phases[0], phases[1], wide, turned, y, x)


def _maps(q: Tensor, w: _Projections | None, maps: Maps, turning: _Turning | None = None) -> list[_Map]:
    places: list[int] = [0, 0, 0, 0]
    if w:
        heads = [x.stride(0) if len(x) > 1 else 0 for x in w[:2]]
        places = [*heads, w.w.data_ptr(), w.w_t.data_ptr()]
    turn = _Turn()
    if turning:
        h, columns = turning.along_y.shape[1], turning.along_x.shape[1]
        tables = (0 if table is None else table.data_ptr() for table in turning)
        turn = _Turn(q.shape[2] - h * columns, h, columns, *tables)
    return [_Map(KINDS.index(each.kind), each.eps, each.norm, q.shape[-1], *places, turn) for each in maps]


def _masked_size(q: Tensor, v: Tensor, c: Tensor, w: _Projections | None, maps: Maps) -> _Masked:
    h, w_ = ((side + 1) // 2 for side in c.shape[1:])
    return _Masked(*q.shape[:2], h, w_, w.m if w else q.shape[-1], v.shape[-1], *_maps(q, w, maps))


def _linear_size(q: Tensor, v: Tensor, w: _Projections | None, maps: Maps, turning: _Turning | None) -> _Linear:
    return _Linear(*q.shape[:3], w.m if w else q.shape[-1], v.shape[-1], *_maps(q, w, maps, turning))


def _call(function: str, size: _Masked | _Linear | _Rotated, *arrays: Tensor | None) -> None:
    """Arrays of four axes go with their strides, others are contiguous."""
    assert LIBRARY
    threads = torch.get_num_threads()
    room = torch.empty(getattr(LIBRARY, f"{function}_room")(size, threads))
    getattr(LIBRARY, function)(size, threads, *(_place(x) for x in (*arrays, room)))


def _place(x: Tensor | None) -> Any:
    if x is None:
        return None
    return _View(x.data_ptr(), *x.stride()[:3]) if x.ndim == 4 else ctypes.c_void_p(x.data_ptr())
