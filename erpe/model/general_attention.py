"""The masked product of linear attention, exact.

    y_i = sum_j A_ij v_j / den_i,    den_i = sum_j A_ij,    A_ij = (phi_q_i . phi_k_j) exp(bias - top)_ij

On CPUs `kernels/masked.c` does it, in tiles that stay in cache; elsewhere torch's operators, tiles.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from erpe.model import cpu_kernels
from erpe.model.features import AS_THEY_ARE, Maps
from erpe.model.linear import again, more_heads, slopes
from erpe.model.tiles import dense_product, layers_apart, layers_as_heads, tiled_product, window_top

SPAN = 40.0
"""In C the weights of all queries have one factor in common: it may take so much from the log-weight of any of them."""


def masked_product(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    top: Tensor | None = None,
    w: Tensor | None = None,
    maps: Maps = AS_THEY_ARE,
) -> tuple[Tensor, Tensor]:
    """Averages and their denominators over a grid of (h, w) tokens, row-major.

    Args:
        q, k: (B, H, N, D), of which `maps` make phi_q and phi_k (B, H, N, m).
        v: (B, H, N, Dv).
        bias: (H, 2h-1, 2w-1), log-weight of each offset of key minus query, zero offset in the centre.
        top: (H, N), taken from the log-weights of each query: a factor of its own, which cancels in the averages; none:
            whichever is good for rounding.
        w: projections (D, m) for the maps.
    Returns:
        y (B, H, N, Dv), den (B, H, N).
    """
    if cpu_kernels.serves(q, k, v, bias):
        y, den, _ = _Compiled.apply(q, k, v, bias, top, w, maps)
        return y, den
    return _by_torch(q, k, v, bias, top, w, maps)


def _by_torch(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, top: Tensor | None, w: Tensor | None, maps: Maps
) -> tuple[Tensor, Tensor]:
    phi_q, phi_k = maps.q(q, w), maps.k(k, w)
    top = window_top(bias).detach() if top is None else top
    num, den = tiled_product(phi_q, phi_k, v, bias, top)
    return num / den[..., None], den


def _missing(bias: Tensor, top: Tensor) -> Tensor:
    """(H, N), what each query's largest log-weight lacks of its head's."""
    return bias.detach().flatten(1).amax(1, keepdim=True) - top


def _factor(bias: Tensor, top: Tensor | None) -> Tensor | None:
    """(H, N), by which denominators differ from those of one factor in common."""
    return None if top is None else _missing(bias, top).exp().contiguous()


def _one_factor_serves(bias: Tensor, top: Tensor | None) -> bool:
    low, high = torch.aminmax(bias.detach())
    if high - low < SPAN:
        return True
    return bool(_missing(bias, window_top(bias).detach() if top is None else top).max() < SPAN)


class _Compiled(torch.autograd.Function):
    """q, k, v, bias, top, w, maps -> y, den, and c, which is empty where torch's operators did it."""

    @staticmethod
    def forward(*inputs: Any) -> Any:
        q, k, v, bias, top, w, maps = inputs
        if not _one_factor_serves(bias, top):
            return *_by_torch(q, k, v, bias, top, w, maps), bias.new_empty(0)
        c = (bias - bias.amax((1, 2), keepdim=True)).exp()
        return *cpu_kernels.masked_forward(q, k, v, c, _factor(bias, top), w, maps), c

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.mark_non_differentiable(output[2])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:6], *output)
        ctx.maps = inputs[6]

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        *inputs, y, den, c = ctx.saved_tensors
        d_y, d_den, _ = gradients
        d_y = torch.zeros_like(y) if d_y is None else d_y
        those = *inputs, ctx.maps, y, den, d_y, d_den, c
        return *slopes(_CompiledSlopes, those, *inputs[:4], d_y), None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *inputs: Any) -> Any:
        """Layers side by side are more heads."""
        y, den, c = _Compiled.apply(*layers_as_heads(info.batch_size, in_dims, inputs))
        return (*(x.unflatten(1, (info.batch_size, -1)) for x in (y, den)), c), (1, 1, None)


class _CompiledSlopes(torch.autograd.Function):
    """Gradients of q, k, v and bias, which have gradients of their own, by torch's operators."""

    @staticmethod
    def forward(*inputs: Any) -> Any:
        q, k, v, bias, top, w, maps, y, den, d_y, d_den, c = inputs
        if len(c):
            return cpu_kernels.masked_backward(q, k, v, c, _factor(bias, top), w, maps, (y, den), d_y, d_den)
        with torch.enable_grad():
            learn = [x.detach().requires_grad_() for x in (q, k, v, bias)]
            d_den = torch.zeros_like(den) if d_den is None else d_den
            y_den = _by_torch(learn[0], learn[1], learn[2], learn[3], top, w, maps)
            return torch.autograd.grad(y_den, learn, (d_y, d_den))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs[:6], *inputs[9:11])
        ctx.maps = inputs[6]

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        q, k, v, bias, top, w, d_y, d_den = ctx.saved_tensors
        maps, own = ctx.maps, window_top(bias).detach() if top is None else top

        def averages(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
            num, den = dense_product(maps.q(q, w), maps.k(k, w), v, bias, own)
            return (num / den[..., None], den)[: 1 if d_den is None else 2]

        d_outputs = [x for x in (d_y, d_den) if x is not None]
        found = again(averages, (q, k, v, bias), d_outputs, gradients)
        d_d_den = None if d_den is None else found[5]
        return *found[:4], *[None] * 5, found[4], d_d_den, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *inputs: Any) -> Any:
        """Layers side by side are more heads."""
        size, c = info.batch_size, inputs[11]
        d_den = None if inputs[10] is None else more_heads(size, in_dims[10:11], inputs[10:11])[0]
        y, den, d_y = more_heads(size, in_dims[7:10], inputs[7:10])
        if not any(isinstance(dim, int) for dim in in_dims[:7]):  # the product itself was of one layer
            c = c.repeat(size, 1, 1) if len(c) else c
        found = _CompiledSlopes.apply(*layers_as_heads(size, in_dims[:7], inputs[:7]), y, den, d_y, d_den, c)
        return layers_apart(size, found)
