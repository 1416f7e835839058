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

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


def bench_backends(
    tokens: int, shape: LayerShape, *, rounds: int, device: torch.device, dtype: torch.dtype
) -> list[dict[str, Any]]:
    """Milliseconds of a training step of softmax attention by each backend, in interleaved rounds.

    Returns:
        Rows as `compete` gives them, of the backends that serve this device, type and shape.
    """
    size = (3, shape.batch_at(tokens), shape.heads, tokens, shape.head_dim)
    q, k, v = torch.randn(size, dtype=dtype, device=device)
    ready = {name: partial(step, partial(by_backend, backend), q, k, v) for name, backend in BACKENDS.items()}
    return measured({name: make for name, make in ready.items() if serves(make())}, rounds, device)


def by_backend(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(B, H, N, D) each -> (B, H, N, D)."""
    with sdpa_kernel(backend):
        return scaled_dot_product_attention(q, k, v)


def serves(call: Callable[[], None]) -> bool:
    """Whether it runs at all: torch refuses with a RuntimeError, and says why in warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            call()
        except RuntimeError:
            return False
    return True
