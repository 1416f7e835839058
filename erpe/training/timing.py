"""The times of a published table: finished runs, one after the other in one process, on a machine without other work.

    time_runs([study/softmax/seed-0, study/relu/seed-0, ..., study/softmax/seed-1, ...])

The order interleaves the arms of a study, so that a machine that slows down slows them all.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from erpe.io import read_json
from erpe.training.checkpoint import load_model
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
    on_run: Callable[[int, int], None] = lambda done, runs: None,
) -> list[dict[str, float]]:
    """Time inference and training of finished runs, each in the precision in which it was trained.

    Args:
        folders: a run each.
        on_run: called with the runs done and all of them.
    Returns:
        for each run: `time/inference_*` (see `inference_time`) and `time/train_seconds_per_epoch`: the median of
        some training steps, compiled where a trial's are, times the steps of an epoch.
    Raises:
        StoreError: a run's model or outcome is missing or damaged.
    """
    found = []
    for done, folder in enumerate(folders, 1):
        found.append(_time_run(folder, data_dir, pick_device(device)))
        on_run(done, len(folders))
    return found


def _time_run(folder: Path, data_dir: str | Path | None, device: torch.device) -> dict[str, float]:
    model, config = load_model(folder)
    model = model.to(device)
    images = load_training(config.data, data_dir).train.to(device)
    found = inference_time(model, images, config.data.dataset)
    trainer = Trainer(config, model, images, device)
    path = folder / "outcome.json"
    trainer.compute_in(recorded_precision(read_json(path), path, trainer.precision))
    return found | {"time/train_seconds_per_epoch": seconds_per_step(trainer) * trainer.steps}


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
