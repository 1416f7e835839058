"""The times of a published table: finished runs, one after the other in one process, on a machine without other work.

    time_runs([study/softmax/seed-0, study/relu/seed-0, ..., study/softmax/seed-1, ...])

The order interleaves the arms of a study, so that a machine that slows down slows them all. Like is compared with like:
all are timed compiled where trials are, and if one of them cannot be, all as they are.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from erpe.io import read_json
from erpe.training.checkpoint import MODEL, load_model
from erpe.training.choices import Choices, choices_of
from erpe.training.compilation import is_wanted
from erpe.training.data import load_training
from erpe.training.devices import pick_device
from erpe.training.evaluate import inference_time, wait_for
from erpe.training.loop import Trainer
from erpe.training.precision import recorded_precision

WARM_UP, STEPS = 3, 20
"""Training steps before the clock starts, and steps that are timed."""


def time_runs(
    folders: Sequence[Path],
    *,
    data_dir: str | Path | None = None,
    device: str = "auto",
    devices: Mapping[str, Any] | None = None,
    on_run: Callable[[int, int], None] = lambda done, runs: None,
) -> list[dict[str, float]]:
    """Time inference and training of finished runs, each in the precision in which it was trained.

    Args:
        folders: a run each.
        devices: what is the fastest on each, see `Store.devices`.
        on_run: called with the runs done and all of them.
    Returns:
        for each run: `time/inference_*` (see `inference_time`), `time/train_seconds_per_epoch`: the median of some
        training steps, times the steps of an epoch; and `time/compiled`: 1, or 0 where all ran as they are. Nothing
        for a run whose model is not there any more.
    Raises:
        StoreError: a run's model is damaged, its outcome or `devices` are missing or damaged.
    """
    where, there = pick_device(device), [folder for folder in folders if (folder / MODEL).is_file()]
    choices = choices_of(devices or {}, where)
    for compiled in (True, False):
        found = list[dict[str, float]]()
        for done, folder in enumerate(there, 1):
            found.append(_time_run(folder, data_dir, where, choices, compiled))
            if compiled and not found[-1]["time/compiled"]:
                break
            on_run(done, len(there))
        else:
            break
    times = dict(zip(there, found, strict=True))
    return [times.get(folder, {}) for folder in folders]


def _time_run(
    folder: Path, data_dir: str | Path | None, device: torch.device, choices: Choices, compiled: bool
) -> dict[str, float]:
    """As `time_runs`; alone `time/compiled` 0 if the run is not to be compiled, or cannot be."""
    model, config = load_model(folder)
    not_compiled, failed = {"time/compiled": 0.0}, list[str]()
    if compiled and not is_wanted(config.train, device):
        return not_compiled
    images = load_training(config.data, data_dir).train.to(device)
    config = config if compiled else config.replace({"train.compile": "off"})
    trainer = Trainer(config, model.to(device), images, device, failed.append, choices)
    path = folder / "outcome.json"
    trainer.compute_in(recorded_precision(read_json(path), path, trainer.precision))
    with choices.sdpa(config, "float32"):
        found = inference_time(trainer.model, images, config.data.dataset, fastest=trainer.fastest)
    found |= {"time/train_seconds_per_epoch": seconds_per_step(trainer) * trainer.steps}
    if failed:
        warnings.warn(f"{failed[0]}; so all runs are timed without it", stacklevel=2)
        return not_compiled
    return found | {"time/compiled": float(compiled)}


def seconds_per_step(trainer: Trainer) -> float:
    """Median over training steps after warm-up, the device synchronised; the model is trained on, a little."""
    train, count = trainer.config.train, len(trainer.images.labels)
    order = torch.Generator().manual_seed(0)
    trainer.model.train()
    times = []
    for turn in range(WARM_UP + STEPS):
        size = (min(train.batch, count),)
        rows = torch.randint(count, size, generator=order, dtype=torch.int64, device="cpu").to(trainer.device)
        wait_for(trainer.device)
        started = time.perf_counter()
        trainer.step(rows, train.lr * 1e-3)
        wait_for(trainer.device)
        if turn >= WARM_UP:
            times.append(time.perf_counter() - started)
    return statistics.median(times)
