"""Rotations of vectors on CPUs, by themselves: what softmax attention needs of rope and circulant.

`kernels/rotation.c` turns each token in cache, in the basis of the planes, from q or k as they lie in memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from erpe.model import compiled
from erpe.model.linear import more_heads
from erpe.model.structures import Rotation


def turned(x: Tensor, planes: Tensor, rotation: Rotation) -> Tensor:
    """Each token by its place, left in the basis of the rotation; only where `compiled.serves`.

    Args:
        x: (B, H, N, D).
        planes: (2, H, P), frequencies along y and x, which get the gradient of
        rotation: made of them.
    Returns:
        (B, H, N, D).
    """
    found: Tensor = _Turned.apply(compiled.plain(x), planes, *rotation)
    return found


class _Turned(torch.autograd.Function):
    @staticmethod
    def forward(*inputs: Any) -> Any:
        x, _, *rotation = inputs
        return compiled.rotation_forward(x, Rotation(*rotation))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs[2:6], output)
        ctx.learns = inputs[6]

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        along, basis, rows, columns, y = ctx.saved_tensors
        rotation = Rotation(along, basis, rows, columns, ctx.learns)
        return *compiled.rotation_backward(rotation, y, gradients[0]), *[None] * 5

    @staticmethod
    def vmap(info: Any, in_dims: Any, *inputs: Any) -> Any:
        """Layers side by side are more heads."""
        size = info.batch_size
        x, planes = more_heads(size, in_dims[:2], inputs[:2])
        (along,) = more_heads(size, in_dims[2:3], inputs[2:3], axis=0)
        return _Turned.apply(compiled.plain(x), planes, along, *inputs[3:]).unflatten(1, (size, -1)), 1
