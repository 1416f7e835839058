"""torch's fused attention under vmap, for which torch has no batching rule."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode


class Fold(TorchFunctionMode):
    """In the block, fused attention that vmap maps over K models is one call: models join the images, or the heads."""

    def __torch_function__(self, call: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Every call of a torch function in the block comes here."""
        return (_folded if call is scaled_dot_product_attention else call)(*args, **(kwargs or {}))


def _folded(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, scale: float | None = None
) -> Any:
    """What we ask of `scaled_dot_product_attention`, by its names."""
    return _Folded.apply(query, key, value, attn_mask, scale)


class _Folded(torch.autograd.Function):
    """A Function for its rule under vmap alone: what the rule calls has gradients of its own."""

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float | None) -> Tensor:
        raise NotImplementedError

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        raise NotImplementedError

    @staticmethod
    def vmap(
        info: Any, in_dims: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float | None
    ) -> tuple[Tensor, int]:
        """(K, B, H, N, D) three times, perhaps (K, 1, H, N, N) -> (K, B, H, N, D), 0."""
        q, k, v = (x.movedim(dim, 0) for x, dim in zip((q, k, v), in_dims, strict=False))
        if bias is None:
            y = scaled_dot_product_attention(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), scale=scale)
            return y.unflatten(0, q.shape[:2]), 0
        # Every image of a model has the model's bias: with models beside heads none of it is copied.
        q, k, v = (x.transpose(0, 1).flatten(1, 2) for x in (q, k, v))  # (B, K H, N, D)
        bias = bias.movedim(in_dims[3], 0).transpose(0, 1).flatten(1, 2)  # (1, K H, N, N)
        y = scaled_dot_product_attention(q, k, v, bias, scale=scale)
        return y.unflatten(1, (info.batch_size, -1)), 1
