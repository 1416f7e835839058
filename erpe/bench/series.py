"""What a truncated series costs and how far it is from the exact general encoding, over the number of its terms."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from erpe.bench.layers import SDPA, LayerShape, forward, grid_of, plain, step
from erpe.bench.timing import compete, machine
from erpe.errors import ConfigError
from erpe.model.attention import Attention, build_attention
from erpe.model.encoding import GeneralRPE

VARIANTS = ("relu_general", "favor_general")


def bench_series(
    variants: list[str], tokens: list[int], ranks: list[int], shape: LayerShape, *, rounds: int, device: torch.device
) -> dict[str, Any]:
    """Milliseconds and error of each rank, for a bias that falls with the distance to 1/e^2 across half the grid.

    Returns:
        `machine`, and a row for each pass, N, variant and rank (None: exact): those of `compete`, `tokens`, `batch`,
        `pass`, `rank`, and `error`: root mean square of the difference to the exact layer, over that of its output.
    Raises:
        ConfigError: a variant that has no series.
    """
    for name in variants:
        if name not in VARIANTS:
            raise ConfigError(f"{name} has no series; {' and '.join(VARIANTS)} have one")
    rows = []
    for n in tokens:
        batch = shape.batch_at(n)
        q, k, v = torch.randn(3, batch, shape.heads, n, shape.head_dim, dtype=torch.float32, device=device)
        layers = {
            (name, rank): local_layer(name, n, rank, shape).to(device) for name in variants for rank in (None, *ranks)
        }
        errors = {key: error(layer, layers[key[0], None], q, k, v) for key, layer in layers.items()}
        named = {f"{name}, {'exact' if rank is None else f'rank {rank}'}": (name, rank) for name, rank in layers}
        for what, wrap in {"forward": forward, "step": step}.items():
            calls = {SDPA: wrap(plain, q, k, v)} | {told: wrap(layers[key], q, k, v) for told, key in named.items()}
            for row in compete(calls, rounds, device):
                key = named.get(row["name"])
                more = {"rank": key[1] if key else None, "error": errors[key] if key else None}
                rows.append({"tokens": n, "batch": batch, "pass": what} | row | more)
    return {"machine": machine(device) | shape._asdict(), "rows": rows}


def local_layer(variant: str, tokens: int, rank: int | None, shape: LayerShape) -> Attention:
    """Return a layer whose weights fall with the distance."""
    h, w = grid_of(tokens)
    layer = build_attention(
        variant, grid=(h, w), heads=shape.heads, head_dim=shape.head_dim, features=shape.features, rank=rank
    )
    sides = [torch.linspace(-2, 2, 2 * n - 1, dtype=torch.float32, device="cpu") for n in (h, w)]
    y, x = torch.meshgrid(*sides, indexing="ij")
    assert isinstance(layer.encoding, GeneralRPE)
    with torch.no_grad():
        layer.encoding.bias.copy_((-2 * (y**2 + x**2)).expand(shape.heads, -1, -1))
    return layer


@torch.no_grad()
def error(layer: Attention, exact: Attention, q: Tensor, k: Tensor, v: Tensor) -> float:
    """Relative, of the output."""
    wanted = exact(q, k, v)
    return float(((layer(q, k, v) - wanted).square().mean() / wanted.square().mean()).sqrt())
