"""One trial from configuration to measures, an epoch at a time, resumable from its folder after every epoch."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from erpe.config import TrialConfig
from erpe.errors import StoreError, TrialError
from erpe.model import ViT, build
from erpe.model.kernels import gpu
from erpe.store import STATE, let_go
from erpe.text import first_line
from erpe.training import evaluate
from erpe.training.batched import Pack
from erpe.training.checkpoint import load_tensors, save_model, writing
from erpe.training.choices import choices_of
from erpe.training.data import load_training
from erpe.training.devices import device_name, pick_device
from erpe.training.loop import OnStep, Trainer
from erpe.training.malloc import keep_heap
from erpe.training.outcome import is_history
from erpe.training.precision import recorded_precision
from erpe.training.trial_folder import TrialFolder


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
        self.files = TrialFolder(folder, self.device)
        self.choices = choices_of(devices or {}, self.device)
        evaluate.reset_peak_memory(self.device)
        self.split = load_training(config.data, data_dir)
        self.validation = self.split.validation.to(self.device)
        self._validation_labels = self.split.validation.labels
        self.images = self.split.train.to(self.device)
        self.warning: str | None = None
        """What someone should know: a damaged checkpoint, batches that had to be split, a compiler that failed."""
        self.trainer = self._at_start()
        self.history: list[dict[str, float]] = []
        """An entry an epoch: `epoch` (from 1), `train/loss`, `val/loss`, `val/accuracy`, `lr`, `time/epoch_seconds`."""
        self._earlier: Mapping[str, Any] = {}
        self._resumed_at = 0
        """What earlier processes wrote of it, and after how many epochs."""
        self._refused = set[str]()
        """Kernels that they could not run."""
        self._trained: dict[str, float] | TrialError | None = None
        """What the next epoch's training, done ahead in a pack, came to."""
        self._fits = True
        """Whether the device has had room for it, whole and beside others."""
        if os.path.lexists(folder / STATE):
            self._resume()
        self.files.claim()

    @property
    def done(self) -> bool:
        """Whether all epochs are trained."""
        return len(self.history) >= self.config.train.epochs

    @staticmethod
    def ahead(trials: list[Trial]) -> None:
        """Train the next epoch of several trials of one shape as one program; `epoch` of each then goes on from there.

        Where the device has no memory for that, or some began elsewhere in another precision, or all are in float16,
        whose gradients each have a scale of their own, or torch.vmap cannot map a plug-in, nothing is done ahead.
        See `erpe.training.batched`.
        """
        precisions = {trial.trainer.precision for trial in trials}
        if not all(trial._fits for trial in trials) or len(precisions) > 1 or "float16" in precisions:
            return

        def on_step(done: int, steps: int) -> None:
            for trial in trials:
                if trial.on_step:
                    trial.on_step(done, steps)

        model = trials[0].config.model
        try:
            pack = Pack([trial.trainer for trial in trials])
            found, failed = pack.epoch([len(trial.history) for trial in trials], on_step), ""
        except torch.OutOfMemoryError:
            found, failed = [], f"out of memory on {trials[0].device}: {len(trials)} trials do not fit together"
        except Exception as error:
            if not model.plugin:
                raise
            found, failed = [], f"{model.variant}: torch.vmap cannot map its plug-in; trials train alone, slower: "
            failed += first_line(error)
        for trial, trained in zip(trials, found, strict=False):
            trial._trained = trained
        if failed:
            trials[0].warning = failed
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
            measured = evaluate.fit(self._logits(), self._validation_labels)
            found |= {f"val/{name}": measured[name] for name in ("loss", "accuracy")}
            if not math.isfinite(found["val/loss"]):
                last = int(found["epoch"]) * self.trainer.steps - 1
                raise TrialError(f"the validation loss after step {last} is not finite; use a smaller train.lr")
        self.history.append(found)
        self.files.save(self.trainer.state(), self._facts() | {"history": [*self.history]})
        return found

    def settle(self) -> None:
        """Wait until the last epoch's checkpoint is written.

        Raises:
            StoreError, TakenOver: see `epoch`; then that checkpoint is not.
        """
        self.files.settle()

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
        parts, self._fits = 2 * self.trainer.parts, False
        self._rewind()
        self.trainer.parts = parts
        self.warning = f"out of memory on {self.device}: each batch of {self.config.train.batch} goes in {parts} parts"

    def _rewind(self) -> None:
        """Back to the last epoch's end."""
        self.files.settle()
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
        self.files.settle()
        model = self.trainer.final
        found = evaluate.cost(self.config) | {
            "params": float(sum(p.numel() for p in model.parameters())),
            "time/train_seconds_per_epoch": evaluate.seconds_per_epoch(self.history),
            "memory/peak_mib": evaluate.peak_memory_mib(self.device),
        }
        self.files.check_owner()
        save_model(self.folder, model, self.config)
        found |= self.measure(model)
        self.files.write("outcome.json", {"metrics": found, "history": self.history, **self._facts()})
        let_go(self.folder)
        return found

    def measure(self, model: ViT) -> dict[str, float]:
        """`val/*`: how good the model is, on the validation part only."""
        if not len(self.validation.labels):
            return {}
        dataset = self.config.data.dataset
        logits = self._logits()
        self.files.write("confusion.json", evaluate.confusion(logits, self.validation.labels, dataset, "validation"))
        with writing(self.folder):
            evaluate.save_attention_example(self.folder / "attention.npz", model, self.validation, dataset)
        found = evaluate.scores(logits, self.validation.labels, "val")
        if self.timed:
            with self.choices.sdpa(self.config, "float32"):
                found |= evaluate.inference_time(model, self.images, dataset, fastest=self.trainer.fastest)
        return found

    def _logits(self) -> Tensor:
        """Of the validation part, in float32."""
        trainer = self.trainer
        with self.choices.sdpa(self.config, "float32"):
            return evaluate.logits_of(trainer.final, self.validation, self.config.data.dataset, trainer.evaluated)

    def _facts(self) -> dict[str, str]:
        """How it ran: `mixed` where processes that trained it differ; device and threads are those of the last one."""
        trained, own = len(self.history) > self._resumed_at, self.trainer
        ways = {"compiled": "yes" if own.is_compiled else "no", "graph": "yes" if own.ran_as_graph else "no"}
        for key, now in ways.items():
            was = self._earlier.get(key, now)
            ways[key] = "mixed" if trained and was != now else was
        refused = self._refused | {" ".join(map(str, size)) for size in gpu.REFUSED}
        return {
            "config": self.config.model_dump_json(),
            "data_sha256": self.split.digest,
            "split_sha256": self.split.split_digest,
            "device": device_name(self.device),
            "threads": str(torch.get_num_threads()),
            "precision": self.trainer.precision,
            "sdpa": ", ".join(sorted(self.trainer.sdpa)),
            "refused_kernels": ", ".join(sorted(refused)),
            **ways,
        }

    def _resume(self) -> None:
        """Take up the last epoch's checkpoint; a damaged one is set aside and its trial begins again."""
        path = self.folder / STATE
        try:
            tensors, facts = load_tensors(path)
            if facts["config"] != self.config.model_dump_json():
                raise StoreError(f"{path}: belongs to another configuration")
            if not is_history(facts["history"], self.config):
                raise StoreError(f"{path}: its history is not that of a trial")
            asked, refused = (set(facts.get(key, "").split(", ")) - {""} for key in ("sdpa", "refused_kernels"))
            precision = recorded_precision(facts, path, self.trainer.precision)
            self.trainer.compute_in(precision)  # as it began, whatever this machine would choose
            self.trainer.load_state(tensors)
            self.history, self._resumed_at, self._earlier = facts["history"], len(facts["history"]), facts
            self.trainer.sdpa |= asked
            self._refused = refused
        except (StoreError, RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
            said = " ".join(str(error).split())
            self.warning = f"{said}; set aside as {path.with_suffix('.damaged').name}, the trial begins again"
            with contextlib.suppress(FileNotFoundError):
                path.rename(path.with_suffix(".damaged"))
            self.trainer = self._at_start()
