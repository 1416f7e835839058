"""What bfloat16 brings: each variant's training in both precisions, in the same rounds."""

from __future__ import annotations

from typing import Any

from erpe.bench.timing import compete, machine
from erpe.bench.train import ENDLESS, epochs_of, imagined
from erpe.config import defaults
from erpe.errors import ConfigError
from erpe.model import build
from erpe.training.devices import pick_device
from erpe.training.loop import Trainer
from erpe.training.precision import bfloat16_unit

PRECISIONS = ("float32", "bfloat16")
SIZE = {"model.patch": 4, "model.width": 64, "model.depth": 4, "model.heads": 4, "train.batch": 128}
"""Of every model, unless it is set otherwise."""
STEPS = 4
"""Steps a round."""


def bench_precision(
    variants: list[str],
    datasets: list[str],
    *,
    rounds: int = 7,
    settings: dict[str, Any] | None = None,
    device: str = "auto",
) -> dict[str, Any]:
    """Images a second in training, by erpe's own loop, of each variant in float32 and in bfloat16.

    Args:
        datasets: those whose images' form is taken; the images are noise. One after the other.
        settings: dotted names, as `model.width` and `train.batch`, that all have.
    Returns:
        `machine`, and a row for each data set, variant and precision: `name`, `ms` (of a step, median over `n`
        rounds), `low`, `high`, `ratio` (of `ms`, to that of the variant in float32), `images_per_second`.
    Raises:
        ConfigError: the precision is among the settings.
    """
    if "train.precision" in (settings or {}):
        raise ConfigError("train.precision is what is compared; leave it out")
    where, size = pick_device(device), SIZE | (settings or {})
    rows = []
    for dataset in dict.fromkeys(datasets):
        base = defaults("softmax", dataset).replace(size)
        images = imagined(base, STEPS).to(where)
        configs = {
            (variant, precision): base.replace({"model.variant": variant, "train.precision": precision} | ENDLESS)
            for variant in dict.fromkeys(variants)
            for precision in PRECISIONS
        }
        calls = {
            f"{variant}, {precision}": epochs_of(Trainer(config, build(config.model).to(where), images, where))
            for (variant, precision), config in configs.items()
        }
        found = dict(zip(configs, compete(calls, rounds, where), strict=True))
        for (variant, precision), row in found.items():
            row |= {key: row[key] / STEPS for key in ("ms", "low", "high")}
            row |= {"dataset": dataset, "variant": variant, "precision": precision}
            row |= {"ratio": row["ms"] / found[variant, "float32"]["ms"]}
            row |= {"images_per_second": 1000 * base.train.batch / row["ms"]}
            rows.append(row)
    return {"machine": machine(where) | {"bfloat16": bfloat16_unit(where) or "none"} | size, "rows": rows}
