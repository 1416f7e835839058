"""Checkpoints: safetensors for tensors, JSON for the rest. Nothing in them can run code."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from erpe.config import TrialConfig
from erpe.errors import ConfigError, ShapeError, StoreError
from erpe.io import open_plain, parse_json, read_json, write_atomic
from erpe.model import ViT
from erpe.model.vit import Size, shapes
from erpe.plugins import stored_text
from erpe.store import FILES, STATE

MODEL = "model.safetensors"


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn what the disk refuses into a `StoreError`; files are written whole or not at all."""
    try:
        yield
    except OSError as error:
        place = error.filename or folder
        raise StoreError(f"{place}: cannot be written ({error.strerror}); what was there before is intact") from None


def save_tensors(path: Path, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    """Write tensors and JSON facts as one file, whole or not at all.

    Raises:
        StoreError: the disk is full or the folder cannot be written; the old file is intact.
    """
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, save(contiguous, metadata={"erpe": json.dumps(facts), "sha256": digest(contiguous)}))


def digest(tensors: dict[str, Tensor]) -> str:
    """SHA-256 of names and values: a flipped bit would otherwise be a weight like any other."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        found.update(name.encode())
        found.update(tensors[name].reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def load_tensors(path: Path, expected: Mapping[str, Size] | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return what `save_tensors` wrote, on the CPU.

    Args:
        expected: name -> shape; a file with other tensors is refused before any is read.
    Raises:
        StoreError: the file is missing or damaged, or of another model.
    """
    try:
        os.close(open_plain(path, os.O_RDONLY))
        if path.stat().st_size > FILES[STATE]:
            raise ValueError(f"more than {FILES[STATE]} bytes")
        with safe_open(path, framework="pt") as file:
            facts, sha256 = parse_json(file.metadata()["erpe"]), file.metadata()["sha256"]
            if expected is not None:
                _compare({name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}, expected)  # noqa: SIM118
        tensors = load_file(path)
        if digest(tensors) != sha256:
            raise ValueError("its checksum differs")
        return tensors, facts
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        said = " ".join(str(error).split())
        raise StoreError(f"{path}: cannot be read ({said}); the checkpoint is missing or damaged") from None


def _compare(found: Mapping[str, Size], expected: Mapping[str, Size]) -> None:
    for name in [*found, *expected]:
        if found.get(name) != expected.get(name):
            raise ValueError(f"{name} is {found.get(name, 'missing')}, its model has {expected.get(name, 'none')}")


def save_model(folder: Path, model: ViT, config: TrialConfig) -> None:
    """`model.safetensors` (weights and random features) and `config.json`.

    Raises:
        StoreError: the disk is full or the folder cannot be written.
    """
    save_tensors(folder / MODEL, model.state_dict(), {"variant": config.model.variant})
    with writing(folder):
        write_atomic(folder / "config.json", config.model_dump_json(indent=2))
        if config.model.plugin:
            write_atomic(folder / "plugins.txt", stored_text(config.model.plugin))  # to be read, never to be run


class TrainedViT(ViT):
    """A trained model, which knows how its pictures were prepared."""

    def __init__(self, config: TrialConfig) -> None:
        super().__init__(config.model, seed=0)
        self.trial = config

    def predict(self, images: np.ndarray | Tensor) -> np.ndarray:
        """Say how probable each class is of pictures as they are; they are normalised as in training.

        Args:
            images: (B, channels, height, width) uint8.
        Returns:
            (B, classes) float32.
        Raises:
            ShapeError: not such a batch.
        """
        from erpe.training.data import normalise

        given: Any = images if isinstance(images, Tensor) else np.asarray(images)
        wanted, kind = self.trial.model.image, str(given.dtype).removeprefix("torch.")
        if given.ndim != 4 or tuple(given.shape[1:]) != wanted or kind != "uint8":
            channels = ", ".join(map(str, wanted))
            raise ShapeError(f"images: use uint8 of shape (B, {channels}) instead of {kind} of {tuple(given.shape)}")
        pixels = given if isinstance(given, Tensor) else torch.from_numpy(np.ascontiguousarray(given))
        with torch.inference_mode():
            device = next(self.parameters()).device
            logits = self(normalise(pixels.to(device), self.trial.data.dataset))  # (B, classes)
            return logits.softmax(-1).float().cpu().numpy()


def load_model(folder: Path) -> tuple[TrainedViT, TrialConfig]:
    """Return the model of a finished trial, in evaluation mode on the CPU, and its configuration.

    Raises:
        StoreError: a file is missing or damaged, or another version of erpe wrote it.
    """
    config = load_config(folder)
    # Before a model of that size is made: a configuration can ask for more memory than there is.
    tensors, _ = load_tensors(folder / MODEL, shapes(config.model))
    model = TrainedViT(config)
    model.load_state_dict(tensors)
    return model.eval(), config


def load_config(folder: Path) -> TrialConfig:
    """Return the configuration of a finished trial.

    Raises:
        StoreError: it is missing or damaged, or another version of erpe wrote it.
    """
    try:
        return TrialConfig(**read_json(folder / "config.json"))
    except (ConfigError, TypeError) as error:
        raise StoreError(f"{folder / 'config.json'}: {error}; written by another version of erpe?") from None
