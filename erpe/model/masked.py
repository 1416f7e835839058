"""The masked product of linear attention, exact.

    y_i = sum_j A_ij v_j / den_i,    den_i = sum_j A_ij,    A_ij = (phi_q_i . phi_k_j) exp(bias - top)_ij

On CPUs `kernels/masked.c` does it, in tiles that stay in cache. What follows is the same in torch: for GPUs, float64,
the tools that count FLOPs, and machines without a C compiler.

There, up to `WHOLE` tokens, the weights A are kept for the backward pass: all it needs of C and
the products, since the gradient of the log-weights is A times that of A. Beyond, and in C, the work goes in tiles and A
is computed again: memory grows with N, not with its square.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from erpe.model import compiled
from erpe.model.features import AS_THEY_ARE, Maps
from erpe.model.linear import more_heads, own_projections

WHOLE = 1024
"""Up to so many tokens A is kept."""

SIDE = {"cpu": 1024, "cuda": 4096}
"""About so many queries, and so many keys, make a tile: small ones cost two threads more in waking than they save."""

SPAN = 40.0
"""In C the weights of all queries have one factor in common: it may take so much from the log-weight of any of them."""

ENTRIES = {"cpu": 2**22, "cuda": 2**27}
"""So many entries has a tile, over heads and images: what bounds memory. GPUs were not measured."""


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
    if compiled.serves(q, k, v, bias) and (_batched(q, k, v, bias) or _one_factor_serves(bias, top)):
        q, k, v = (compiled.plain(x) for x in (q, k, v))
        y, den, *_ = _Compiled.apply(q, k, v, bias, top, w, maps)
        return y, den
    phi_q, phi_k = maps.q(q, w), maps.k(k, w)
    top = window_top(bias).detach() if top is None else top
    call = _forward if torch.jit.is_tracing() else _MaskedProduct.apply
    num, den, _ = call(phi_q, phi_k, v, bias, top)
    return num / den[..., None], den


def product_flops(tokens: int, features: int, v_dim: int) -> tuple[float, float]:
    """FLOPs of a head's matrix products: forward, and forward and backward."""
    weights, values = 2 * tokens**2 * features, 2 * tokens**2 * v_dim
    again = weights if tokens > WHOLE else 0
    return weights + values, 3 * (weights + values) + again


def window_top(bias: Tensor) -> Tensor:
    """The largest log-weight that each query reaches: (H, 2h-1, 2w-1) -> (H, h w)."""
    h, w = _grid(bias)
    reached = bias.unfold(-2, h, 1).amax(-1).unfold(-1, w, 1).amax(-1)              # (H, h, w)  last query first
    return reached.flip(-2, -1).flatten(1)


def _batched(*inputs: Tensor) -> bool:
    """Within `torch.vmap`, where no value can be asked for; the rule below asks again."""
    return any(torch._C._functorch.is_batchedtensor(x) for x in inputs)


def _missing(bias: Tensor, top: Tensor) -> Tensor:
    """(H, N), what each query's largest log-weight lacks of its head's."""
    return bias.detach().flatten(1).amax(1, keepdim=True) - top


def _one_factor_serves(bias: Tensor, top: Tensor | None) -> bool:
    low, high = torch.aminmax(bias.detach())
    if high - low < SPAN:
        return True
    return bool(_missing(bias, window_top(bias).detach() if top is None else top).max() < SPAN)


class _Compiled(torch.autograd.Function):
    @staticmethod
    def forward(*inputs: Any) -> Any:
        q, k, v, bias, top, w, maps = inputs
        c = (bias - bias.amax((1, 2), keepdim=True)).exp()
        factor = None if top is None else _missing(bias, top).exp().contiguous()
        return *compiled.masked_forward(q, k, v, c, factor, w, maps), c, factor

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.mark_non_differentiable(*(x for x in output[2:] if x is not None))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:3], *output, inputs[5])
        ctx.maps = inputs[6]

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        q, k, v, y, den, c, factor, w = ctx.saved_tensors
        d_y, d_den, *_ = gradients
        d_y = torch.zeros_like(y) if d_y is None else d_y
        found = compiled.masked_backward(q, k, v, c, factor, w, ctx.maps, (y, den), d_y, d_den)
        return *found, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *inputs: Any) -> Any:
        """Layers side by side are more heads."""
        w = own_projections(info.batch_size, in_dims[5], inputs[5], heads=inputs[3].shape[-3])
        q, k, v, bias, *top = _more_heads(info, in_dims, inputs[: 4 if inputs[4] is None else 5])
        y, den = masked_product(q, k, v, bias, top[0] if top else None, w, inputs[6])
        nothing = y.new_empty(0)
        return (*(x.unflatten(1, (info.batch_size, -1)) for x in (y, den)), nothing, nothing), (1, 1, None, None)


def _more_heads(info: Any, dims: Any, inputs: Any) -> tuple[Tensor, ...]:
    """q, k, v, bias and top, if there is one, of several layers, of one."""
    size = info.batch_size
    return *more_heads(size, dims[:3], inputs[:3]), *more_heads(size, dims[3 : len(inputs)], inputs[3:], axis=0)


class _MaskedProduct(torch.autograd.Function):
    @staticmethod
    def forward(*inputs: Any) -> Any:
        return _forward(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.mark_non_differentiable(output[2])
        ctx.set_materialize_grads(False)  # A has none, and would get N x N zeros
        ctx.save_for_backward(*inputs, output[2])

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        v = ctx.saved_tensors[2]
        d_num, d_den, _ = gradients
        d_num = torch.zeros_like(v) if d_num is None else d_num
        d_den = v.new_zeros(v.shape[:3]) if d_den is None else d_den
        return *_backward(ctx.saved_tensors, d_num, d_den), None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *inputs: Tensor) -> Any:
        """Layers side by side are more heads."""
        num, den, kept = _MaskedProduct.apply(*_more_heads(info, in_dims, inputs))
        split = [x.unflatten(1, (info.batch_size, -1)) for x in (num, den)]
        return (*split, kept), (1, 1, None)


def _forward(phi_q: Tensor, phi_k: Tensor, v: Tensor, bias: Tensor, top: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, values = (x.flatten(0, 1) for x in (phi_q, phi_k, v))                     # (B H, N, ..)
    if top.shape[1] <= WHOLE:
        a = _weighed(q @ k.mT, _weights(bias, top))
        return (a @ values).view(v.shape), a.sum(-1).view(v.shape[:3]), a
    num, den = torch.zeros_like(values), values.new_zeros(values.shape[:2])
    for rows, columns, c in _tiles(bias, top):
        for some in _images(len(q), c):
            a = _weighed(q[some, rows] @ k[some, columns].mT, c)
            num[some, rows] += a @ values[some, columns]
            den[some, rows] += a.sum(-1)
    return num.view(v.shape), den.view(v.shape[:3]), values.new_empty(0)


def _backward(
    saved: tuple[Tensor, ...], d_num: Tensor, d_den: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    phi_q, phi_k, v, bias, top, kept = saved
    q, k, values, d_n, d_d = (x.flatten(0, 1) for x in (phi_q, phi_k, v, d_num, d_den))
    d_q, d_k, d_v, d_bias = (torch.zeros_like(x) for x in (q, k, values, bias))
    if top.shape[1] <= WHOLE:
        c = _weights(bias, top)
        d_v, d_a = kept.mT @ d_n, (d_n @ values.mT).add_(d_d[..., None])
        _add_offsets(d_bias, (kept * d_a).view(-1, *c.shape).sum(0))
        d_a = _weighed(d_a, c)
        d_q, d_k = d_a @ k, d_a.mT @ q
    for rows, columns, c in _tiles(bias, top) if top.shape[1] > WHOLE else ():
        d_log_c = torch.zeros_like(c)
        for some in _images(len(q), c):
            a = _weighed(q[some, rows] @ k[some, columns].mT, c)
            d_v[some, columns] += a.mT @ d_n[some, rows]
            d_a = (d_n[some, rows] @ values[some, columns].mT).add_(d_d[some, rows, None])
            d_log_c += a.mul_(d_a).view(-1, *c.shape).sum(0)
            d_a = _weighed(d_a, c)
            d_q[some, rows] += d_a @ k[some, columns]
            d_k[some, columns] += d_a.mT @ q[some, rows]
        _add_offsets(d_bias, d_log_c, rows.start, columns.start)
    return d_q.view(phi_q.shape), d_k.view(phi_k.shape), d_v.view(v.shape), d_bias


def _grid(bias: Tensor) -> tuple[int, int]:
    return (bias.shape[-2] + 1) // 2, (bias.shape[-1] + 1) // 2


def _weighed(a: Tensor, c: Tensor) -> Tensor:
    """`a` (images H, queries, keys) times c (H, queries, keys), in place."""
    a.view(-1, *c.shape).mul_(c)
    return a


def _tiles(bias: Tensor, top: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
    """Queries, keys (whole rows of the grid) and their weights."""
    h, w = _grid(bias)
    rows = max(1, SIDE.get(bias.device.type, SIDE["cpu"]) // w)
    parts = [slice(start, min(h, start + rows)) for start in range(0, h, rows)]
    for queries in parts:
        for keys in parts:
            tokens = [slice(part.start * w, part.stop * w) for part in (queries, keys)]
            yield tokens[0], tokens[1], _weights(bias, top, queries, keys)


def _images(pairs: int, c: Tensor) -> Iterator[slice]:
    """Parts of the B H pairs, whole images, so that a tile has the right size."""
    entries = ENTRIES.get(c.device.type, ENTRIES["cpu"])
    step = max(1, entries // c.numel()) * len(c)
    return (slice(start, min(pairs, start + step)) for start in range(0, pairs, step))


def _weights(bias: Tensor, top: Tensor, queries: slice | None = None, keys: slice | None = None) -> Tensor:
    """exp(bias - top), dense, for some rows of the grid or all: (H, queries, keys)."""
    h, w = _grid(bias)
    queries, keys = queries or slice(0, h), keys or slice(0, h)
    # A window of the table for each query, the last query first.
    windows = bias.unfold(-2, h, 1).unfold(-2, w, 1)[:, h - queries.stop : h - queries.start, :, keys]
    log_c = windows.flip(1, 2).flatten(3).flatten(1, 2)
    return (log_c - top[:, queries.start * w : queries.stop * w, None]).exp_()


def _add_offsets(table: Tensor, d_log_c: Tensor, first_query: int = 0, first_key: int = 0) -> None:
    """Add what belongs to one offset, from everywhere among these queries and keys, to its entry of the table."""
    h, w = _grid(table)
    d = d_log_c.unflatten(2, (-1, w)).unflatten(1, (-1, w))                         # (H, y, x, y', x')
    lines = d.new_zeros(*d.shape[:2], d.shape[3], 2 * w - 1)                        # (H, y, y', x' - x)
    for x in range(w):
        lines[..., w - 1 - x : 2 * w - 1 - x] += d[:, :, x]
    zero = first_key // w - first_query // w + h - 1
    for y in range(d.shape[1]):
        table[:, zero - y : zero - y + d.shape[3]] += lines[:, y]
