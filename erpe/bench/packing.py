"""What it brings to train several trials as one program: time of a step of one trial, alone and in packs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from erpe.bench.timing import compete, machine
from erpe.bench.train import ENDLESS, imagined
from erpe.config import TrialConfig, defaults
from erpe.errors import ConfigError
from erpe.model import build
from erpe.training.batched import Pack
from erpe.training.data import Images
from erpe.training.devices import pick_device
from erpe.training.graph import CudaGraphs
from erpe.training.loop import Trainer

STEPS = 4
"""Steps of each trial a round."""


def bench_packs(
    variants: list[str],
    dataset: str,
    sizes: list[int],
    *,
    rounds: int = 5,
    settings: dict[str, Any] | None = None,
    device: str = "auto",
) -> dict[str, Any]:
    """Milliseconds of a training step of one trial, alone and as its share of packs of several sizes.

    Returns:
        `machine`, and a row for each variant and size as `compete` gives them: `name`, `pack`, `ms`, `low`, `high`,
        `ratio` (to the first size), `n`, and `trials_per_hour` (all steps of a trial, evaluation left out).
    Raises:
        ConfigError: a size below 1.
    """
    if min(sizes) < 1:
        raise ConfigError(f"pack: {min(sizes)} given; use 1 or more instead")
    where, rows = pick_device(device), []
    base = defaults("softmax", dataset).replace(settings or {})
    images = imagined(base, STEPS).to(where)
    for variant in variants:
        config = base.replace({"model.variant": variant} | ENDLESS)
        calls = {
            f"{variant}, {'alone' if k == 1 else f'{k} in a pack'}": steps_of(config, k, images, where) for k in sizes
        }
        found = compete(calls, rounds, where)
        for size, row in zip(sizes, found, strict=True):
            row |= {key: row[key] / (STEPS * size) for key in ("ms", "low", "high")} | {"pack": size}
            row |= {"ratio": row["ms"] / found[0]["ms"], "trials_per_hour": 3.6e6 / (row["ms"] * steps_of_trial(base))}
        rows += found
    shown = {"batch": base.train.batch, "dataset": dataset} | (settings or {})
    return {"machine": machine(where) | shown, "rows": rows}


def steps_of_trial(config: TrialConfig) -> int:
    """All steps of a trial."""
    images = config.data.facts.train * (1 - config.data.validation)
    return config.train.epochs * -(-round(config.data.train_limit or images) // config.train.batch)


def steps_of(
    config: TrialConfig, size: int, images: Images, device: torch.device, graphs: CudaGraphs | None = None
) -> Callable[[], None]:
    """Train an epoch of that number of trials at each call: a trial alone by its own loop, others as a pack.

    Args:
        graphs: what makes one graph of a step; default: nothing does.
    """
    trainers = [
        Trainer(config.replace({"seed": k}), build(config.model, k).to(device), images, device) for k in range(size)
    ]
    trainers[0].graphs = trainers[0].pack_graphs = graphs
    done = iter(range(10**9))

    def call() -> None:
        epoch = next(done)
        if size == 1:
            trainers[0].epoch(epoch)
        else:
            Pack(trainers).epoch([epoch] * size)

    return call
