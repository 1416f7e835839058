"""One trial from configuration to measures, an epoch at a time, resumable from its folder after every epoch."""

from __future__ import annotations

import contextlib
import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path

import torch

from erpe.config import TrialConfig
from erpe.errors import StoreError, TrialError
from erpe.model import build
from erpe.model.flops import forward_flops, train_step_flops
from erpe.store import write_atomic
from erpe.training.checkpoint import STATE, load_model, load_tensors, save_model, save_tensors, writing
from erpe.training.data import load_test, load_training
from erpe.training.evaluate import (
    confusion,
    inference_time,
    information_criteria,
    logits_of,
    peak_memory_mib,
    per_class,
    reset_peak_memory,
    save_attention_example,
    scores,
)
from erpe.training.loop import OnStep, Trainer, pick_device

Report = Callable[[int, dict[str, float]], bool]
"""Called after each epoch with its number (from 1) and measures; True asks to stop."""


class Trial:
    """A configuration in training. Made again on the same folder, it goes on after the last finished epoch.

    Args:
        config: what to train.
        folder: where its checkpoint and results lie.
        data_dir: see `erpe.training.data.find_data_dir`.
        device: `auto`, or a torch device.
        on_step: called with the steps done and all steps of the running epoch.
    Raises:
        DataError, ConfigError, StoreError: see `load_training`, `pick_device`, `save_tensors`.
    """

    def __init__(
        self,
        config: TrialConfig,
        folder: Path,
        *,
        data_dir: str | Path | None = None,
        device: str = "auto",
        on_step: OnStep | None = None,
    ) -> None:
        self.config, self.folder, self.on_step = config, folder, on_step
        self.device = pick_device(device)
        reset_peak_memory(self.device)
        self.split = load_training(config.data, data_dir)
        self.validation = self.split.validation.to(self.device)
        model = build(config.model, config.seed).to(self.device)
        self.trainer = Trainer(config, model, self.split.train.to(self.device), self.device)
        self.history: list[dict[str, float]] = []
        """An entry an epoch: `epoch` (from 1), `train/loss`, `val/loss`, `val/accuracy`, `lr`, `time/epoch_seconds`."""
        if (folder / STATE).exists():
            self._resume()

    @property
    def done(self) -> bool:
        """Whether all epochs are trained."""
        return len(self.history) >= self.config.train.epochs

    def epoch(self) -> dict[str, float]:
        """Train one epoch, validate, save the checkpoint.

        Raises:
            TrialError: the loss of a step, or on the validation part, is not finite.
            StoreError: the checkpoint cannot be written; the one before it is intact.
        """
        found = {"epoch": float(len(self.history) + 1)} | self.trainer.epoch(len(self.history), self.on_step)
        if len(self.validation.labels):
            logits = logits_of(self.trainer.final, self.validation, self.config.data.dataset)
            measured = scores(logits, self.validation.labels, "val")
            found |= {name: measured[name] for name in ("val/loss", "val/accuracy")}
            if not math.isfinite(found["val/loss"]):
                last = int(found["epoch"]) * self.trainer.steps - 1
                raise TrialError(f"the validation loss after step {last} is not finite; a smaller train.lr would do")
        self.history.append(found)
        save_tensors(self.folder / STATE, self.trainer.state(), self._facts() | {"history": self.history})
        return found

    def finish(self) -> dict[str, float]:
        """Measure the trained model cheaply, on the validation part only, and write the trial's results.

        Returns:
            `val/*`, `params`, `flops/*`, `time/train_seconds_per_epoch`, `memory/peak_mib`.
        Raises:
            StoreError: the results cannot be written; the last epoch's checkpoint is intact.
        """
        model, dataset = self.trainer.final, self.config.data.dataset
        found = cost(self.config) | {
            "params": float(sum(p.numel() for p in model.parameters())),
            "time/train_seconds_per_epoch": seconds_per_epoch(self.history),
            "memory/peak_mib": peak_memory_mib(self.device),
        }
        save_model(self.folder, model, self.config)
        if len(self.validation.labels):
            logits = logits_of(model, self.validation, dataset)
            found |= scores(logits, self.validation.labels, "val")
            self._write("confusion.json", confusion(logits, self.validation.labels, dataset, "validation"))
            with writing(self.folder):
                save_attention_example(self.folder / "attention.npz", model, self.validation, dataset)
        self._write("outcome.json", {"metrics": found, "history": self.history, **self._facts()})
        (self.folder / STATE).unlink(missing_ok=True)
        return found

    def _facts(self) -> dict[str, str]:
        return {
            "config": self.config.model_dump_json(),
            "data_sha256": self.split.digest,
            "split_sha256": self.split.split_digest,
            "device": device_name(self.device),
            "threads": str(torch.get_num_threads()),
        }

    def _write(self, name: str, content: object) -> None:
        with writing(self.folder):
            write_atomic(self.folder / name, json.dumps(content))

    def _resume(self) -> None:
        """Take up the last epoch's checkpoint; a damaged one is set aside and its trial begins again."""
        path = self.folder / STATE
        try:
            tensors, facts = load_tensors(path)
            if facts["config"] != self.config.model_dump_json():
                raise StoreError(f"{path}: belongs to another configuration")
            self.trainer.load_state(tensors)
            self.history = facts["history"]
        except (StoreError, RuntimeError, KeyError, TypeError):
            with contextlib.suppress(FileNotFoundError):
                path.rename(path.with_suffix(".damaged"))
            model = build(self.config.model, self.config.seed).to(self.device)
            self.trainer = Trainer(self.config, model, self.trainer.images, self.device)


def objective(
    config: TrialConfig,
    report: Report,
    folder: Path,
    *,
    data_dir: str | Path | None = None,
    device: str = "auto",
    on_step: OnStep | None = None,
) -> dict[str, float] | None:
    """A whole trial: epochs until all are trained, or `report` asks to stop.

    Returns:
        The measures of `Trial.finish`, or None if it was stopped.
    """
    trial = Trial(config, folder, data_dir=data_dir, device=device, on_step=on_step)
    for past in trial.history:
        report(int(past["epoch"]), past)
    while not trial.done:
        measured = trial.epoch()
        if report(int(measured["epoch"]), measured) and not trial.done:
            return None
    return trial.finish()


def final_evaluation(folder: Path, *, data_dir: str | Path | None = None, device: str = "auto") -> dict[str, float]:
    """All measures of a finished trial. This opens the test split; call it once for a model that is confirmed.

    Returns:
        `test/*`, `train/log_likelihood`, `aic`, `bic`, `params`, `flops/*`, `time/inference_*`.
    Raises:
        StoreError: the trial's model is missing or damaged, or the results cannot be written.
    """
    model, config = load_model(folder)
    where, dataset = pick_device(device), config.data.dataset
    model = model.to(where)
    train = load_training(config.data, data_dir).train.to(where)
    test = load_test(dataset, data_dir).to(where)
    logits = logits_of(model, test, dataset)
    likelihood = scores(logits_of(model, train, dataset), train.labels, "train")["train/log_likelihood"]
    k = sum(p.numel() for p in model.parameters())
    found = scores(logits, test.labels, "test") | {"train/log_likelihood": likelihood, "params": float(k)}
    found |= information_criteria(likelihood, k, len(train.labels)) | cost(config)
    found |= inference_time(model, test, dataset)
    results = {
        "test.json": found,
        "confusion_test.json": confusion(logits, test.labels, dataset, "test"),
        "per_class.json": per_class(logits, test.labels, dataset),
    }
    with writing(folder):
        for name, content in results.items():
            write_atomic(folder / name, json.dumps(content))
        save_attention_example(folder / "attention.npz", model, test, dataset)
    return found


def cost(config: TrialConfig) -> dict[str, float]:
    """FLOPs an image, multiply and add counted as two, by the closed form."""
    return {
        "flops/forward": float(forward_flops(config.model)),
        "flops/train_step": float(train_step_flops(config.model)),
    }


def seconds_per_epoch(history: list[dict[str, float]]) -> float:
    """Median over epochs, the first left out if there are others; evaluation is not in it."""
    times = [epoch["time/epoch_seconds"] for epoch in history]
    return statistics.median(times[1:] or times)


def device_name(device: torch.device) -> str:
    """`cpu`, `mps`, or the name of the GPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
