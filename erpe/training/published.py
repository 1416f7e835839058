"""Read the files of published data sets as arrays, each as it was published. Without torch."""

from __future__ import annotations

import gzip
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from erpe.datasets import DATASETS
from erpe.training.download import MD5, find_file, folder_of, prepare

Part = Literal["train", "test"]
Arrays = tuple[np.ndarray, np.ndarray]
"""Images (n, channels, height, width) uint8 and labels (n,) int64."""


def read(dataset: str, root: Path, part: Part) -> Arrays:
    """One part of a published data set; the other stays closed.

    Raises:
        DataError: see `prepare`.
    """
    prepare(dataset, root)
    folder = folder_of(dataset, root)
    if dataset == "digits":
        return _digits(part)
    if dataset == "svhn":
        return _svhn(folder, part)
    return _cifar(dataset, folder, part) if dataset.startswith("cifar") else _idx(dataset, folder, part)


def stratified(labels: np.ndarray, second: float | int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Divide a data set in two parts, each with its share of every class (n,); give their places in ascending order.

    Args:
        second: size of the second part: a number of images, or a fraction of all.
    """
    from sklearn.model_selection import train_test_split

    first, held = train_test_split(np.arange(len(labels)), test_size=second, random_state=seed, stratify=labels)
    return np.sort(first), np.sort(held)


def _digits(part: Part) -> Arrays:
    """scikit-learn's 1,797 real digits; the data set has no test part of its own, so a fifth is set apart for good."""
    from sklearn.datasets import load_digits

    values, classes = load_digits(return_X_y=True)  # (n, 64) from 0 to 16
    pixels, labels = np.rint(values * 255 / 16).astype(np.uint8).reshape(-1, 1, 8, 8), _labels(classes)
    train, test = stratified(labels, DATASETS["digits"].test, seed=0)
    chosen = train if part == "train" else test
    return pixels[chosen], labels[chosen]


def _idx(dataset: str, folder: Path, part: Part) -> Arrays:
    """MNIST's format, read where it is: big-endian header of 16 and 8 bytes, then uint8 values."""
    name = "train" if part == "train" else "t10k"
    kinds = (f"{name}-{kind}-ubyte.gz" for kind in ("images-idx3", "labels-idx1"))
    pixels, labels = (_unpacked(find_file(folder, each, dataset)) for each in kinds)
    images = np.frombuffer(pixels, np.uint8, offset=16).reshape(-1, 1, 28, 28).copy()
    return images, _labels(np.frombuffer(labels, np.uint8, offset=8))


def _unpacked(path: Path) -> bytes:
    return gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()


def _cifar(dataset: str, folder: Path, part: Part) -> Arrays:
    """Pickles, whose MD5 has just been checked: rows of 3 x 32 x 32 uint8 values."""
    starts = ("data", "train") if part == "train" else ("test",)
    names = sorted(name for name in MD5[dataset] if name.startswith(starts))
    parts = [pickle.loads((folder / name).read_bytes(), encoding="latin1") for name in names]
    pixels = np.concatenate([each["data"] for each in parts]).reshape(-1, 3, 32, 32)
    key = "labels" if dataset == "cifar10" else "fine_labels"
    return pixels, _labels([label for each in parts for label in each[key]])


def _svhn(folder: Path, part: Part) -> Arrays:
    """MATLAB files: X (32, 32, 3, n) uint8, y (n, 1) from 1 to 10, where 10 stands for the digit 0."""
    from scipy.io import loadmat

    found = loadmat(folder / f"{part}_32x32.mat")
    return np.ascontiguousarray(found["X"].transpose(3, 2, 0, 1)), _labels(found["y"].ravel() % 10)


def _labels(classes: Sequence[int] | np.ndarray) -> np.ndarray:
    return np.asarray(classes).astype(np.int64)
