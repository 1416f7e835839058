"""Images of published and own data sets: fixed splits, the whole set as one uint8 tensor on the device."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from erpe.config import DataConfig
from erpe.datasets import Dataset, facts_of
from erpe.training.download import find_data_dir
from erpe.training.own import location, read_pack
from erpe.training.own_files import sha256
from erpe.training.published import Part, read, stratified


class Images(NamedTuple):
    """Pictures and what they show."""

    pixels: Tensor
    """(n, channels, height, width) uint8."""
    labels: Tensor
    """(n,) int64."""

    def to(self, device: torch.device | str) -> Images:
        """Return the same on a device."""
        return Images(self.pixels.to(device), self.labels.to(device))

    def take(self, index: np.ndarray) -> Images:
        """Return the pictures at these places."""
        rows = torch.from_numpy(index)
        return Images(self.pixels[rows], self.labels[rows])


class Split(NamedTuple):
    """The training set in two parts; the test set is not in it."""

    train: Images
    validation: Images
    digest: str
    """SHA-256 of pixels and labels of the whole training set."""
    split_digest: str
    """SHA-256 of the places held out for validation."""


def load_training(config: DataConfig, data_dir: str | Path | None = None) -> Split:
    """Return the training set, split as the configuration says: stratified, the same for every seed of a trial.

    Raises:
        DataError: see `prepare`.
    """
    return _split(config, _root(config.dataset, data_dir))


@lru_cache(maxsize=1)
def _split(config: DataConfig, root: Path) -> Split:
    """Trials that share a process share their images."""
    whole = _load(config.dataset, root, "train")
    rows, held = np.arange(len(whole.labels)), np.arange(0)
    if config.validation:
        rows, held = stratified(whole.labels.numpy(), config.validation, config.split_seed)
    if config.train_limit and config.train_limit < len(rows):
        rows = rows[stratified(whole.labels.numpy()[rows], config.train_limit, config.split_seed)[1]]
    return Split(whole.take(rows), whole.take(held), _digest(config.dataset, root), sha256(held))


def load_test(dataset: str | Dataset, data_dir: str | Path | None = None) -> Images:
    """Return the test set: for the final evaluation alone, never for the search.

    Raises:
        DataError: see `prepare`.
    """
    return _load(dataset, _root(dataset, data_dir), "test")


def normalise(pixels: Tensor, dataset: str | Dataset) -> Tensor:
    """uint8 (..., channels, height, width) -> float32 with mean 0 and standard deviation 1 over the training set."""
    facts = facts_of(dataset)
    mean, std = constants((facts.mean, facts.std), torch.float32, pixels.device)[..., None, None]  # (channels, 1, 1)
    return (pixels.float() / 255 - mean) / std


@lru_cache(maxsize=16)
def constants(numbers: tuple[Any, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return numbers as a tensor, copied to a device once a process: a copy a step would hold up its work."""
    with torch.inference_mode(False):  # a cached inference tensor could not be trained through later
        return torch.tensor(numbers, dtype=dtype, device="cpu").to(device)


def batches(count: int, batch: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Places (B,) of the images of each step of an epoch, in the generator's order; the last batch may be shorter.

    They are drawn on the generator's device, all at once: a copy would wait until that has done all it was given.
    """
    yield from torch.randperm(count, generator=generator, dtype=torch.int64, device=generator.device).split(batch)


@lru_cache(maxsize=2)
def _digest(dataset: str | Dataset, root: Path) -> str:
    train = _load(dataset, root, "train")
    return sha256(train.pixels.numpy(), train.labels.numpy())


@lru_cache(maxsize=4)
def _load(dataset: str | Dataset, root: Path, part: Part) -> Images:
    """One part of the data set, once a process; the other stays closed."""
    pixels, labels = read_pack(root, dataset, part) if isinstance(dataset, Dataset) else read(dataset, root, part)
    return Images(torch.from_numpy(pixels), torch.from_numpy(labels))


def _root(dataset: str | Dataset, data_dir: str | Path | None) -> Path:
    """Return the folder of published data sets, or the file with own images."""
    return location(dataset, data_dir) if isinstance(dataset, Dataset) else find_data_dir(data_dir)
