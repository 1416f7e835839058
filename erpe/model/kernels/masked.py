"""The masked product of linear attention, exact.

    y_i = sum_j A_ij v_j / den_i,    den_i = sum_j A_ij,    A_ij = (phi_q_i . phi_k_j) exp(bias - top)_ij

On CPUs `masked.c` does it, in tiles that stay in cache.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from erpe.model.features import AS_THEY_ARE, FeatureMap, Maps
from erpe.model.kernels import cpu, gpu
from erpe.model.kernels.functions import again, bound, folded_mask, more_heads, own_projections, slopes, unfolded_mask
from erpe.model.kernels.low_rank import fourier_product, series
from erpe.model.kernels.tiles import WHOLE, dense_product, tiled_product, window_top
from erpe.model.toeplitz import Mask

SPAN = 40.0
"""In C the weights of all queries have one factor in common: it may take so much from the log-weight of any of them."""


def exact_method(method: str, tokens: int, features: int, v_dim: int) -> str:
    """`dense` or `fft`, of the general encoding on linear attention: the one that is asked for, else the faster one.

    Measured on two threads of an AMD EPYC (torch 2.13, float32, B = 1, H = 2, the dense path compiled; one interleaved
    run of 1 to 3 rounds), fft time over dense time, forward / training step:

        N                  1024          4096          16384
        m = 8,  Dv = 8     2.9 / 2.9     1.2 / 1.2
        m = 16, Dv = 16    8.1 / 9.0     5.3 / 4.2     2.0 / 1.3
        m = 32, Dv = 32                  12.5 / 9.2    3.1 / 2.4

    From N = 4096 on that is 40 to 120 times m (Dv + 1) / N: one path transforms m (Dv + 1) channels of N entries, the
    other computes N x N. Without kernels the dense path takes about three times as long; GPUs were not measured.
    """
    if method in ("dense", "fft"):
        return method
    return "fft" if 60 * features * (v_dim + 1) < tokens else "dense"


def with_class_token(phi_q: Tensor, phi_k: Tensor, v: Tensor, mask: Mask, rank: int | None, way: str) -> Tensor:
    """Averages of the values (B, H, N, Dv) where token 0 may lie outside the grid, or C is a series of `rank` terms."""
    highest = mask.bias.flatten(1).amax(1, keepdim=True)          # (H, 1)
    top = (highest.expand(-1, mask.grid[0] * mask.grid[1]) if rank else window_top(mask.bias)).detach()
    if mask.cls is None:
        num, den = _sums(phi_q, phi_k, v, mask, top, rank, way)
        return num / den[..., None]
    to_cls, from_cls, own = mask.cls[:, :, None]                  # (H, 1) each
    top = torch.maximum(top, to_cls.detach())                     # (H, hw)
    patches = phi_q[:, :, 1:]
    num, den = _sums(patches, phi_k[:, :, 1:], v[:, :, 1:], mask, top, rank, way)
    a = (patches @ phi_k[:, :, :1].mT) * (to_cls - top).exp()[..., None]         # (B, H, hw, 1)  to the class token
    num, den = num + a * v[:, :, :1], den + a[..., 0]
    c = torch.cat([own, from_cls.expand(-1, top.shape[1])], dim=1)                  # (H, N)  from the class token
    a = (phi_q[:, :, :1] @ phi_k.mT) * (c - c.detach().amax(1, keepdim=True)).exp()[:, None]
    return torch.cat([a @ v / a.sum(-1, keepdim=True), num / den[..., None]], dim=2)


def _sums(
    phi_q: Tensor, phi_k: Tensor, v: Tensor, mask: Mask, top: Tensor, rank: int | None, way: str
) -> tuple[Tensor, Tensor]:
    """Sums of weighed values, and of weights, over the patches alone; log-weights lose a query's `top` (H, hw)."""
    if not rank:
        y, den = masked_product(phi_q, phi_k, v, mask.bias, top, way=way)
        return y * den[..., None], den
    known = series(mask.grid, rank, mask.bias.dtype, mask.bias.device)
    return fourier_product(phi_q, phi_k, v, (mask.bias - top[:, :1, None]).exp(), known)


def masked_product(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    top: Tensor | None = None,
    phi: FeatureMap = AS_THEY_ARE,
    way: str = "torch",
) -> tuple[Tensor, Tensor]:
    """Averages and their denominators over a grid of (h, w) tokens, row-major.

    Args:
        q, k: (B, H, N, D), of which `phi` makes phi_q and phi_k (B, H, N, m).
        v: (B, H, N, Dv).
        bias: (H, 2h-1, 2w-1), log-weight of each offset of key minus query, zero offset in the centre.
        top: (H, N), taken from the log-weights of each query: a factor of its own, which cancels in the averages; None:
            whichever is good for rounding.
        way: who computes it, as `erpe.model.kernels.serving` says.
    Returns:
        y (B, H, N, Dv), den (B, H, N).
    """
    if way == "c":
        y, den, _ = _Compiled.apply(q, k, v, bias, top, phi.w, phi.maps)
        return y, den
    top = window_top(bias).detach() if top is None else top
    small = q.shape[2] <= WHOLE and torch.compiler.is_compiling()  # which knows itself what is worth keeping
    torchs = dense_product if small else tiled_product
    num, den = (gpu.masked_ops.masked_forward if way == "triton" else torchs)(*phi(q, k), v, bias, top)
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
    @bound
    def forward(
        q: Tensor, k: Tensor, v: Tensor, bias: Tensor, top: Tensor | None, w: Tensor | None, maps: Maps
    ) -> Any:
        if not _one_factor_serves(bias, top):
            return *masked_product(q, k, v, bias, top, FeatureMap(maps, w)), bias.new_empty(0)
        c = (bias - bias.amax((1, 2), keepdim=True)).exp()
        return *cpu.masked_forward(q, k, v, c, _factor(bias, top), w, maps), c

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        *tensors, ctx.maps = inputs
        ctx.mark_non_differentiable(output[2])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, *output)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        *inputs, y, den, c = ctx.saved_tensors
        d_y, d_den, _ = gradients
        d_y = torch.zeros_like(y) if d_y is None else d_y
        those = *inputs, ctx.maps, y, den, d_y, d_den, c
        return *slopes(_CompiledSlopes, those, *inputs[:4], d_y), None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *inputs: Any) -> Any:
        y, den, c = _Compiled.apply(*_folded(info.batch_size, in_dims, *inputs))
        return (*(x.unflatten(1, (info.batch_size, -1)) for x in (y, den)), c), (1, 1, None)


class _CompiledSlopes(torch.autograd.Function):
    """Gradients of q, k, v and bias, which have gradients of their own, by torch's operators."""

    @staticmethod
    @bound
    def forward(
        q: Tensor, k: Tensor, v: Tensor, bias: Tensor, top: Tensor | None, w: Tensor | None, maps: Maps,
        y: Tensor, den: Tensor, d_y: Tensor, d_den: Tensor | None, c: Tensor,
    ) -> Any:  # fmt: skip
        if len(c):
            return cpu.masked_backward(q, k, v, c, _factor(bias, top), w, maps, (y, den), d_y, d_den)
        with torch.enable_grad():
            learn = [x.detach().requires_grad_() for x in (q, k, v, bias)]
            d_den = torch.zeros_like(den) if d_den is None else d_den
            y_den = masked_product(learn[0], learn[1], learn[2], learn[3], top, FeatureMap(maps, w))
            return torch.autograd.grad(y_den, learn, (d_y, d_den))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        *tensors, ctx.maps, _, _, d_y, d_den, _ = inputs
        ctx.save_for_backward(*tensors, d_y, d_den)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        q, k, v, bias, top, w, d_y, d_den = ctx.saved_tensors
        phi, own = FeatureMap(ctx.maps, w), window_top(bias).detach() if top is None else top

        def averages(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
            num, den = dense_product(*phi(q, k), v, bias, own)
            return (num / den[..., None], den)[: 1 if d_den is None else 2]

        d_outputs = [x for x in (d_y, d_den) if x is not None]
        found = again(averages, (q, k, v, bias), d_outputs, gradients)
        d_d_den = None if d_den is None else found[5]
        return *found[:4], *[None] * 5, found[4], d_d_den, None

    @staticmethod
    def vmap(
        info: Any, in_dims: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, top: Tensor | None, w: Tensor | None,
        maps: Maps, y: Tensor, den: Tensor, d_y: Tensor, d_den: Tensor | None, c: Tensor,
    ) -> Any:  # fmt: skip
        size, (*dims, of_y, of_den, of_d_y, of_d_den, _) = info.batch_size, in_dims
        d_den = None if d_den is None else more_heads(size, [of_d_den], [d_den])[0]
        y, den, d_y = more_heads(size, (of_y, of_den, of_d_y), (y, den, d_y))
        if not any(isinstance(dim, int) for dim in dims):  # the product itself was of one layer
            c = c.repeat(size, 1, 1) if len(c) else c
        folded = _folded(size, dims, q, k, v, bias, top, w, maps)
        found = _CompiledSlopes.apply(*folded, y, den, d_y, d_den, c)
        return unfolded_mask(size, found)


def _folded(
    layers: int, dims: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, top: Any, w: Tensor | None, maps: Maps
) -> list[Any]:
    """Return the inputs of `_Compiled`, of several layers -> of one."""
    found = folded_mask(layers, dims, q, k, v, bias, top)
    return [*found, own_projections(layers, dims[5], w, heads=len(found[3]) // layers), maps]
