"""What an attention layer costs against torch's fused softmax attention, over the number of tokens."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from erpe.bench.rounds import compete, machine
from erpe.errors import ConfigError
from erpe.model.attention import build_attention

SDPA = "torch SDPA"


class LayerShape(NamedTuple):
    """Sizes of a layer, and how much is given to it at once."""

    heads: int = 4
    head_dim: int = 32
    features: int | None = 32
    batch_tokens: int = 4096
    """B N, so that every N is the same amount of tokens."""


def grid_of(tokens: int) -> tuple[int, int]:
    """The most nearly square (h, w) with h w = N."""
    h = next(h for h in range(math.isqrt(tokens), 0, -1) if tokens % h == 0)
    return h, tokens // h


def bench_layers(
    variants: list[str],
    tokens: list[int],
    shape: LayerShape,
    *,
    rounds: int = 9,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> dict[str, Any]:
    """Milliseconds of a forward pass and of a training step (forward and backward) of each layer at each N.

    Args:
        options: of `AttentionConfig`, for all layers, such as `method`.
    Returns:
        `machine`, and rows as `compete` gives them, each with `tokens`, `batch`, `pass` (`forward`, `step`). The
        first of each N is torch's SDPA without bias, the second the one with a learned bias.
    Raises:
        ConfigError: a number of tokens, or an option, that makes no sense.
    """
    if min(tokens) < 1:
        raise ConfigError(f"tokens: {min(tokens)} given; 1 or more would do")
    rows = []
    for n in tokens:
        batch = max(1, shape.batch_tokens // n)
        q, k, v = torch.randn(3, batch, shape.heads, n, shape.head_dim, dtype=dtype, device=device)
        layers: dict[str, Layer] = {SDPA: plain, f"{SDPA}, bias": Biased(shape.heads, n, dtype, device)}
        for variant in variants:
            layers[variant] = build_attention(
                variant, grid=grid_of(n), heads=shape.heads, head_dim=shape.head_dim, features=shape.features, **options
            ).to(device)
        for what, wrap in {"forward": forward, "step": step}.items():
            calls = {name: wrap(layer, q, k, v) for name, layer in layers.items()}
            rows += [{"tokens": n, "batch": batch, "pass": what} | row for row in compete(calls, rounds, device)]
    sizes = shape._asdict() | {"dtype": str(dtype).removeprefix("torch.")} | options
    return {"machine": machine(device) | sizes, "rows": rows}


Layer = Callable[[Tensor, Tensor, Tensor], Tensor]


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention, no position."""
    return scaled_dot_product_attention(q, k, v)


class Biased(torch.nn.Module):
    """Softmax attention with a learned bias (H, N, N) on the logits."""

    def __init__(self, heads: int, tokens: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.bias = torch.nn.Parameter(torch.zeros(1, heads, tokens, tokens, dtype=dtype, device=device))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(B, H, N, D) each -> (B, H, N, D)."""
        return scaled_dot_product_attention(q, k, v, self.bias)


def forward(layer: Layer, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], None]:
    """A forward pass as in evaluation."""

    def call() -> None:
        with torch.inference_mode():
            layer(q, k, v)

    return call


def step(layer: Layer, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], None]:
    """Forward and backward, to the inputs and the layer's parameters."""
    inputs = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    parameters = list(layer.parameters()) if isinstance(layer, torch.nn.Module) else []
    gradient = torch.randn_like(v)

    def call() -> None:
        for x in [*inputs, *parameters]:
            x.grad = None
        layer(*inputs).backward(gradient)

    return call
