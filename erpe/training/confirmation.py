"""The confirmation of a configuration: it is trained again, and at its end the test split is opened, once."""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from erpe.config import TrialConfig
from erpe.errors import StoreError, TrialError
from erpe.io import read_json, write_atomic
from erpe.model import ViT
from erpe.store import tidy
from erpe.training import evaluate
from erpe.training.checkpoint import load_model, writing
from erpe.training.choices import choices_of
from erpe.training.compilation import Warn, compiled
from erpe.training.data import load_test, load_training
from erpe.training.devices import pick_device
from erpe.training.outcome import is_measures
from erpe.training.trial import Trial


class Confirmation(Trial):
    """The training of a confirmed configuration: at its end, and only there, the test split is opened."""

    def __init__(self, config: TrialConfig, folder: Path, *, data_dir: str | Path | None = None, **more: Any) -> None:
        super().__init__(config, folder, data_dir=data_dir, **more)
        self._where: dict[str, Any] = {"data_dir": data_dir, "device": str(self.device), "devices": more.get("devices")}

    def measure(self, model: ViT) -> dict[str, float]:
        """All measures but times of inference, which other trials at work would spoil."""
        return final_evaluation(self.folder, timed=False, warn=self._warn, **self._where)


def final_evaluation(
    folder: Path, *, data_dir: str | Path | None = None, device: str = "auto",
    devices: Mapping[str, Any] | None = None, timed: bool = True, warn: Warn = warnings.warn,
) -> dict[str, float]:  # fmt: skip
    """Return all measures of a trained model. The test split is opened once: a second call reads what was measured.

    Args:
        devices: what is the fastest on each, see `Store.devices`.
        timed: whether inference is timed, too.
        warn: see `Compiled`.
    Returns:
        `test/*`, `train/log_likelihood`, `aic`, `bic`, `params`, `flops/*`, `time/inference_*`.
    Raises:
        StoreError: the trial's model or `devices` are missing or damaged, or the results cannot be written.
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
    fastest = partial(compiled, train=config.train, device=where, warn=warn)
    attending = partial(choices_of(devices or {}, where).sdpa, config, "float32")
    train, forward = load_training(config.data, data_dir).train.to(where), fastest(model)
    with attending():
        logits = evaluate.logits_of(model, train, dataset, forward)
    likelihood = evaluate.fit(logits, train.labels.cpu())["log_likelihood"]
    if not math.isfinite(likelihood):
        raise TrialError("the loss after the last step is not finite; use a smaller train.lr")
    test = load_test(dataset, data_dir).to(where)
    with attending():
        logits = evaluate.logits_of(model, test, dataset, forward)
        times = evaluate.inference_time(model, test, dataset, fastest=fastest) if timed else {}
    k = sum(p.numel() for p in model.parameters())
    found = evaluate.scores(logits, test.labels, "test") | {"train/log_likelihood": likelihood, "params": float(k)}
    found |= evaluate.information_criteria(likelihood, k, len(train.labels)) | evaluate.cost(config) | times
    confused = evaluate.confusion(logits, test.labels, dataset, "test")
    with writing(folder):
        write_atomic(folder / "confusion_test.json", json.dumps(confused))
        write_atomic(folder / "per_class.json", json.dumps(evaluate.per_class(logits, test.labels, dataset)))
        evaluate.save_attention_example(folder / "attention.npz", model, test, dataset)
        evaluate.save_predictions(folder / "predictions.npz", logits, test.labels)
        write_atomic(done, json.dumps(found))  # last: with it, the split is closed
        tidy(folder)
    return found
