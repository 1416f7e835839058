"""The plain product of linear attention, exact, without weights of pairs.

    y_i = phi_q_i S / (phi_q_i . z),   S = sum_j phi_k_j v_j^T,   z = sum_j phi_k_j

On CPUs `linear.c` does it for one image and head after the other, in cache, from q, k and v as they lie in memory.
Elsewhere torch's operators do.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from erpe.model.features import FeatureMap, Maps
from erpe.model.kernels import cpu
from erpe.model.kernels.abi import Turn
from erpe.model.kernels.functions import again, bound, more_heads, own_projections, repeated, slopes
from erpe.model.rotation import Rotation


def by_torch(
    q: Tensor, k: Tensor, v: Tensor, phi: FeatureMap, rotation: Rotation | None = None, after: bool = False
) -> Tensor:
    """`linear_attention` by torch's operators."""
    if rotation is not None and not after:
        (q, k), phi = rotation.align(q, k), phi.of(rotation.basis)
    phi_q, phi_k = phi(q, k)                                      # (B, H, N, m)
    den = (phi_q * phi_k.sum(dim=-2, keepdim=True)).sum(dim=-1, keepdim=True)       # (B, H, N, 1)
    if rotation is not None and after:  # signed weights above, the positive unrotated sum below
        phi_q, phi_k = rotation.turn(phi_q, phi_k)
    return phi_q @ (phi_k.mT @ v) / den


def compiled(q: Tensor, k: Tensor, v: Tensor, phi: FeatureMap, rotation: Rotation | None) -> Tensor:
    """`linear_attention` in C; only where `cpu.serves`."""
    planes, along, turn = None, None, None
    if rotation is not None:
        planes, turn = rotation.planes, Turn.of(rotation)
        along = rotation._replace(planes=planes.detach()).along()
        phi = phi.of(rotation.basis) if phi.w is not None else phi
    y, *_ = _Linear.apply(q, k, v, phi.w, phi.maps, planes, along, turn)
    return y


class _Linear(torch.autograd.Function):
    """q, k, v, w, maps, planes, along, turn -> y, and what the backward pass needs again."""

    @staticmethod
    @bound
    def forward(
        q: Tensor, k: Tensor, v: Tensor, w: Tensor | None, maps: Maps,
        planes: Tensor | None, along: Tensor | None, turn: Turn | None,
    ) -> Any:  # fmt: skip
        y, made = cpu.linear_forward(q, k, v, w, maps, along, turn)
        return y, *made

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        q, k, v, w, ctx.maps, planes, along, ctx.turn = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, w, planes, along, *output)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        q, k, v, w, planes, along, y, *made = ctx.saved_tensors
        if gradients[0] is None:
            return (None,) * 8
        turn = ctx.turn and ctx.turn._replace(learns=ctx.needs_input_grad[5])
        inputs = q, k, v, w, ctx.maps, planes, along, turn, y, *made, gradients[0]
        d_q, d_k, d_v, d_planes = slopes(_LinearSlopes, inputs, q, k, v, gradients[0])
        return d_q, d_k, d_v, None, None, d_planes, None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *inputs: Any) -> Any:
        y, *made = _Linear.apply(*_folded(info.batch_size, in_dims, *inputs))
        return (y.unflatten(1, (info.batch_size, -1)), *made), (1, None, None, None)


class _LinearSlopes(torch.autograd.Function):
    """Gradients of the product, which have gradients of their own, by torch's operators."""

    @staticmethod
    @bound
    def forward(
        q: Tensor, k: Tensor, v: Tensor, w: Tensor | None, maps: Maps,
        planes: Tensor | None, along: Tensor | None, turn: Turn | None,
        y: Tensor, sums: Tensor, z: Tensor, den: Tensor, d_y: Tensor,
    ) -> Any:  # fmt: skip
        return cpu.linear_backward(q, k, v, w, maps, along, turn, y, (sums, z, den), d_y)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        q, k, v, w, ctx.maps, planes, _, ctx.turn, *_, d_y = inputs
        ctx.save_for_backward(q, k, v, w, planes, d_y)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        q, k, v, w, planes, d_y = ctx.saved_tensors
        turn = ctx.turn
        learn = [q, k, v] if gradients[3] is None else [q, k, v, planes]

        def product(q: Tensor, k: Tensor, v: Tensor, own: Tensor | None = planes) -> tuple[Tensor]:
            rotation = None if turn is None or own is None else turn.rotation(own, q)
            if rotation is not None and w is not None:  # which is of the planes' coordinates already
                (q, k), rotation = rotation.align(q, k), None
            return (by_torch(q, k, v, FeatureMap(ctx.maps, w), rotation),)

        *found, d_d_y = again(product, learn, [d_y], gradients[: len(learn)])
        d_planes = found[3] if len(found) > 3 else None
        return *found[:3], None, None, d_planes, *[None] * 6, d_d_y

    @staticmethod
    def vmap(
        info: Any, in_dims: Any, q: Tensor, k: Tensor, v: Tensor, w: Tensor | None, maps: Maps,
        planes: Tensor | None, along: Tensor | None, turn: Turn | None,
        y: Tensor, sums: Tensor, z: Tensor, den: Tensor, d_y: Tensor,
    ) -> Any:  # fmt: skip
        size, made, (*dims, of_y, _, _, _, of_d_y) = info.batch_size, [sums, z, den], in_dims
        y, d_y = more_heads(size, (of_y, of_d_y), (y, d_y))
        if not any(isinstance(dim, int) for dim in (*dims[:7], *(dims[7] or ()))):  # the product was of one layer
            made = [repeated(size, x, len(y)) for x in made]
        folded = _folded(size, dims, q, k, v, w, maps, planes, along, turn)
        d_q, d_k, d_v, d_planes = _LinearSlopes.apply(*folded, y, *made, d_y)
        found = [x.unflatten(1, (size, -1)) for x in (d_q, d_k, d_v)]
        return (*found, d_planes if d_planes is None else d_planes.unflatten(1, (size, -1))), (1, 1, 1, 1)


def _folded(
    layers: int, dims: Any, q: Tensor, k: Tensor, v: Tensor, w: Tensor | None, maps: Maps,
    planes: Tensor | None, along: Tensor | None, turn: Turn | None,
) -> list[Any]:  # fmt: skip
    """Return the inputs of `_Linear`, of several layers -> of one."""
    q, k, v = more_heads(layers, dims[:3], (q, k, v))
    w = own_projections(layers, dims[3], w, heads=q.shape[1] // layers)
    if planes is not None:
        (planes,) = more_heads(layers, dims[5:6], [planes])
        (along,) = more_heads(layers, dims[6:7], [along], axis=0)
    if turn is not None:  # all layers have the places of one grid
        turn = turn._replace(**{axis: getattr(turn, axis).select(dim, 0) for axis, dim in places(dims[7]).items()})
    return [q, k, v, w, maps, planes, along, turn]


def places(dims: Turn) -> dict[str, int]:
    """Of what vmap says of a `Turn`: which of its axes y and x it maps, and where."""
    return {axis: dim for axis in ("y", "x") if (dim := getattr(dims, axis)) is not None}
