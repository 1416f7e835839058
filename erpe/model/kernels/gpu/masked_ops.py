"""The masked product as operators of torch, see ops.py."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from erpe.model.kernels.functions import again, folded_mask, more_heads, unfolded_mask
from erpe.model.kernels.gpu import masked_launch, or_torch
from erpe.model.kernels.tiles import dense_product


@torch.library.custom_op("erpe::masked_forward", mutates_args=())
def masked_forward(phi_q: Tensor, phi_k: Tensor, v: Tensor, bias: Tensor, top: Tensor) -> tuple[Tensor, Tensor]:
    """Numerators (B, H, N, Dv) and denominators (B, H, N); arguments as for `tiles.tiled_product`."""
    given = phi_q, phi_k, v, bias, top
    with torch.cuda.device_of(v):
        found: tuple[Tensor, Tensor] = or_torch(
            lambda: masked_launch.forward(*given), lambda: dense_product(*given), "masked", phi_q.shape[-1], v.shape[-1]
        )
    return found


@torch.library.custom_op("erpe::masked_backward", mutates_args=())
def masked_backward(
    phi_q: Tensor, phi_k: Tensor, v: Tensor, bias: Tensor, top: Tensor, d_num: Tensor, d_den: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of phi_q, phi_k, v and bias."""
    given = phi_q, phi_k, v, bias, top

    def torchs() -> tuple[Tensor, ...]:
        return torch.func.vjp(partial(dense_product, top=top), *given[:4])[1]((d_num, d_den))

    with torch.cuda.device_of(v):
        found: tuple[Tensor, Tensor, Tensor, Tensor] = or_torch(
            lambda: masked_launch.backward(*given, d_num, d_den), torchs, "masked", phi_q.shape[-1], v.shape[-1]
        )
    return found


@masked_forward.register_fake
def _(phi_q: Tensor, phi_k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return v.new_empty(v.shape, dtype=torch.float32), v.new_empty(v.shape[:3], dtype=torch.float32)


@masked_backward.register_fake
def _(phi_q: Tensor, phi_k: Tensor, v: Tensor, bias: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in (phi_q, phi_k, v, bias))


def _keep(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _slopes(ctx: Any, d_num: Tensor, d_den: Tensor) -> tuple[Tensor | None, ...]:
    return *masked_backward(*ctx.saved_tensors, d_num, d_den), None


def _slopes_of_slopes(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
    *learn, top, d_num, d_den = ctx.saved_tensors
    *found, d_d_num, d_d_den = again(partial(dense_product, top=top), learn, (d_num, d_den), slopes)
    return *found, None, d_d_num, d_d_den


masked_forward.register_autograd(_slopes, setup_context=_keep)
masked_backward.register_autograd(_slopes_of_slopes, setup_context=_keep)


@masked_forward.register_vmap
def _(info: Any, in_dims: Any, *inputs: Any) -> Any:
    found = masked_forward(*folded_mask(info.batch_size, in_dims, *inputs))
    return tuple(x.unflatten(1, (info.batch_size, -1)) for x in found), (1, 1)


@masked_backward.register_vmap
def _(
    info: Any, in_dims: Any, phi_q: Tensor, phi_k: Tensor, v: Tensor, bias: Tensor, top: Tensor,
    d_num: Tensor, d_den: Tensor,
) -> Any:  # fmt: skip
    size, (*dims, of_d_num, of_d_den) = info.batch_size, in_dims
    slopes = more_heads(size, (of_d_num, of_d_den), (d_num, d_den))
    return unfolded_mask(size, masked_backward(*folded_mask(size, dims, phi_q, phi_k, v, bias, top), *slopes))


@register_flop_formula(torch.ops.erpe.masked_forward)
def _(phi_q: Any, phi_k: Any, v: Any, *rest: Any, **more: Any) -> int:
    images, heads, n, m = phi_q
    return int(2 * images * heads * n * n * (m + v[-1]))


@register_flop_formula(torch.ops.erpe.masked_backward)
def _(phi_q: Any, phi_k: Any, v: Any, *rest: Any, **more: Any) -> int:
    images, heads, n, m = phi_q
    return int(4 * images * heads * n * n * (m + v[-1]))  # by need: that weights are made again is not counted
