"""How far a layer on a device is from float64, output and gradients."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from erpe.model import Attention, build_attention
from erpe.model.kernels import gpu

LIMITS = {torch.float32: 1e-3, torch.bfloat16: 2e-2}
"""The largest relative error, |x - exact| / |exact|; bfloat16 has 8 bits, so half of its limit is its own rounding."""

Row = dict[str, Any]


def ways_of_layer(variant: str) -> tuple[str, ...]:
    """By torch's operators, and by our kernels where there are some."""
    return ("kernels", "torch") if gpu.AVAILABLE and not variant.startswith("softmax") else ("torch",)


@contextmanager
def running(way: str) -> Iterator[None]:
    """In the block the kernels run if the way is not `torch`; that they cannot is an error here, not a warning."""
    if way == "torch":
        with gpu.torch_only():
            yield
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "kernels for GPUs")
        gpu.REFUSED.clear()  # what failed before is tried again
        yield


def layer_errors(
    variant: str, grid: tuple[int, int], dtype: torch.dtype, device: torch.device, way: str = "torch", d: int = 32
) -> Row:
    """Relative errors of the output and of the worst gradient. Inputs are rounded first: that is not counted."""
    images, heads = 3, 2
    generator = torch.Generator().manual_seed(0)
    layer = build_attention(variant, grid=grid, heads=heads, head_dim=d, seed=1)
    drawn = [
        torch.randn(images, heads, grid[0] * grid[1], d, generator=generator, dtype=torch.float32, device="cpu").to(
            dtype
        )
        for _ in range(4)
    ]
    with torch.no_grad():
        for parameter in layer.encoding.parameters():
            parameter.add_(
                torch.randn(parameter.shape, generator=generator, dtype=torch.float32, device="cpu"), alpha=0.3
            )
    exact = passed(copy.deepcopy(layer).double(), [x.double() for x in drawn])
    with running(way):
        found = passed(layer.to(device), [x.to(device) for x in drawn])
    errors = {name: relative_error(x, exact[name]) for name, x in found.items()}
    name, worst = max(errors.items(), key=lambda item: math.inf if math.isnan(item[1]) else item[1])
    row = {"kind": f"{dtype}, {way}", "limit": LIMITS[dtype], "ok": worst <= LIMITS[dtype]}
    return row | {"y": errors["y"], "worst": name, "error_of_all": worst}


def passed(layer: Attention, drawn: list[Tensor]) -> dict[str, Tensor]:
    """Output, and gradients of inputs and parameters, for q, k, v and the gradient of the output."""
    q, k, v = (x.detach().requires_grad_() for x in drawn[:3])
    y = layer(q, k, v)
    y.backward(drawn[3])
    learnt = {f"d_{name}": x.grad for name, x in layer.encoding.named_parameters() if x.grad is not None}
    inputs = {f"d_{name}": x.grad for name, x in zip("qkv", (q, k, v), strict=True) if x.grad is not None}
    return {"y": y.detach()} | inputs | learnt


def relative_error(x: Tensor, exact: Tensor) -> float:
    """|x - exact| / |exact|; NaN if any of it is."""
    return float((x.cpu().double() - exact).norm() / exact.norm())
