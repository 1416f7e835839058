"""What every attention layer must hold, checked for one that someone else wrote: `erpe check-plugin`.

for check in check_variant("relu_alibi"):
    check.what, check.well, check.text
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import functional_call, stack_module_state, vmap

from erpe.config import ModelConfig
from erpe.errors import ConfigError, ErpeError
from erpe.model.attention import Attention, build_attention
from erpe.model.flops import attention_cost, counted_cost, is_counted
from erpe.training.vmap_attention import Fold

GRID, HEADS, HEAD_DIM, V_DIM = (3, 5), 2, 8, 5
"""All different, so that a swapped axis is seen."""

TOLERANCE = 1e-6
"""Of sums of float64, relative to the largest."""

ROUNDED = 0.1
"""The same in bfloat16, whose numbers have three digits."""

Inputs = tuple[Tensor, Tensor, Tensor]


class Check(NamedTuple):
    """What was found of one property."""

    what: str
    well: bool | None
    """None: told, neither right nor wrong."""
    text: str


def check_variant(variant: str) -> list[Check]:
    """Check an attention layer on a (3, 5) grid, with random position parameters, mostly in float64."""
    try:
        _layer(variant)
    except ConfigError as error:
        return [Check("may be built", None, str(error))]
    except Exception as error:  # of code that someone else wrote
        return [Check("may be built", False, f"{type(error).__name__}: {error}".partition("\n")[0][:200])]
    return [_guarded(what, variant, check) for what, check in _CHECKS.items()]


def _guarded(what: str, variant: str, check: Callable[[str], tuple[bool | None, str]]) -> Check:
    try:
        return Check(what, *check(variant))
    except Exception as error:  # of code that someone else wrote
        said = str(error).partition("\n")[0][:200]
        return Check(what, False, said if isinstance(error, ErpeError) else f"{type(error).__name__}: {said}")


def _layer(variant: str, seed: int = 0) -> Attention:
    layer = build_attention(variant, grid=GRID, heads=HEADS, head_dim=HEAD_DIM, seed=seed).double()
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(
                torch.randn(parameter.shape, generator=generator, dtype=torch.float64, device="cpu"), alpha=0.3
            )
    return layer


def _inputs(batch: int = 2, seed: int = 2) -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    size = (batch, HEADS, GRID[0] * GRID[1])
    q, k, v = (
        torch.randn(*size, last, generator=generator, dtype=torch.float64, device="cpu")
        for last in (HEAD_DIM, HEAD_DIM, V_DIM)
    )
    return q, k, v


def _close(found: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> tuple[bool, str]:
    found, expected = found.detach(), expected.detach()
    error = float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-12))
    return error < tolerance, f"relative error {error:.1e}"


def _rows(variant: str) -> tuple[bool, str]:
    q, k, _ = _inputs()
    sums = _layer(variant).weights(q, k).sum(-1)
    return _close(sums, torch.ones_like(sums))


def _twin(variant: str) -> tuple[bool, str]:
    layer, (q, k, v) = _layer(variant), _inputs()
    return _close(layer(q, k, v), layer.weights(q, k) @ v)


def _gradients(variant: str) -> tuple[bool, str]:
    layer, inputs = _layer(variant), [x.requires_grad_() for x in _inputs()]
    layer(*inputs).square().sum().backward()
    named = [*layer.named_parameters(), *zip("qkv", inputs, strict=True)]
    dead = [name for name, x in named if x.grad is None or not x.grad.isfinite().all() or not x.grad.any()]
    count = sum(1 for _ in layer.parameters())
    return not dead, f"none, or not finite, for {', '.join(dead)}" if dead else f"reach q, k, v and {count} parameters"


def _batch(variant: str) -> tuple[bool, str]:
    layer, (q, k, v) = _layer(variant), _inputs()
    wild = [torch.cat([x[:1], 100 * x[1:]]) for x in (q, k, v)]
    return _close(layer(*wild)[:1], layer(q, k, v)[:1])


def _half(variant: str) -> tuple[bool, str]:
    """As it is trained in bfloat16 (`train.precision`), value and gradient against those of float32."""
    layer, inputs = _layer(variant).float(), [x.bfloat16() for x in _inputs()]
    found = []
    for own in ([x.float().requires_grad_() for x in inputs], [x.requires_grad_() for x in inputs]):
        with torch.autocast("cpu", torch.bfloat16, enabled=own[0].dtype == torch.bfloat16):
            y = layer(*own)
        y.float().square().sum().backward()
        found.append(torch.cat([each.flatten().float() for each in (y, *(x.grad for x in own if x.grad is not None))]))
    return _close(found[1], found[0], ROUNDED)


def _relative(variant: str) -> tuple[None, str]:
    """With the same q and k everywhere, a weight over the token's own depends on the offset alone."""
    q, k, _ = _inputs(1)
    alike = [x[:, :, :1].expand(-1, -1, GRID[0] * GRID[1], -1).contiguous() for x in (q, k)]
    a = _layer(variant).weights(*alike)[0].detach()  # (H, N, N)
    a = (a / a.diagonal(dim1=1, dim2=2)[..., None]).unflatten(2, GRID).unflatten(1, GRID)  # (H, h, w, h, w)
    moved = (a[:, 1:, 1:, 1:, 1:] - a[:, :-1, :-1, :-1, :-1]).abs().max() / a.abs().max()
    flat = (a - a.flatten(1)[:, 0, None, None, None, None]).abs().max() < TOLERANCE
    if flat:
        return None, "knows no positions"
    change = f"not relative: weights change by {100 * float(moved):.2g} % in a move"
    return None, "relative" if moved < TOLERANCE else change


def _flops(variant: str) -> tuple[bool | None, str]:
    config = ModelConfig(variant=variant, image=(1, 12, 20), classes=2, patch=4, width=HEADS * HEAD_DIM, heads=HEADS)
    counted, tokens = counted_cost(config), GRID[0] * GRID[1]
    if is_counted(config):
        return None, f"none declared; torch counts {counted.forward:,.0f} forward, {counted.train:,.0f} a step"
    declared = attention_cost(config, tokens)
    return declared == counted, f"declared {declared.forward:,.0f} and {declared.train:,.0f}, torch counts " + (
        f"{counted.forward:,.0f} and {counted.train:,.0f}"
    )


def _vmap(variant: str) -> tuple[bool, str]:
    layers, inputs = [_layer(variant, seed) for seed in (0, 1)], [_inputs(seed=seed) for seed in (2, 3)]
    parameters, buffers = stack_module_state(layers)

    def one(parameters: dict[str, Tensor], buffers: dict[str, Tensor], *inputs: Tensor) -> Tensor:
        return functional_call(layers[0], (parameters, buffers), inputs)

    with Fold():
        stacked = [torch.stack(each) for each in zip(*inputs, strict=True)]
        found = vmap(one, randomness="error")(parameters, buffers, *stacked)
    return _close(found, torch.stack([layer(*own) for layer, own in zip(layers, inputs, strict=True)]))


_CHECKS: dict[str, Callable[[str], tuple[bool | None, str]]] = {
    "rows sum to 1": _rows,
    "dense twin": _twin,
    "gradients": _gradients,
    "batch independence": _batch,
    "bfloat16": _half,
    "positions": _relative,
    "FLOPs": _flops,
    "vmap": _vmap,
}
