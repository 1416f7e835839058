"""Own images: a folder `train/CLASS/*` (and `test/CLASS/*`), or an `.npz`, read as what a published data set is.

    dataset = find_dataset("flowers", resize=(32, 32), cache=store.datasets)     # a description, or a published name
    read_pack(location(dataset), dataset, "train")                               # (n, channels, height, width), (n,)

What a folder holds is decoded once and packed beside the store; workers read the pack. Without torch.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Literal

import numpy as np

from erpe.datasets import DATASETS, Dataset, facts_of, kind_of
from erpe.errors import ConfigError, DataError
from erpe.io import read_json, write_atomic
from erpe.training.own_files import Read, read_folder, read_npz, resize_words

Grid = tuple[int, int]
"""(height, width) in pixels."""

_LOCATED: dict[str, Path] = {}
"""Fingerprint -> the `.npz` with the images, for those that were found in this process."""

_GIVEN: dict[str, Path] = {}
"""Fingerprint -> the path that the user gave."""

_DOUBTS: dict[str, str] = {}
"""Fingerprint -> what may be wrong with the images, a line; or nothing."""


def find_dataset(
    given: str | os.PathLike[str], *, base: Path | None = None, resize: Grid | None = None, cache: Path | None = None
) -> str | Dataset:
    """Return what a user names as a data set.

    Args:
        given: a published data set's name, or the path of a folder or an `.npz`.
        base: the folder that a relative path starts from; default: the current one.
        resize: (height, width) that images get: the middle part of that form, scaled; default: they stay as they are.
        cache: the folder for descriptions and packed images; default: an `.npz` is read where it lies, a folder not.
    Returns:
        the name, or the description of own data, whose images `location` finds from now on.
    Raises:
        ConfigError: neither a name nor a path; or a published data set is to be resized.
        DataError: the images cannot be used; the line names the file.
    """
    if str(given) in DATASETS:
        if resize:
            raise ConfigError(f"resize: {given} has a size of its own; own images alone are resized")
        return str(given)
    try:
        path = ((base or Path()) / Path(given).expanduser()).resolve()
    except RuntimeError as error:
        raise DataError(f"data set {given}: no such place ({error})") from None
    if not str(given) or not os.path.exists(path):
        facts_of(str(given))  # says what is meant
    try:
        dataset = _described(path, resize, cache)
        _GIVEN[dataset.fingerprint or ""] = path
        return dataset
    except OSError as error:
        raise DataError(f"{error.filename or path}: cannot be read ({error.strerror})") from None


def location(dataset: Dataset, given: str | Path | None = None) -> Path:
    """Return the `.npz` with own images.

    Args:
        given: where they are said to lie; default: where `find_dataset` found them.
    Raises:
        DataError: it was not found in this process.
    """
    if not given and dataset.fingerprint not in _LOCATED:
        raise DataError(f"data set {dataset}: where its images lie is not known here; use --dataset PATH")
    return Path(given or _LOCATED[dataset.fingerprint or ""])


def recall(dataset: str | Dataset, cache: Path) -> None:
    """Find the images of own data where they were when they were described beside a store, unless they are found.

    Whether they are still the same is checked where they are read.
    """
    if not isinstance(dataset, Dataset) or dataset.fingerprint in _LOCATED:
        return
    content = dataset.fingerprint or ""
    given = [Path(path) for known, path in described(cache) if known.fingerprint == content]
    _GIVEN.update((content, path) for path in given if path.exists())
    files = [path for path in (cache / f"{content[:16]}.npz", *given) if path.is_file()]
    _LOCATED.update((content, path) for path in files[:1])


def summary(dataset: Dataset) -> str:
    """Return what own data are, in a line."""
    channels, height, width = dataset.image
    part = ", a fixed stratified fifth: no test set was given" if dataset.part else ""
    return (
        f"{dataset}: {dataset.classes} classes, {channels} x {height} x {width} pixels, {dataset.train:,} images to "
        f"train with, {dataset.test:,} to test with{part}"
    )


def doubt_of(dataset: str | Dataset) -> str:
    """Return what may be wrong with own images that were found in this process, a line; or nothing."""
    return _DOUBTS.get(dataset.fingerprint or "", "") if isinstance(dataset, Dataset) else ""


def given_path(dataset: Dataset) -> Path | None:
    """Where a user said that own images lie, in this process."""
    return _GIVEN.get(dataset.fingerprint or "")


def read_pack(path: Path, dataset: Dataset, part: Literal["train", "test"]) -> tuple[np.ndarray, np.ndarray]:
    """Images (n, channels, height, width) uint8 and labels (n,) int64 of own data.

    Raises:
        DataError: the file is not there, or holds other images than those described.
    """
    if not path.exists():
        raise DataError(f"{path}: missing, which has the images of {dataset}; use a folder that all hosts share")
    found = read_npz(path, dataset.image[1:])
    same = found.sha256 == dataset.sha256 if part == "train" else found.fingerprint == dataset.fingerprint
    if not same:
        raise DataError(f"{path}: holds other images than when {dataset} was described; use --dataset PATH again")
    return (found.train, found.train_labels) if part == "train" else (found.test, found.test_labels)


def _described(path: Path, resize: Grid | None, cache: Path | None) -> Dataset:
    note = cache / f"{_signature(path, resize)}.json" if cache else None
    known = _noted(note) if note else None
    pack = path if path.is_file() and not resize else None
    if known and cache and note:
        pack = pack or cache / f"{(known.fingerprint or '')[:16]}.npz"
        if pack.exists():
            _note(note, known, path, str(read_json(note).get("doubt", "")))
            return _locate(known, pack)
    found = read_folder(path, resize) if path.is_dir() else read_npz(path, resize)
    dataset = _describe(found, _name_of(found.fingerprint, path, cache))
    if cache and note:
        cache.mkdir(parents=True, exist_ok=True)
        if pack is None:
            pack = cache / f"{found.fingerprint[:16]}.npz"
            found.save(pack)
        _note(note, dataset, path, found.doubt)
    _DOUBTS[found.fingerprint] = found.doubt
    return _locate(dataset, pack) if pack else dataset


def _locate(dataset: Dataset, pack: Path) -> Dataset:
    _LOCATED[dataset.fingerprint or ""] = pack
    return dataset


def _signature(path: Path, resize: Grid | None) -> str:
    """Of names, sizes and times of change, not of the place: a moved folder has the same."""
    files = [path] if path.is_file() else sorted(each for each in path.rglob("*") if each.is_file())
    parts = [(str(each.relative_to(path)) if each != path else "", each.stat()) for each in files]
    told = [resize, *((name, facts.st_size, facts.st_mtime_ns) for name, facts in parts)]
    return hashlib.sha256(repr(told).encode()).hexdigest()[:16]


def described(cache: Path) -> Iterable[tuple[Dataset, str]]:
    """Return the own data that were described in a folder, each once, and where they lay then."""
    seen = {}
    for note in sorted(cache.glob("*.json")):
        dataset = _noted(note)
        if dataset:
            seen[dataset.fingerprint] = (dataset, str(read_json(note).get("path", "")))
    return seen.values()


def _note(note: Path, dataset: Dataset, path: Path, doubt: str) -> None:
    _DOUBTS[dataset.fingerprint or ""] = doubt
    write_atomic(note, json.dumps({"dataset": dataset.model_dump(mode="json"), "path": str(path), "doubt": doubt}))


def _noted(note: Path) -> Dataset | None:
    with suppress(Exception):  # not there, cut off, of another version: it is made again
        return Dataset(**read_json(note)["dataset"])
    return None


def _name_of(fingerprint: str, path: Path, cache: Path | None) -> str:
    """Return the name under which this content is known; else the folder's, without what a study's name cannot have."""
    for known, _ in described(cache) if cache else ():
        if known.fingerprint == fingerprint:
            return known.name
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", path.stem if path.is_file() else path.name).strip("._-")[:40] or "own"
    return f"own-{stem}" if stem in DATASETS else stem


def _describe(found: Read, name: str) -> Dataset:
    image = (found.train.shape[1], found.train.shape[2], found.train.shape[3])
    mean, std = channel_statistics(found.train)
    if min(std) == 0:
        raise DataError(f"{found.path}: all pixels of a channel are alike; there is nothing to learn from")
    dataset = Dataset(
        name=name, image=image, names=found.names, train=len(found.train), test=len(found.test), mean=mean, std=std,
        sha256=found.sha256, like=kind_of(image), shift=max(1, min(image[1:]) // 8), fingerprint=found.fingerprint,
        part=found.part,
    )  # fmt: skip
    if not dataset.patches:
        raise DataError(f"{found.path}: no square patch divides images of {image[1]} x {image[2]} pixels; "
                        f"{resize_words(32, 32)} would help")  # fmt: skip
    return dataset


def channel_statistics(pixels: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel, pixels in [0, 1], to four digits.

    Args:
        pixels: (n, channels, height, width) uint8.
    """
    values = np.arange(256) / 255
    shares = [np.bincount(channel.ravel(), minlength=256) / channel.size for channel in pixels.swapaxes(0, 1)]
    means = [float(share @ values) for share in shares]
    stds = [float(np.sqrt(max(0.0, share @ values**2 - m**2))) for share, m in zip(shares, means, strict=True)]
    return tuple(round(mean, 4) for mean in means), tuple(round(std, 4) for std in stds)
