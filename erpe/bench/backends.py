"""Which backend of torch's fused softmax attention is the fastest on a device: what `sdpa_kernel` then asks for."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from erpe.bench.layers import LayerShape, measured, step
from erpe.model.kernels.gpu import flex
from erpe.model.toeplitz import Mask
from erpe.training.choices import BACKENDS, FLEX


def bench_backends(
    tokens: int,
    shape: LayerShape,
    *,
    rounds: int,
    device: torch.device,
    dtype: torch.dtype,
    grid: tuple[int, int] | None = None,
) -> list[dict[str, Any]]:
    """Milliseconds of a training step of softmax attention by each backend, in interleaved rounds.

    Args:
        grid: of the tokens, to have log-weights of their offsets, which learn; default: without.
    Returns:
        Rows as `compete` gives them, of the backends that serve this device, type and shape.
    """
    size = (3, shape.batch_at(tokens), shape.heads, tokens, shape.head_dim)
    q, k, v = torch.randn(size, dtype=dtype, device=device)
    ways: dict[str, Any] = {name: partial(by_backend, backend) for name, backend in BACKENDS.items()}
    if grid is not None:
        table = torch.zeros(shape.heads, *(2 * side - 1 for side in grid), dtype=torch.float32, device=device)
        mask = Mask(grid, table.requires_grad_())
        ways = {name: partial(way, mask=mask) for name, way in ways.items()}
        if device.type == "cuda":
            ways[FLEX] = lambda q, k, v: flex.flex(q, k, v, mask, shape.head_dim**-0.5)
    ready = {name: partial(step, way, q, k, v) for name, way in ways.items()}
    return measured({name: make for name, make in ready.items() if serves(make())}, rounds, device)


def by_backend(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor, mask: Mask | None = None) -> Tensor:
    """(B, H, N, D) each -> (B, H, N, D)."""
    with sdpa_kernel(backend):
        return scaled_dot_product_attention(q, k, v, None if mask is None else mask.dense().to(q.dtype)[None])


def serves(call: Callable[[], None]) -> bool:
    """Whether it runs at all: torch refuses with a RuntimeError, and says why in warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            call()
        except RuntimeError:
            return False
    return True
