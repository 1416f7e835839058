"""What an attention layer costs against torch's fused softmax attention, over the number of tokens."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from erpe.bench.memory import bounded, peak_bytes
from erpe.bench.timing import compete, machine
from erpe.errors import ConfigError
from erpe.model.attention import build_attention
from erpe.text import out_of_memory

SDPA = "torch SDPA"
THEIRS = "performer-pytorch"
MIB = 2**20


class LayerShape(NamedTuple):
    """Sizes of a layer, and how much is given to it at once."""

    heads: int = 4
    head_dim: int = 32
    features: int | None = 32
    batch_tokens: int = 4096
    """B N, so that every N is the same amount of tokens; where N is greater, B is 1."""
    batch: int | None = None
    """B for every N; none: as `batch_tokens` says."""

    def batch_at(self, tokens: int) -> int:
        """B at an N."""
        return self.batch or max(1, self.batch_tokens // tokens)


def grid_of(tokens: int) -> tuple[int, int]:
    """Return the most nearly square (h, w) with h w = N."""
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
    """Milliseconds, and MiB at the peak, of a forward pass and of a training step (forward and backward) of each layer
    at each N.

    Args:
        options: of `AttentionConfig`, for all layers, such as `method`.
    Returns:
        `machine`, and rows as `compete` gives them, each with `tokens`, `batch`, `pass` (`forward`, `step`) and
        `peak_mib`. The first of each N is torch's SDPA without bias, the second the one with a learned bias; at the
        end are those of performer-pytorch, if it is installed. Where the memory has no room for a layer, its numbers
        are None and `n` is 0.
    Raises:
        ConfigError: a number of tokens, or an option, that makes no sense.
    """
    if min(tokens) < 1:
        raise ConfigError(f"tokens: {min(tokens)} given; use 1 or more instead")
    rows = []
    with bounded(device):
        for n in tokens:
            batch = shape.batch_at(n)
            q, k, v = torch.randn(3, batch, shape.heads, n, shape.head_dim, dtype=dtype, device=device)
            makers = contenders(variants, n, shape, device, dtype, **options)
            for what, wrap in {"forward": forward, "step": step}.items():
                ready = {name: partial(_ready, make, wrap, q, k, v) for name, make in makers.items()}
                rows += [{"tokens": n, "batch": batch, "pass": what} | row for row in measured(ready, rounds, device)]
    sizes = shape._asdict() | {"dtype": str(dtype).removeprefix("torch.")} | options
    return {"machine": machine(device) | sizes, "rows": rows}


Layer = Callable[[Tensor, Tensor, Tensor], Tensor]
Wrap = Callable[[Layer, Tensor, Tensor, Tensor], Callable[[], None]]


def contenders(
    variants: list[str], tokens: int, shape: LayerShape, device: torch.device, dtype: torch.dtype, **options: Any
) -> dict[str, Callable[[], Layer]]:
    """Name -> what makes a layer over N tokens: torch's SDPA without and with a bias, ours, and performer-pytorch's."""
    sizes: dict[str, Any] = {"grid": grid_of(tokens), **shape._asdict()} | options
    del sizes["batch"], sizes["batch_tokens"]
    ours = {name: partial(_ours, name, device, sizes) for name in variants}
    makers: dict[str, Callable[[], Layer]] = {
        SDPA: lambda: plain,
        f"{SDPA}, bias": partial(Biased, shape.heads, tokens, dtype, device),
    }
    return makers | ours | theirs(shape, device, dtype)


def _ours(variant: str, device: torch.device, sizes: dict[str, Any]) -> Layer:
    return build_attention(variant, **sizes).to(device)


def theirs(shape: LayerShape, device: torch.device, dtype: torch.dtype) -> dict[str, Callable[[], Layer]]:
    """Return the layers of performer-pytorch that have a counterpart here, if it is installed."""
    if importlib.util.find_spec("performer_pytorch") is None:
        return {}
    from performer_pytorch import FastAttention

    def favor() -> Layer:
        return FastAttention(shape.head_dim, shape.features or 2 * shape.head_dim).to(device, dtype)

    def relu() -> Layer:
        layer = FastAttention(shape.head_dim, generalized_attention=True)
        layer.projection_matrix = None  # as ours, without a projection
        return layer.to(device, dtype)

    return {f"{THEIRS}, favor": favor, f"{THEIRS}, relu": relu}


def _ready(make: Callable[[], Layer], wrap: Wrap, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], None]:
    return wrap(make(), q, k, v)


def measured(
    ready: Mapping[str, Callable[[], Callable[[], None]]], rounds: int, device: torch.device
) -> list[dict[str, Any]]:
    """Rows of `compete` with `peak_mib`, in the order given; what has no room is left out of the rounds.

    Args:
        ready: name -> what makes the call.
    """
    calls: dict[str, Callable[[], None]] = {}
    peaks: dict[str, int] = {}
    for name, make in ready.items():
        try:
            call = make()
            call()  # the first builds what stays
            calls[name], peaks[name] = call, peak_bytes(call, device)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
    timed = {row["name"]: row | {"peak_mib": peaks[row["name"]] / MIB} for row in compete(calls, rounds, device)}
    nothing = dict.fromkeys(("ms", "low", "high", "ratio", "peak_mib")) | {"n": 0}
    return [timed.get(name, {"name": name, **nothing}) for name in ready]


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
    """Run a forward pass as in evaluation."""

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
        layer(*inputs).backward(gradient)
        for x in [*inputs, *parameters]:
            x.grad = None  # now: the next call's peak is its own

    return call
