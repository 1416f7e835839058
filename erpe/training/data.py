"""MNIST, CIFAR-10 and digits: fixed splits, the whole set as one uint8 tensor on the device."""

from __future__ import annotations

import gzip
import hashlib
import pickle
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from erpe.config import DATASETS, DataConfig
from erpe.training.download import MD5, find_data_dir, find_file, folder_of, prepare

Part = Literal["train", "test"]


class Images(NamedTuple):
    """Pictures and what they show."""

    pixels: Tensor
    """(n, channels, height, width) uint8."""
    labels: Tensor
    """(n,) int64."""

    def to(self, device: torch.device | str) -> Images:
        """The same on a device."""
        return Images(self.pixels.to(device), self.labels.to(device))

    def take(self, index: np.ndarray) -> Images:
        """The pictures at these places."""
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
    """The training set, split as the configuration says: stratified, the same for every seed of a trial.

    Raises:
        DataError: see `prepare`.
    """
    return _split(config, find_data_dir(data_dir))


@lru_cache(maxsize=1)
def _split(config: DataConfig, root: Path) -> Split:
    """Trials that share a process share their images."""
    whole = _load(config.dataset, root, "train")
    rows, held = np.arange(len(whole.labels)), np.arange(0)
    if config.validation:
        rows, held = _stratified(whole.labels.numpy(), config.validation, config.split_seed)
    if config.train_limit and config.train_limit < len(rows):
        rows = rows[_stratified(whole.labels.numpy()[rows], config.train_limit, config.split_seed)[1]]
    return Split(whole.take(rows), whole.take(held), _digest(config.dataset, root), _sha256(held))


def load_test(dataset: str, data_dir: str | Path | None = None) -> Images:
    """The test set: for the final evaluation alone, never for the search.

    Raises:
        DataError: see `prepare`.
    """
    return _load(dataset, find_data_dir(data_dir), "test")


def normalise(pixels: Tensor, dataset: str) -> Tensor:
    """uint8 (..., channels, height, width) -> float32 with mean 0 and standard deviation 1 over the training set."""
    facts = DATASETS[dataset]
    table = torch.tensor([facts.mean, facts.std], dtype=torch.float32, device="cpu")
    mean, std = sent(table[..., None, None], pixels.device)  # each (channels, 1, 1)
    return (pixels.float() / 255 - mean) / std


def sent(drawn: Tensor, device: torch.device) -> Tensor:
    """Numbers drawn on the CPU, on the device. Not waited for on CUDA, which stages pageable memory before it returns.

    Source: CUDA driver API, "API synchronization behavior".
    """
    return drawn.to(device, non_blocking=device.type == "cuda")


def batches(count: int, batch: int, generator: torch.Generator, device: torch.device) -> Iterator[Tensor]:
    """Places (B,) of the images of each step of an epoch, in the generator's order; the last batch may be shorter.

    They go to the device all at once: a copy waits until the device has done all it was given before.
    """
    yield from torch.randperm(count, generator=generator, dtype=torch.int64, device="cpu").to(device).split(batch)


def _stratified(labels: np.ndarray, second: float | int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Divide a data set in two parts, each with its share of every class (n,); give their places in ascending order.

    Args:
        second: size of the second part: a number of images, or a fraction of all.
    """
    from sklearn.model_selection import train_test_split

    first, held = train_test_split(np.arange(len(labels)), test_size=second, random_state=seed, stratify=labels)
    return np.sort(first), np.sort(held)


def _sha256(*arrays: np.ndarray) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


@lru_cache(maxsize=2)
def _digest(dataset: str, root: Path) -> str:
    train = _load(dataset, root, "train")
    return _sha256(train.pixels.numpy(), train.labels.numpy())


@lru_cache(maxsize=4)
def _load(dataset: str, root: Path, part: Part) -> Images:
    """One part of the data set, once a process; the other stays closed."""
    prepare(dataset, root)
    return {"digits": _digits, "mnist": _mnist, "cifar10": _cifar10}[dataset](folder_of(dataset, root), part)


def _digits(_: Path, part: Part) -> Images:
    """scikit-learn's 1,797 real digits; the data set has no test part of its own, so a fifth is set apart for good."""
    from sklearn.datasets import load_digits

    values, classes = load_digits(return_X_y=True)  # (n, 64) from 0 to 16
    pixels = torch.from_numpy(np.rint(values * 255 / 16).astype(np.uint8).reshape(-1, 1, 8, 8))
    whole = Images(pixels, _labels(classes))
    train, test = _stratified(whole.labels.numpy(), DATASETS["digits"].test, seed=0)
    return whole.take(train if part == "train" else test)


def _mnist(folder: Path, part: Part) -> Images:
    """The idx files, read where they are: big-endian header of 16 and 8 bytes, then uint8 values."""
    name = "train" if part == "train" else "t10k"
    pixels, labels = (
        _unpacked(find_file(folder, f"{name}-{kind}-ubyte.gz")) for kind in ("images-idx3", "labels-idx1")
    )
    images = np.frombuffer(pixels, np.uint8, offset=16).reshape(-1, 1, 28, 28)
    return Images(torch.from_numpy(images.copy()), _labels(np.frombuffer(labels, np.uint8, offset=8)))


def _unpacked(path: Path) -> bytes:
    return gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()


def _cifar10(folder: Path, part: Part) -> Images:
    """Pickles, whose MD5 has just been checked: rows of 3 x 32 x 32 uint8 values."""
    names = sorted(name for name in MD5["cifar10"] if name.startswith("data" if part == "train" else "test"))
    parts = [pickle.loads((folder / name).read_bytes(), encoding="latin1") for name in names]
    pixels = np.concatenate([each["data"] for each in parts]).reshape(-1, 3, 32, 32)
    return Images(torch.from_numpy(pixels), _labels([label for each in parts for label in each["labels"]]))


def _labels(classes: Sequence[int] | np.ndarray) -> Tensor:
    return torch.tensor(classes, dtype=torch.int64, device="cpu")
