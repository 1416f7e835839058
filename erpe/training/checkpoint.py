"""Checkpoints: safetensors for tensors, JSON for the rest. Nothing in them can run code."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from erpe.config import TrialConfig
from erpe.errors import ConfigError, StoreError
from erpe.model import ViT, build
from erpe.store import read_json, write_atomic

STATE = "training.safetensors"
MODEL = "model.safetensors"


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """What the disk refuses is a `StoreError`; files are written whole or not at all."""
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


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `save_tensors` wrote, on the CPU.

    Raises:
        StoreError: the file is missing or damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            facts, expected = json.loads(file.metadata()["erpe"]), file.metadata()["sha256"]
        tensors = load_file(path)
        if digest(tensors) != expected:
            raise ValueError("its checksum differs")
        return tensors, facts
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{path}: cannot be read ({error}); the checkpoint is missing or damaged") from None


def save_model(folder: Path, model: ViT, config: TrialConfig) -> None:
    """`model.safetensors` (weights and random features) and `config.json`.

    Raises:
        StoreError: the disk is full or the folder cannot be written.
    """
    save_tensors(folder / MODEL, model.state_dict(), {"variant": config.model.variant})
    with writing(folder):
        write_atomic(folder / "config.json", config.model_dump_json(indent=2))


def load_model(folder: Path) -> tuple[ViT, TrialConfig]:
    """The model of a finished trial, in evaluation mode on the CPU, and its configuration.

    Raises:
        StoreError: a file is missing or damaged, or another version of erpe wrote it.
    """
    try:
        config = TrialConfig(**read_json(folder / "config.json"))
    except (ConfigError, TypeError) as error:
        raise StoreError(f"{folder / 'config.json'}: {error}; written by another version of erpe?") from None
    tensors, _ = load_tensors(folder / MODEL)
    model = build(config.model)
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise StoreError(f"{folder / MODEL}: {' '.join(str(error).split())}") from None
    return model.eval(), config
