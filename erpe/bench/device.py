"""What is the fastest way to train on a device: one graph or many launches, and whose softmax attention.

What is found stands in the store, for its trials: see `erpe.training.choices`.
"""

from __future__ import annotations

from typing import Any

import torch

from erpe.bench.backends import bench_backends
from erpe.bench.layers import LayerShape
from erpe.bench.packing import steps_of
from erpe.bench.timing import compete, machine
from erpe.bench.train import ENDLESS, imagined
from erpe.config import TrialConfig, defaults
from erpe.errors import ConfigError
from erpe.training.choices import size
from erpe.training.devices import pick_device
from erpe.training.graph import CudaGraphs
from erpe.training.precision import pick_precision

STEPS = 64
"""Steps of an epoch: a pack captures once an epoch, which counts."""

FASTER = 0.95
"""Of the plain step's time a graph must take less."""


def bench_device(
    variants: list[str],
    dataset: str,
    pack: int = 4,
    *,
    rounds: int = 5,
    settings: dict[str, Any] | None = None,
    device: str = "auto",
    graphs: CudaGraphs | None = None,
) -> dict[str, Any]:
    """Time steps as CUDA graphs and without, of trials and of packs, and the backends of softmax attention.

    Args:
        settings: of the trials, beside the data set's defaults.
        graphs: what captures; default: CUDA.
    Returns:
        `chosen`, what `erpe.training.choices` reads; `machine`, and a row each as `compete` gives them: `ms` of an
        epoch of `STEPS` steps, or of softmax attention.
    Raises:
        ConfigError: the device has no choice.
    """
    where = pick_device(device)
    if where.type != "cuda" and graphs is None:
        raise ConfigError(f"device {where}: it trains in one way only; use a GPU of NVIDIA instead")
    base = defaults("softmax", dataset).replace(ENDLESS | (settings or {}))
    images, rows = imagined(base, STEPS).to(where), []
    faster: dict[int, list[str]] = {1: [], pack: []}
    for variant in variants:
        config = base.replace({"model.variant": variant})
        for count, chosen in faster.items():
            name = f"{variant}, {'alone' if count == 1 else f'{count} in a pack'}"
            ways = {f"{name}, {way}": steps_of(config, count, images, where, own) for way, own in
                    {"plain": None, "graph": graphs or CudaGraphs()}.items()}  # fmt: skip
            found = compete(ways, rounds, where)
            rows += found
            if found[1]["ratio"] < FASTER:
                chosen.append(variant)
    backends: dict[str, str] = {}
    for variant in ("softmax", "softmax_general"):
        config = base.replace({"model.variant": variant})
        for precision in dict.fromkeys((pick_precision(config, where), "float32")):  # of training, and of evaluation
            found = backend_times(config, precision, rounds, where)
            where_fast = size(config.model, precision)
            backends |= {where_fast: min(found, key=lambda row: row["ms"])["name"]} if found else {}
            rows += [row | {"name": f"softmax attention, {where_fast}, {row['name']}"} for row in found]
    best = {"step": faster[1], "pack": faster[pack], "backends": backends}
    shown = {"batch": base.train.batch, "dataset": dataset, "steps": STEPS} | (settings or {})
    return {"machine": machine(where) | shown, "chosen": best, "rows": rows}


def backend_times(config: TrialConfig, precision: str, rounds: int, device: torch.device) -> list[dict[str, Any]]:
    """Return the times of all backends that serve softmax attention at a trial's size, with its log-weights if any."""
    model, dtype = config.model, getattr(torch, precision)
    shape = LayerShape(model.heads, model.head_dim, batch=config.train.batch)
    grid = model.grid if model.encoding == "general" else None
    rows = bench_backends(model.grid[0] * model.grid[1], shape, rounds=rounds, device=device, dtype=dtype, grid=grid)
    return [row for row in rows if row["ms"] is not None]
