"""What the autograd functions of this package have in common: gradients of gradients, and several layers at once."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from erpe.model.kernels import cpu


def bound(forward: Callable[..., Any]) -> Callable[..., Any]:
    """`forward` of an autograd function, with its signature made once: torch asks for it at each call, for 0.1 ms."""
    forward.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
    return forward


def slopes(function: type[torch.autograd.Function], inputs: Any, *tensors: Tensor) -> Any:
    """`function.apply`; without the cost of gradients of gradients where they are not needed."""
    plain = not torch.is_grad_enabled() and cpu.in_memory(*tensors)
    return (function.forward if plain else function.apply)(*inputs)


def again(f: Callable[..., Any], inputs: Any, d_outputs: Any, slopes: Any) -> tuple[Tensor, ...]:
    """Gradients of gradients.

    Args:
        f: of the inputs, gives a tuple of outputs by operators that torch can differentiate twice.
        d_outputs: gradients of the outputs, which gave gradients of the inputs.
        slopes: gradients of those gradients.
    Returns:
        Gradients of the inputs, and of `d_outputs`.
    """
    def gradients(*given: Tensor) -> Any:
        return torch.func.vjp(f, *given[: len(inputs)])[1](given[len(inputs) :])

    return torch.func.vjp(gradients, *inputs, *d_outputs)[1](tuple(slopes))


# Layers side by side, as torch.vmap has them, are one layer of more heads.


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


def repeated(layers: int, x: Tensor, images: int) -> Tensor:
    """(B H, ..) of one layer -> (B layers H, ..)."""
    each = x.unflatten(0, (images, -1)).unsqueeze(1)
    return each.expand(-1, layers, *each.shape[2:]).flatten(0, 2)


def folded_mask(layers: int, dims: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, top: Any) -> list[Any]:
    """q, k, v, bias and perhaps top of several layers -> of one."""
    tops = [None] if top is None else more_heads(layers, dims[4:5], [top], axis=0)
    return [*more_heads(layers, dims[:3], (q, k, v)), *more_heads(layers, dims[3:4], [bias], axis=0), *tops]


def unfolded_mask(layers: int, found: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """Gradients of q, k, v and bias of one layer -> of several, and where those are."""
    *those, d_bias = found
    return (*(x.unflatten(1, (layers, -1)) for x in those), d_bias.unflatten(0, (layers, -1))), (1, 1, 1, 0)
