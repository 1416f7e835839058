"""MNIST, CIFAR-10 and digits: verified files, fixed splits, the whole set as one uint8 tensor on the device."""

from __future__ import annotations

import gzip
import hashlib
import os
import socket
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from textwrap import shorten
from typing import Literal, NamedTuple

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

from erpe.config import DATASETS, DataConfig
from erpe.errors import DataError
from erpe.training.vision import torchvision

PATIENCE_S = 30.0
"""How long a download may stand still."""

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


def find_data_dir(data_dir: str | Path | None) -> Path:
    """The folder given, else `ERPE_DATA`, else `data` here.

    Raises:
        DataError: it begins with the home of a user that there is not.
    """
    given = data_dir or os.environ.get("ERPE_DATA") or "data"
    try:
        return Path(given).expanduser()
    except RuntimeError as error:
        raise DataError(f"data folder {given}: no such place ({error}); --data-dir names another") from None


def prepare(dataset: str, data_dir: str | Path | None = None) -> None:
    """Make sure that every file of the data set is there and unaltered; download what is missing.

    Raises:
        DataError: a file is missing and cannot be downloaded, or is not the published one.
    """
    root = find_data_dir(data_dir)
    if missing_files(dataset, root):
        _download(dataset, root)
    folder = _folder(dataset, root)
    for name, expected in _published(dataset).items():
        try:
            found = hashlib.md5((folder / name).read_bytes(), usedforsecurity=False).hexdigest()
        except OSError as error:
            raise DataError(f"{folder / name}: cannot be read ({error.strerror}), expected MD5 {expected}") from None
        if found != expected:
            raise DataError(f"{folder / name}: MD5 is {found}, expected {expected}; delete it to download it again")


def missing_files(dataset: str, root: Path) -> list[str]:
    """Names of the data set's files that are not below `root`; none for digits, which scikit-learn brings."""
    folder = _folder(dataset, root)
    return sorted(name for name in _published(dataset) if not (folder / name).exists())


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
        rows, held = _stratified(rows, whole.labels, config.validation, config.split_seed)
    if config.train_limit and config.train_limit < len(rows):
        _, rows = _stratified(rows, whole.labels, config.train_limit, config.split_seed)
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
    mean, std = (torch.tensor(x, device=pixels.device)[:, None, None] for x in (facts.mean, facts.std))
    return (pixels.float() / 255 - mean) / std


def batches(count: int, batch: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Places of the images of each step of an epoch, in the generator's order; the last batch may be shorter."""
    yield from torch.randperm(count, generator=generator).split(batch)


def _stratified(rows: np.ndarray, labels: Tensor, second: float | int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    first, other = train_test_split(rows, test_size=second, random_state=seed, stratify=labels[torch.from_numpy(rows)])
    return np.sort(first), np.sort(other)


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
    return {"digits": _digits, "mnist": _mnist, "cifar10": _cifar10}[dataset](_folder(dataset, root), part)


def _digits(_: Path, part: Part) -> Images:
    """scikit-learn's 1,797 real digits; the data set has no test part of its own, so a fifth is set apart for good."""
    images, labels = load_digits(return_X_y=True)
    pixels = torch.from_numpy(np.rint(images * 255 / 16).astype(np.uint8).reshape(-1, 1, 8, 8))
    whole = Images(pixels, torch.from_numpy(labels.astype(np.int64)))
    train, test = _stratified(np.arange(len(labels)), whole.labels, DATASETS["digits"].test, seed=0)
    return whole.take(train if part == "train" else test)


def _mnist(folder: Path, part: Part) -> Images:
    """The gzipped idx files, read where they are: big-endian header of 16 and 8 bytes, then uint8 values."""
    name = "train" if part == "train" else "t10k"
    pixels = gzip.decompress((folder / f"{name}-images-idx3-ubyte.gz").read_bytes())
    labels = gzip.decompress((folder / f"{name}-labels-idx1-ubyte.gz").read_bytes())
    images = np.frombuffer(pixels, np.uint8, offset=16).reshape(-1, 1, 28, 28)
    return Images(torch.tensor(images), torch.tensor(np.frombuffer(labels, np.uint8, offset=8), dtype=torch.int64))


def _cifar10(folder: Path, part: Part) -> Images:
    """torchvision reads the pickles, whose MD5 has just been checked."""
    data = torchvision().datasets.CIFAR10(folder.parent, train=part == "train")
    pixels = torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous()
    return Images(pixels, torch.tensor(data.targets))


def _published(dataset: str) -> dict[str, str]:
    """File names and MD5 sums as torchvision knows them."""
    if dataset == "digits":
        return {}
    if dataset == "mnist":
        return dict(torchvision().datasets.MNIST.resources)
    known = torchvision().datasets.CIFAR10
    return dict([*known.train_list, *known.test_list, (known.meta["filename"], known.meta["md5"])])


def _folder(dataset: str, root: Path) -> Path:
    """torchvision's layout below `root`, or below `root/mnist` and `root/cifar10`."""
    layout = {"mnist": "MNIST/raw", "cifar10": "cifar-10-batches-py", "digits": ""}[dataset]
    nested = root / dataset / layout
    return nested if nested.exists() else root / layout


def _download(dataset: str, root: Path) -> None:
    patience = socket.getdefaulttimeout()
    socket.setdefaulttimeout(PATIENCE_S)  # torchvision would wait for a silent server for ever
    try:
        known, folder = torchvision().datasets, _folder(dataset, root)
        home = folder.parents[1] if dataset == "mnist" else folder.parent  # what torchvision calls root
        home.mkdir(parents=True, exist_ok=True)
        (known.MNIST if dataset == "mnist" else known.CIFAR10)(home, download=True)
    except (OSError, RuntimeError) as error:
        names = ", ".join(missing_files(dataset, root))
        raise DataError(
            f"{dataset}: {names} not in {_folder(dataset, root)}, and no download ({_reason(error)}); "
            "put the files there, name their folder with --data-dir, or try --dataset digits"
        ) from None
    finally:
        socket.setdefaulttimeout(patience)


def _reason(error: BaseException) -> str:
    return shorten(str(error), 120, placeholder=" ...") or type(error).__name__
