"""The kernels in C from Python: built when erpe is installed, where there is a C compiler.

Without it, and on other devices and types, torch's operators do the same (linear.py, masked.py).
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from erpe._upstream import openmp_of_torch, operators_are_watched
from erpe.model.features import Maps
from erpe.model.kernels.abi import CLinear, CMasked, CView, Turn, linear_sizes, masked_sizes, projections, tables, whole


def load(paths: Iterable[Path]) -> ctypes.CDLL | None:
    """Return the first library that is one of ours, if there is one; it wants the OpenMP that torch brought along."""
    for openmp in openmp_of_torch():
        ctypes.CDLL(str(openmp), mode=ctypes.RTLD_GLOBAL)
    for path in paths:
        try:
            library = ctypes.CDLL(str(path))
            for name, size in {"masked": CMasked, "linear": CLinear}.items():
                for way in ("forward", "backward"):
                    function = getattr(library, f"{name}_{way}_room")
                    function.argtypes, function.restype = [size, ctypes.c_int], ctypes.c_long
        except (OSError, AttributeError):  # of another machine, or cut short
            continue
        return library
    return None


LIBRARY = load(sorted(Path(__file__).parents[1].glob("_kernels*.so")))


def serves(*inputs: Tensor) -> bool:
    """Whether the library takes these: not where tools watch torch's operators, as those that count FLOPs do."""
    watched = torch.jit.is_tracing() or torch.compiler.is_compiling() or operators_are_watched()
    if LIBRARY is None or watched:
        return False
    return all(x.device.type == "cpu" and x.dtype == torch.float32 for x in inputs)


def in_memory(*tensors: Tensor) -> bool:
    """Whether these have numbers of their own: not the stand-ins of `torch.func`."""
    try:
        return all(x.data_ptr() or not x.numel() for x in tensors)
    except RuntimeError:
        return False


def masked_forward(
    q: Tensor, k: Tensor, v: Tensor, c: Tensor, factor: Tensor | None, w: Tensor | None, maps: Maps
) -> tuple[Tensor, Tensor]:
    """Averages y (B, H, N, Dv) of the masked product, and their denominators (B, H, N).

    Args:
        q, k: (B, H, N, D), of which `maps` make features (B, H, N, m).
        v: (B, H, N, Dv).
        c: (H, 2h-1, 2w-1), weight of each offset of key minus query.
        factor: (H, N), by which a query's denominator is multiplied; default: one.
        w: projections (D, m) for the maps, or (H, D, m); default: m is D.
    """
    q, k, v = (plain(x) for x in (q, k, v))
    y, den, weights = side_by_side(v), v.new_empty(v.shape[:3]), projections(w, back=False)
    size = masked_sizes(q, v, c, weights, maps)
    _call("masked_forward", size, q, k, v, c.contiguous(), factor, y, den)
    return y, den


def masked_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    c: Tensor,
    factor: Tensor | None,
    w: Tensor | None,
    maps: Maps,
    made: tuple[Tensor, Tensor],
    d_y: Tensor,
    d_den: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, shaped as they are, and of log c (H, 2h-1, 2w-1); the rest as for `masked_forward`.

    Args:
        made: what `masked_forward` returned.
        d_y, d_den: gradients of both; default: zeros.
    """
    q, k, v = (plain(x) for x in (q, k, v))
    d_q, d_k, d_v = (side_by_side(x) for x in (q, k, v))
    d_log_c = v.new_zeros(*v.shape[:2], c.shape[1] * c.shape[2])
    weights = projections(w, back=True)
    size = masked_sizes(q, v, c, weights, maps)
    d_den = d_den if d_den is None else d_den.contiguous()
    _call("masked_backward", size, q, k, v, c.contiguous(), factor, *made, plain(d_y), d_den, d_q, d_k, d_v, d_log_c)
    return d_q, d_k, d_v, d_log_c.sum(0).view(c.shape)


Made = tuple[Tensor, Tensor, Tensor]
"""What a backward pass needs again: S (B H, .., ..), z (B H, ..) and denominators (B H, N)."""


def linear_forward(
    q: Tensor, k: Tensor, v: Tensor, w: Tensor | None, maps: Maps, along: Tensor | None, turn: Turn | None
) -> tuple[Tensor, Made]:
    """y_i = phi_q_i S / (phi_q_i . z), S = sum_j phi_k_j v_j^T, z = sum_j phi_k_j.

    Args:
        q, k: (B, H, N, D), of which `maps` make features (B, H, N, m).
        v: (B, H, N, Dv).
        w: projections (D, m) of the rotation's coordinates for the maps, or (H, D, m); default: m is D.
        along: see `Rotation.along`; with
        turn: the rest of a rotation of q and k.
    Returns:
        y (B, H, N, Dv).
    """
    q, k, v = (plain(x) for x in (q, k, v))
    weights, rotation = projections(w, back=False), tables(along, turn, q.shape[-1])
    size = linear_sizes(q, v, weights, maps, rotation)
    m, dv, pairs = whole(size.m), whole(size.dv), size.images * size.heads
    y, made = side_by_side(v), (v.new_empty(pairs, m, dv), v.new_empty(pairs, m), v.new_empty(pairs, size.n))
    _call("linear_forward", size, q, k, v, y, *made)
    return y, made


def linear_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor | None,
    maps: Maps,
    along: Tensor | None,
    turn: Turn | None,
    y: Tensor,
    made: Made,
    d_y: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of q, k and v, shaped as they are, and of the frequencies (2, H, P), where they are wanted.

    Args:
        y, made: what `linear_forward` returned.
        d_y: gradients of y (B, H, N, Dv).
    """
    q, k, v = (plain(x) for x in (q, k, v))
    d_q, d_k, d_v = (side_by_side(x) for x in (q, k, v))
    weights, rotation = projections(w, back=True), tables(along, turn, q.shape[-1])
    size, d_angles = linear_sizes(q, v, weights, maps, rotation), _angles(turn, q)
    _call("linear_backward", size, q, k, v, y, plain(d_y), *made, d_q, d_k, d_v, d_angles)
    return d_q, d_k, d_v, None if along is None or turn is None else _of_planes(along, turn, d_angles)


def _angles(turn: Turn | None, x: Tensor) -> Tensor:
    """Room for gradients of angles times places: (B, H, 2, planes, 2), or nothing."""
    wanted = turn is not None and turn.learns
    return x.new_empty((*x.shape[:2], 2, whole(x.shape[-1]) // 2, 2) if wanted else 0)


def _of_planes(along: Tensor, turn: Turn, d_angles: Tensor) -> Tensor | None:
    """Those of the frequencies (2, H, P): for each plane, the second less the first."""
    if not turn.learns:
        return None
    first, second = d_angles.sum(0)[:, :, : along.shape[-1]].unbind(-1)
    return (second - first).transpose(0, 1)


def plain(x: Tensor) -> Tensor:
    """With a last stride of 1, as the kernels want it."""
    return x if x.stride(-1) == 1 else x.contiguous()


def side_by_side(like: Tensor) -> Tensor:
    """(B, H, N, D) of which a token's heads lie together, as the layers around want it."""
    images, heads, n, d = like.shape
    return like.new_empty(images, n, heads, d).transpose(1, 2)


def _call(function: str, size: CMasked | CLinear, *arrays: Tensor | None) -> None:
    """Arrays of four axes go with their strides, others are contiguous."""
    assert LIBRARY
    threads = torch.get_num_threads()
    room = torch.empty(getattr(LIBRARY, f"{function}_room")(size, threads), dtype=torch.float32, device="cpu")
    getattr(LIBRARY, function)(size, threads, *(_place(x) for x in (*arrays, room)))


def _place(x: Tensor | None) -> Any:
    if x is None:
        return None
    return CView(x.data_ptr(), *x.stride()[:3]) if x.ndim == 4 else ctypes.c_void_p(x.data_ptr())
