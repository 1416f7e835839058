"""The plain product of linear attention on CPUs, exact, without weights of pairs.

    y_i = phi_q_i S / (phi_q_i . z),   S = sum_j phi_k_j v_j^T,   z = sum_j phi_k_j

`kernels/linear.c` does it for one image and head after the other, in cache, from q, k and v as they lie in memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from erpe.model import compiled
from erpe.model.features import Maps
from erpe.model.structures import Rotation


def linear_product(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor | None,
    maps: Maps,
    planes: Tensor | None = None,
    rotation: Rotation | None = None,
) -> Tensor:
    """Rows divided by their sums; only where `compiled.serves`.

    Args:
        q, k: (B, H, N, D), of which `maps` make features (B, H, N, m).
        v: (B, H, N, Dv).
        w: projections (D, m) for the maps, or (H, D, m), of the coordinates that the rotation has.
        rotation: of q and k; without a gradient of its own, that goes to
        planes: (2, H, P), frequencies along y and x of which it was made.
    Returns:
        (B, H, N, Dv).
    """
    q, k, v = (compiled.plain(x) for x in (q, k, v))
    y, *_ = _LinearProduct.apply(q, k, v, w, maps, planes, *(rotation or [None] * 6))
    return y


def _rotation(parts: Any) -> Rotation | None:
    return None if parts[0] is None else Rotation(*parts)


class _LinearProduct(torch.autograd.Function):
    @staticmethod
    def forward(*inputs: Any) -> Any:  # names would cost a tenth of a millisecond a call: torch binds them
        q, k, v, w, maps, _, *rotation = inputs
        y, made = compiled.linear_forward(q, k, v, w, maps, _rotation(rotation))
        return y, *made

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:4], *inputs[6:10], *output)
        ctx.maps, ctx.rest = inputs[4], inputs[10:]

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        q, k, v, w, *rotation, y, sums, z, den = ctx.saved_tensors
        if gradients[0] is None:
            return (None,) * 12
        known, made = _rotation([*rotation, *ctx.rest]), (sums, z, den)
        d_q, d_k, d_v, d_planes = compiled.linear_backward(q, k, v, w, ctx.maps, known, y, made, gradients[0])
        return d_q, d_k, d_v, None, None, d_planes, *[None] * 6

    @staticmethod
    def vmap(info: Any, in_dims: Any, *inputs: Any) -> Any:
        """Layers side by side are more heads."""
        size = info.batch_size
        q, k, v = more_heads(size, in_dims[:3], inputs[:3])
        w = own_projections(size, in_dims[3], inputs[3], heads=q.shape[1] // size)
        planes, along, *rest = inputs[5:]
        if planes is not None:
            (planes,) = more_heads(size, in_dims[5:6], [planes])
            (along,) = more_heads(size, in_dims[6:7], [along], axis=0)
        y, *made = _LinearProduct.apply(q, k, v, w, inputs[4], planes, along, *rest)
        return (y.unflatten(1, (size, -1)), *made), (1, None, None, None)


def more_heads(layers: int, dims: Any, inputs: Any, axis: int = 1) -> list[Tensor]:
    """Tensors of several layers -> of one with all their heads, which are on the `axis`."""
    folded = []
    for x, dim in zip(inputs, dims, strict=True):
        every = x.movedim(dim, axis) if dim is not None else x.unsqueeze(axis)
        folded.append(every.expand(*every.shape[:axis], layers, *every.shape[axis + 1 :]).flatten(axis, axis + 1))
    return folded


def own_projections(layers: int, dim: int | None, w: Tensor | None, heads: int) -> Tensor | None:
    """Projections (D, m) of several layers -> (layers H, D, m), one for each head of one layer."""
    if w is None or dim is None:
        return w
    return w.movedim(dim, 0)[:, None].expand(-1, heads, -1, -1).flatten(0, 1)
