"""One trial from configuration to measures, an epoch at a time, resumable from its folder after every epoch."""

from __future__ import annotations

import contextlib
import json
import math
import os
import statistics
import uuid
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from erpe.config import TrialConfig, is_history, is_measures
from erpe.errors import StoreError, TrialError
from erpe.io import read_json, read_plain, write_atomic
from erpe.model import ViT, build
from erpe.model.flops import forward_flops, train_step_flops
from erpe.store import OWNER, STATE, let_go, tidy
from erpe.training.batched import Pack
from erpe.training.checkpoint import load_model, load_tensors, save_model, save_tensors, writing
from erpe.training.choices import choices_of, device_name
from erpe.training.data import load_test, load_training
from erpe.training.evaluate import (
    confusion,
    fit,
    inference_time,
    information_criteria,
    logits_of,
    peak_memory_mib,
    per_class,
    reset_peak_memory,
    save_attention_example,
    save_predictions,
    scores,
)
from erpe.training.loop import OnStep, Trainer, pick_device
from erpe.training.malloc import keep_heap
from erpe.training.precision import recorded_precision


class TakenOver(RuntimeError):
    """Another process trains this trial now. A process with the study's lock takes the trial back; one without ends."""


class Trial:
    """A configuration in training. Made again on the same folder, it goes on after the last finished epoch.

    Args:
        config: what to train.
        folder: where its checkpoint and results lie.
        data_dir: see `erpe.training.data.find_data_dir`.
        device: `auto`, or a torch device.
        on_step: called with the steps done and all steps of the running epoch.
        devices: what is the fastest on each, see `Store.devices`.
        timed: whether `finish` takes the time of inference, beside whatever else runs then.
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
        devices: Mapping[str, Any] | None = None,
        timed: bool = False,
    ) -> None:
        keep_heap()
        self.config, self.folder, self.on_step, self.timed = config, folder, on_step, timed
        self.device = pick_device(device)
        self.choices = choices_of(devices or {}, self.device)
        reset_peak_memory(self.device)
        self.split = load_training(config.data, data_dir)
        self.validation = self.split.validation.to(self.device)
        self._validation_labels = self.split.validation.labels
        self.images = self.split.train.to(self.device)
        self.warning: str | None = None
        """What someone should know: a damaged checkpoint, batches that had to be split, a compiler that failed."""
        self.trainer = self._at_start()
        self.history: list[dict[str, float]] = []
        """An entry an epoch: `epoch` (from 1), `train/loss`, `val/loss`, `val/accuracy`, `lr`, `time/epoch_seconds`."""
        self._trained: dict[str, float] | TrialError | None = None
        """What the next epoch's training, done ahead in a pack, came to."""
        self.saves_beside = self.device.type != "cpu"
        """Whether a thread writes checkpoints, while the device trains on."""
        self._writer = ThreadPoolExecutor(1)
        self._saving: Future[None] | None = None
        self._fits = True
        """Whether the device has had room for it, whole and beside others."""
        if os.path.lexists(folder / STATE):
            self._resume()
        self._owner = uuid.uuid4().hex
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            write_atomic(folder / OWNER, self._owner)

    @property
    def done(self) -> bool:
        """Whether all epochs are trained."""
        return len(self.history) >= self.config.train.epochs

    @staticmethod
    def ahead(trials: list[Trial]) -> None:
        """Train the next epoch of several trials of one shape as one program; `epoch` of each then goes on from there.

        Where the device has no memory for that, or some began elsewhere in another precision, or all are in float16,
        whose slopes each have a scale of their own, nothing is done ahead.
        See `erpe.training.batched`.
        """
        precisions = {trial.trainer.precision for trial in trials}
        if not all(trial._fits for trial in trials) or len(precisions) > 1 or "float16" in precisions:
            return

        def on_step(done: int, steps: int) -> None:
            for trial in trials:
                if trial.on_step:
                    trial.on_step(done, steps)

        try:
            pack = Pack([trial.trainer for trial in trials])
            found = pack.epoch([len(trial.history) for trial in trials], on_step)
        except torch.OutOfMemoryError:
            found = None
        for trial, trained in zip(trials, found or [], strict=False):
            trial._trained = trained
        if found is None:
            trials[0].warning = f"out of memory on {trials[0].device}: {len(trials)} trials do not fit together"
            for trial in trials:
                trial._rewind()
                trial._fits = False

    def epoch(self) -> dict[str, float]:
        """Train one epoch, validate, save the checkpoint.

        Where the device has no memory for a batch, the epoch begins again with the batches in more parts.

        Raises:
            TrialError: the loss of a step, or on the validation part, is not finite.
            StoreError: the checkpoint cannot be written, or the last one could not; the one before it is intact.
            TakenOver: another process trains this trial; nothing was written.
            OutOfMemoryError: there is no memory for a single image.
        """
        trained = self._train()
        while trained is None:
            self._split_batches()
            trained = self._train()
        found = {"epoch": float(len(self.history) + 1)} | trained
        if len(self.validation.labels):
            trainer = self.trainer
            logits = logits_of(trainer.final, self.validation, self.config.data.dataset, trainer.evaluated)
            measured = fit(logits, self._validation_labels)
            found |= {f"val/{name}": measured[name] for name in ("loss", "accuracy")}
            if not math.isfinite(found["val/loss"]):
                last = int(found["epoch"]) * self.trainer.steps - 1
                raise TrialError(f"the validation loss after step {last} is not finite; use a smaller train.lr")
        self.history.append(found)
        self.settle()
        facts = self._facts() | {"history": [*self.history]}
        if not self.saves_beside:
            self._save(self.trainer.state(), facts, contextlib.nullcontext())
        else:
            kept = {name: x.clone() for name, x in self.trainer.state().items()}
            self._saving = self._writer.submit(self._save, kept, facts, self._beside())
        return found

    def _beside(self) -> AbstractContextManager[Any]:
        """Return a context whose copies wait for what was asked for so far, and for nothing that comes later."""
        if self.device.type != "cuda":
            return contextlib.nullcontext()
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        return torch.cuda.stream(stream)

    def settle(self) -> None:
        """Wait until the last epoch's checkpoint is written: beside a GPU a thread does it, while the next one trains.

        Raises:
            StoreError, TakenOver: see `epoch`; then that checkpoint is not.
        """
        saving, self._saving = self._saving, None
        if saving is not None:
            saving.result()

    def _save(
        self,
        tensors: dict[str, Tensor],
        facts: dict[str, Any],
        beside: AbstractContextManager[Any],
    ) -> None:
        self._check_owner()
        with beside:
            save_tensors(self.folder / STATE, tensors, facts)

    def _train(self) -> dict[str, float] | None:
        """Train the next epoch; None if its batches do not fit into memory. An exception would hold tensors."""
        trained, self._trained = self._trained, None
        if isinstance(trained, TrialError):
            raise trained
        if trained is not None:
            return trained
        try:
            return self.trainer.epoch(len(self.history), self.on_step)
        except torch.OutOfMemoryError:
            if self.trainer.parts >= self.config.train.batch:
                raise
            return None

    def _split_batches(self) -> None:
        self._fits = False
        parts = 2 * self.trainer.parts
        self._rewind()
        self.trainer.parts = parts
        self.warning = f"out of memory on {self.device}: each batch of {self.config.train.batch} goes in {parts} parts"

    def _rewind(self) -> None:
        """Back to the last epoch's end."""
        self.settle()
        precision = self.trainer.precision
        del self.trainer  # there is no room for two
        self.trainer = self._at_start()
        self.trainer.compute_in(precision)
        if self.history:
            self.trainer.load_state(load_tensors(self.folder / STATE)[0])

    def _at_start(self) -> Trainer:
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        model = build(self.config.model, self.config.seed).to(self.device)
        return Trainer(self.config, model, self.images, self.device, self._warn, self.choices)

    def _warn(self, text: str) -> None:
        self.warning = text

    def finish(self) -> dict[str, float]:
        """Measure the trained model, write the trial's results, and remove the last epoch's checkpoint.

        Returns:
            `params`, `flops/*`, `time/train_seconds_per_epoch`, `memory/peak_mib`, and those of `measure`.
        Raises:
            StoreError: the results cannot be written; the last epoch's checkpoint is intact.
        """
        self.settle()
        model = self.trainer.final
        found = cost(self.config) | {
            "params": float(sum(p.numel() for p in model.parameters())),
            "time/train_seconds_per_epoch": seconds_per_epoch(self.history),
            "memory/peak_mib": peak_memory_mib(self.device),
        }
        self._check_owner()
        save_model(self.folder, model, self.config)
        found |= self.measure(model)
        self._check_owner()
        self._write("outcome.json", {"metrics": found, "history": self.history, **self._facts()})
        let_go(self.folder)
        return found

    def measure(self, model: ViT) -> dict[str, float]:
        """`val/*`: how good the model is, on the validation part only."""
        if not len(self.validation.labels):
            return {}
        dataset = self.config.data.dataset
        logits = logits_of(model, self.validation, dataset)
        self._write("confusion.json", confusion(logits, self.validation.labels, dataset, "validation"))
        with writing(self.folder):
            save_attention_example(self.folder / "attention.npz", model, self.validation, dataset)
        times = inference_time(model, self.images, dataset) if self.timed else {}
        return scores(logits, self.validation.labels, "val") | times

    def _check_owner(self) -> None:
        """Refuse to write.

        A process that was stopped, and wakes up when another one trains its trial, must not write.
        """
        try:
            same = read_plain(self.folder / OWNER, 100).decode(errors="replace") == self._owner
        except (OSError, StoreError):
            same = False
        if not same:
            raise TakenOver(f"{self.folder}: another process began to train this trial")

    def _facts(self) -> dict[str, str]:
        return {
            "config": self.config.model_dump_json(),
            "data_sha256": self.split.digest,
            "split_sha256": self.split.split_digest,
            "device": device_name(self.device),
            "threads": str(torch.get_num_threads()),
            "precision": self.trainer.precision,
            "compiled": "yes" if self.trainer.is_compiled else "no",
            "graph": "yes" if self.trainer.graphs else "no",
            "sdpa": self.choices.backend(self.config, self.trainer.precision) or "torch's choice",
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
            if not is_history(facts["history"], self.config):
                raise StoreError(f"{path}: its history is not that of a trial")
            precision = recorded_precision(facts, path, self.trainer.precision)
            self.trainer.compute_in(precision)  # as it began, whatever this machine would choose
            self.trainer.load_state(tensors)
            self.history = facts["history"]
        except (StoreError, RuntimeError, ValueError, KeyError, IndexError, TypeError) as error:
            said = " ".join(str(error).split())
            self.warning = f"{said}; set aside as {path.with_suffix('.damaged').name}, the trial begins again"
            with contextlib.suppress(FileNotFoundError):
                path.rename(path.with_suffix(".damaged"))
            self.trainer = self._at_start()


class Confirmation(Trial):
    """The training of a confirmed configuration: at its end, and only there, the test split is opened."""

    def __init__(self, config: TrialConfig, folder: Path, *, data_dir: str | Path | None = None, **more: Any) -> None:
        super().__init__(config, folder, data_dir=data_dir, **more)
        self._data_dir = data_dir

    def measure(self, model: ViT) -> dict[str, float]:
        """All measures but times of inference, which other trials at work would spoil."""
        return final_evaluation(self.folder, data_dir=self._data_dir, device=str(self.device), timed=False)


def final_evaluation(
    folder: Path, *, data_dir: str | Path | None = None, device: str = "auto", timed: bool = True
) -> dict[str, float]:
    """All measures of a trained model. The test split is opened once: what was measured then is given again.

    Nothing is compiled: that takes longer than the two passes over the data.

    Args:
        timed: whether inference is timed, too.
    Returns:
        `test/*`, `train/log_likelihood`, `aic`, `bic`, `params`, `flops/*`, `time/inference_*`.
    Raises:
        StoreError: the trial's model is missing or damaged, or the results cannot be written.
        TrialError: the model's training blew up in its last step.
    """
    done = folder / "test.json"
    if os.path.lexists(done):
        known: dict[str, float] = read_json(done)
        if not is_measures(known):
            raise StoreError(f"{done}: no measures in it; the file is damaged")
        return known
    model, config = load_model(folder)
    where, dataset = pick_device(device), config.data.dataset
    model = model.to(where)
    train = load_training(config.data, data_dir).train.to(where)
    likelihood = scores(logits_of(model, train, dataset), train.labels, "train")["train/log_likelihood"]
    if not math.isfinite(likelihood):
        raise TrialError("the loss after the last step is not finite; use a smaller train.lr")
    test = load_test(dataset, data_dir).to(where)
    logits = logits_of(model, test, dataset)
    k = sum(p.numel() for p in model.parameters())
    found = scores(logits, test.labels, "test") | {"train/log_likelihood": likelihood, "params": float(k)}
    found |= information_criteria(likelihood, k, len(train.labels)) | cost(config)
    found |= inference_time(model, test, dataset) if timed else {}
    results = {
        "confusion_test.json": confusion(logits, test.labels, dataset, "test"),
        "per_class.json": per_class(logits, test.labels, dataset),
    }
    with writing(folder):
        for name, content in results.items():
            write_atomic(folder / name, json.dumps(content))
        save_attention_example(folder / "attention.npz", model, test, dataset)
        save_predictions(folder / "predictions.npz", logits, test.labels)
        write_atomic(done, json.dumps(found))  # last: with it, the split is closed
        tidy(folder)
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
