"""The masked product by torch's operators: for float64, tools that count FLOPs, and machines without kernels.

Up to `WHOLE` tokens the weights A are kept for the backward pass: all it needs of C and the products, since the
gradient of the log-weights is A times that of A. Beyond, the work goes in tiles and A is computed again: memory grows
with N, not with its square. Only gradients of gradients take all of A at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from erpe.model.kernels.functions import again, bound, folded_mask, more_heads, repeated, slopes, unfolded_mask
from erpe.model.toeplitz import offset_sums, toeplitz_dense

WHOLE = 1024
"""Largest number of tokens for which A is kept."""

SIDE = {"cpu": 1024, "cuda": 4096}
"""Approximate number of queries, and of keys, in a tile; smaller tiles do not pay on two threads."""

ENTRIES = {"cpu": 2**22, "cuda": 2**27}
"""Entries of a tile, over heads and images: this bounds memory. Not measured on GPUs."""


def tiled_product(phi_q: Tensor, phi_k: Tensor, v: Tensor, bias: Tensor, top: Tensor) -> tuple[Tensor, Tensor]:
    """Numerators (B, H, N, Dv) and denominators (B, H, N), as `masked_product` takes its arguments."""
    call = _forward if torch.jit.is_tracing() else _MaskedProduct.apply
    num, den, _ = call(phi_q, phi_k, v, bias, top)
    return num, den


def product_flops(tokens: int, features: int, v_dim: int) -> tuple[float, float]:
    """FLOPs of a head's matrix products: forward, and forward and backward."""
    weights, values = 2 * tokens**2 * features, 2 * tokens**2 * v_dim
    again = weights if tokens > WHOLE else 0
    return weights + values, 3 * (weights + values) + again


def window_top(bias: Tensor) -> Tensor:
    """Return the largest log-weight that each query reaches: (H, 2h-1, 2w-1) -> (H, h w)."""
    h, w = _grid(bias)
    reached = bias.unfold(-2, h, 1).amax(-1).unfold(-1, w, 1).amax(-1)              # (H, h, w)  last query first
    return reached.flip(-2, -1).flatten(1)


def dense_product(phi_q: Tensor, phi_k: Tensor, v: Tensor, bias: Tensor, top: Tensor) -> tuple[Tensor, Tensor]:
    """Numerators and denominators by N x N weights, which torch can differentiate as often as anybody likes."""
    a = phi_q @ phi_k.mT * (toeplitz_dense(bias) - top[..., None]).exp()
    return a @ v, a.sum(-1)


class _MaskedProduct(torch.autograd.Function):
    """phi_q, phi_k, v, bias, top -> numerators, denominators, and A where it is kept."""

    @staticmethod
    @bound
    def forward(phi_q: Tensor, phi_k: Tensor, v: Tensor, bias: Tensor, top: Tensor) -> Any:
        return _forward(phi_q, phi_k, v, bias, top)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.mark_non_differentiable(output[2])
        ctx.set_materialize_grads(False)  # A has none, and would get N x N zeros
        ctx.save_for_backward(*inputs, output[2])

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        *inputs, kept = ctx.saved_tensors
        v = inputs[2]
        d_num, d_den, _ = gradients
        d_num = torch.zeros_like(v) if d_num is None else d_num
        d_den = v.new_zeros(v.shape[:3]) if d_den is None else d_den
        return *slopes(_MaskedSlopes, (*inputs, d_num, d_den, kept), *inputs[:4], d_num, d_den), None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *inputs: Tensor) -> Any:
        num, den, kept = _MaskedProduct.apply(*folded_mask(info.batch_size, in_dims, *inputs))
        split = [x.unflatten(1, (info.batch_size, -1)) for x in (num, den)]
        return (*split, kept), (1, 1, None)


class _MaskedSlopes(torch.autograd.Function):
    """Gradients of phi_q, phi_k, v and bias, which have gradients of their own."""

    @staticmethod
    @bound
    def forward(
        phi_q: Tensor, phi_k: Tensor, v: Tensor, bias: Tensor, top: Tensor,
        d_num: Tensor, d_den: Tensor, kept: Tensor,
    ) -> Any:  # fmt: skip
        return _backward((phi_q, phi_k, v, bias, top, kept), d_num, d_den)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs[:7])

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        *learn, top, d_num, d_den = ctx.saved_tensors
        *found, d_d_num, d_d_den = again(partial(dense_product, top=top), learn, (d_num, d_den), gradients)
        return *found, None, d_d_num, d_d_den, None

    @staticmethod
    def vmap(
        info: Any, in_dims: Any, phi_q: Tensor, phi_k: Tensor, v: Tensor, bias: Tensor, top: Tensor,
        d_num: Tensor, d_den: Tensor, kept: Tensor,
    ) -> Any:  # fmt: skip
        *dims, of_d_num, of_d_den, _ = in_dims
        d_num, d_den = more_heads(info.batch_size, (of_d_num, of_d_den), (d_num, d_den))
        if len(kept) and not any(isinstance(dim, int) for dim in dims):  # the product itself was of one layer
            kept = repeated(info.batch_size, kept, len(d_num))
        folded = folded_mask(info.batch_size, dims, phi_q, phi_k, v, bias, top)
        found = _MaskedSlopes.apply(*folded, d_num, d_den, kept)
        return unfolded_mask(info.batch_size, found)


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
    """Return `a` (images H, queries, keys) times c (H, queries, keys), in place."""
    a.view(-1, *c.shape).mul_(c)
    return a


def _tiles(bias: Tensor, top: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yield queries, keys (whole rows of the grid) and their weights."""
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
    first = first_key // w - first_query // w + h - d.shape[1]
    table[:, first : first + d.shape[1] + d.shape[3] - 1] += offset_sums(d)
