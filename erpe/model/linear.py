"""The plain product of linear attention on CPUs, exact, without weights of pairs.

    y_i = phi_q_i S / (phi_q_i . z),   S = sum_j phi_k_j v_j^T,   z = sum_j phi_k_j

`kernels/linear.c` does it for one image and head after the other, in cache, from q, k and v as they lie in memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from erpe.model import cpu_kernels
from erpe.model.features import Maps
from erpe.model.kernel_abi import Rotation


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
    y, *_ = _LinearProduct.apply(q, k, v, w, maps, planes, *(rotation or [None] * 6))
    return y


def _rotation(parts: Any) -> Rotation | None:
    return None if parts[0] is None else Rotation(*parts)


class _LinearProduct(torch.autograd.Function):
    @staticmethod
    def forward(*inputs: Any) -> Any:  # names would cost a tenth of a millisecond a call: torch binds them
        q, k, v, w, maps, _, *rotation = inputs
        y, made = cpu_kernels.linear_forward(q, k, v, w, maps, _rotation(rotation))
        return y, *made

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:4], *inputs[5:10], *output)
        ctx.maps, ctx.rest = inputs[4], inputs[10:]

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        q, k, v, w, *rotation, y, sums, z, den = ctx.saved_tensors
        if gradients[0] is None:
            return (None,) * 12
        inputs = q, k, v, w, ctx.maps, *rotation, *ctx.rest
        inputs = *inputs, y, sums, z, den, gradients[0]
        d_q, d_k, d_v, d_planes = slopes(_LinearSlopes, inputs, q, k, v, gradients[0])
        return d_q, d_k, d_v, None, None, d_planes, *[None] * 6

    @staticmethod
    def vmap(info: Any, in_dims: Any, *inputs: Any) -> Any:
        """Layers side by side are more heads."""
        y, *made = _LinearProduct.apply(*_side_by_side(info.batch_size, in_dims, inputs))
        return (y.unflatten(1, (info.batch_size, -1)), *made), (1, None, None, None)


class _LinearSlopes(torch.autograd.Function):
    """Gradients of the product, which have gradients of their own, by torch's operators."""

    @staticmethod
    def forward(*inputs: Any) -> Any:
        q, k, v, w, maps, _, *rotation, y, sums, z, den, d_y = inputs
        return cpu_kernels.linear_backward(q, k, v, w, maps, _rotation(rotation), y, (sums, z, den), d_y)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs[:4], *inputs[5:10], inputs[-1])
        ctx.maps, ctx.rest = inputs[4], inputs[10:12]

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        q, k, v, w, planes, *tables, d_y = ctx.saved_tensors
        rotation = _rotation([*tables, *ctx.rest])
        learn = [q, k, v] if gradients[3] is None else [q, k, v, planes]

        def product(*x: Tensor) -> tuple[Tensor]:
            return (by_torch(x[0], x[1], x[2], w, ctx.maps, x[3] if len(x) > 3 else planes, rotation),)

        *found, d_d_y = again(product, learn, [d_y], gradients[: len(learn)])
        d_planes = found[3] if len(found) > 3 else None
        return *found[:3], None, None, d_planes, *[None] * 10, d_d_y

    @staticmethod
    def vmap(info: Any, in_dims: Any, *inputs: Any) -> Any:
        """Layers side by side are more heads."""
        size, (*made, d_y) = info.batch_size, inputs[13:]
        y, d_y = more_heads(size, (in_dims[12], in_dims[16]), (inputs[12], d_y))
        if not any(isinstance(dim, int) for dim in in_dims[:12]):  # the product itself was of one layer
            made = [repeated(size, x, len(y)) for x in made]
        d_q, d_k, d_v, d_planes = _LinearSlopes.apply(*_side_by_side(size, in_dims, inputs[:12]), y, *made, d_y)
        found = [x.unflatten(1, (size, -1)) for x in (d_q, d_k, d_v)]
        return (*found, d_planes if d_planes is None else d_planes.unflatten(1, (size, -1))), (1, 1, 1, 1)


def by_torch(
    q: Tensor, k: Tensor, v: Tensor, w: Tensor | None, maps: Maps, planes: Tensor | None, rotation: Rotation | None
) -> Tensor:
    """`linear_product` by torch's operators."""
    if rotation is not None and planes is not None:
        q, k = (_turned(x, w, planes, rotation) for x in (q, k))
    phi_q, phi_k = maps.q(q, w), maps.k(k, w)
    return phi_q @ (phi_k.mT @ v) / (phi_q * phi_k.sum(dim=-2, keepdim=True)).sum(dim=-1, keepdim=True)


def _turned(x: Tensor, w: Tensor | None, planes: Tensor, rotation: Rotation) -> Tensor:
    """(B, H, N, D) in the coordinates of the rotation if there are projections w of them, else in the usual ones."""
    basis, angles = rotation.basis, planes[:, :, None]            # (2, H, 1, P)
    along_y, along_x = (each[:, None] * angle for each, angle in zip((rotation.y, rotation.x), angles, strict=True))
    angle = (along_y[:, :, None] + along_x[:, None]).flatten(1, 2)                  # (H, h w, P)
    outside, free = x.shape[2] - angle.shape[1], x.shape[3] - 2 * angle.shape[2]
    angle = pad(angle, (0, 0, outside, 0))                        # (H, N, P)
    x = x if basis is None else x @ basis
    pairs, rest = x.split([x.shape[3] - free, free], dim=-1)
    first, second = pairs.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = angle.cos(), angle.sin()
    turned = torch.stack([first * cos - second * sin, first * sin + second * cos], dim=-1).flatten(-2)
    x = torch.cat([turned, rest], dim=-1)
    return x if basis is None or w is not None else x @ basis.T


def slopes(function: type[torch.autograd.Function], inputs: Any, *tensors: Tensor) -> Any:
    """`function.apply`; where nobody will ask for gradients of gradients, without what that costs."""
    plain = not torch.is_grad_enabled() and cpu_kernels.in_memory(*tensors)
    return (function.forward if plain else function.apply)(*inputs)


def again(f: Callable[..., Any], inputs: Any, d_outputs: Any, slopes: Any) -> tuple[Tensor, ...]:
    """Gradients of gradients.

    Args:
        f: of the inputs, gives a tuple of outputs by operators that torch can differentiate twice.
        d_outputs: slopes of the outputs, which gave gradients of the inputs.
        slopes: of those gradients.
    Returns:
        Slopes of the inputs, and of `d_outputs`.
    """
    def gradients(*given: Tensor) -> Any:
        return torch.func.vjp(f, *given[: len(inputs)])[1](given[len(inputs) :])

    found: tuple[Tensor, ...] = torch.func.vjp(gradients, *inputs, *d_outputs)[1](tuple(slopes))
    return found


def _side_by_side(size: int, dims: Any, inputs: Any) -> list[Any]:
    """The twelve of `_LinearProduct`, of several layers -> of one."""
    q, k, v = more_heads(size, dims[:3], inputs[:3])
    w = own_projections(size, dims[3], inputs[3], heads=q.shape[1] // size)
    planes, along, *rest = inputs[5:]
    if planes is not None:
        (planes,) = more_heads(size, dims[5:6], [planes])
        (along,) = more_heads(size, dims[6:7], [along], axis=0)
    return [q, k, v, w, inputs[4], planes, along, *rest]


def repeated(layers: int, x: Tensor, images: int) -> Tensor:
    """(B H, ..) of one layer -> (B layers H, ..)."""
    each = x.unflatten(0, (images, -1)).unsqueeze(1)
    return each.expand(-1, layers, *each.shape[2:]).flatten(0, 2)


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
