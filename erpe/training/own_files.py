"""Folders of images and `.npz` files, read and checked: what is wrong with them is one line with the file's name."""

from __future__ import annotations

import hashlib
import io
import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from erpe.errors import DataError
from erpe.io import write_atomic
from erpe.training.published import stratified

Grid = tuple[int, int]

TEST_PART = 0.2
"""Of images that come without a test set."""

MOST_CLASSES = 256


class Read(NamedTuple):
    """Own images: (n, channels, height, width) uint8 and (n,) int64, of both parts."""

    path: Path
    names: tuple[str, ...]
    train: np.ndarray
    train_labels: np.ndarray
    test: np.ndarray
    test_labels: np.ndarray
    part: bool
    """Whether the test set is a fixed stratified part of what was given."""
    doubt: str
    """What may be wrong with it, a line; or nothing."""

    @property
    def sha256(self) -> str:
        """Of pixels and labels of the training set."""
        return sha256(self.train, self.train_labels)

    @property
    def fingerprint(self) -> str:
        """Of pixels, form and labels of both parts."""
        form = np.array(self.train.shape, dtype=np.int64)
        return sha256(form, self.train, self.train_labels, self.test, self.test_labels)

    def save(self, path: Path) -> None:
        """Write an `.npz` that `read_npz` reads."""
        file = io.BytesIO()
        np.savez(
            file, images=self.train, labels=self.train_labels, test_images=self.test, test_labels=self.test_labels,
            names=np.array(self.names),
        )  # fmt: skip
        write_atomic(path, file.getvalue())


def sha256(*arrays: np.ndarray) -> str:
    """Of the numbers of arrays, one after the other."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


class _Part(NamedTuple):
    pixels: np.ndarray
    labels: np.ndarray
    where: list[str]
    """What each image is called in an error."""


def read_folder(path: Path, resize: Grid | None = None) -> Read:
    """`train/CLASS/*` and, if it is there, `test/CLASS/*`; classes in the order of their names.

    Args:
        resize: (height, width); see `erpe.training.own.find_dataset`.
    Raises:
        DataError: see the module.
    """
    folders = _folders(path / "train") if (path / "train").is_dir() else []
    if not folders:
        raise DataError(f"{path}: no train/CLASS folders in it; images go to {path.name}/train/CLASS/, "
                        f"and those to test with to {path.name}/test/CLASS/")  # fmt: skip
    names = tuple(folder.name for folder in folders)
    listed = [(file, label) for label, folder in enumerate(folders) for file in _files(folder)]
    tested = []
    if (path / "test").is_dir():
        for folder in _folders(path / "test"):
            if folder.name not in names:
                raise DataError(f"{folder}: a class that train/ has not; its classes are {', '.join(names[:20])}")
            tested += [(file, names.index(folder.name)) for file in _files(folder)]
        if not tested:
            raise DataError(f"{path / 'test'}: no images in it; without the folder a fifth of the others tests")
    read = _decoded([file for file, _ in listed + tested], resize)
    where = [str(file) for file, _ in listed + tested]
    labels = np.array([label for _, label in listed + tested], dtype=np.int64)
    n = len(listed)
    train, test = _Part(read[:n], labels[:n], where[:n]), _Part(read[n:], labels[n:], where[n:])
    return _checked(path, names, train, test if tested else None)


def _folders(path: Path) -> list[Path]:
    return sorted(each for each in path.iterdir() if each.is_dir() and not each.name.startswith("."))


def _files(path: Path) -> list[Path]:
    """All below a class's folder but hidden ones."""
    return sorted(each for each in path.rglob("*") if each.is_file() and not each.name.startswith("."))


def _decoded(files: list[Path], resize: Grid | None) -> np.ndarray:
    """(n, 1 or 3, height, width): grey if all are."""
    from erpe.pictures import fitted, read_image  # Pillow, which other data do without

    images: list[np.ndarray] = []
    for file in files:
        shown = read_image(file)  # (h, w, 3) in [0, 1]
        grey = np.ptp(shown, axis=2).max() == 0
        planes = shown[..., :1] if grey else shown
        planes = fitted(planes, *resize) if resize else planes
        image = np.rint(planes.clip(0, 1) * 255).astype(np.uint8).transpose(2, 0, 1)
        if images and image.shape[1:] != images[0].shape[1:]:
            (h, w), (h0, w0) = image.shape[1:], images[0].shape[1:]
            raise DataError(f"{file}: {h} x {w} pixels, and {files[0]} has {h0} x {w0}; "
                            f"{resize_words(h0, w0)} makes all alike")  # fmt: skip
        images.append(image)
    channels = max((len(image) for image in images), default=1)
    return np.stack([np.broadcast_to(image, (channels, *image.shape[1:])) for image in images])


def read_npz(path: Path, resize: Grid | None = None) -> Read:
    """`images` and `labels`, perhaps `test_images` and `test_labels`, and `names` of the classes; no pickle.

    Images are uint8, (n, height, width), with 1 or 3 channels last, or first.

    Raises:
        DataError: see the module.
    """
    try:
        opened = np.load(path, allow_pickle=False)
        if isinstance(opened, np.ndarray):
            raise ValueError("it is one array, and an .npz has several")
        with opened as file:
            arrays = {name: file[name] for name in file.files}
    except Exception as error:  # of zipfile, zlib and numpy, about bytes that may be anyone's
        said = str(error)[:200]
        if "pickle" in said:
            said = "an array of Python objects" if "Object arrays" in said else "no zip archive"
        raise DataError(f"{path}: cannot be read as an .npz ({said})") from None
    train = _part_of(path, arrays, "", resize)
    test = _part_of(path, arrays, "test_", resize) if {"test_images", "test_labels"} & arrays.keys() else None
    names = tuple(str(name) for name in arrays["names"].ravel()) if "names" in arrays else ()
    if not names and len(train.labels):
        names = tuple(map(str, range(min(MOST_CLASSES, max(0, int(train.labels.max()))) + 1)))
    return _checked(path, names, train, test)


def _part_of(path: Path, arrays: dict[str, np.ndarray], prefix: str, resize: Grid | None) -> _Part:
    for name in (f"{prefix}images", f"{prefix}labels"):
        if name not in arrays:
            raise DataError(f"{path}: no array {name!r} in it; it has {', '.join(arrays) or 'none'}")
    images, labels = arrays[f"{prefix}images"], arrays[f"{prefix}labels"]
    if images.dtype != np.uint8:
        raise DataError(f"{path}: {prefix}images are {images.dtype}; use uint8 from 0 to 255 instead")
    if not np.issubdtype(labels.dtype, np.integer) or labels.ndim != 1 or len(labels) != len(images):
        raise DataError(f"{path}: {prefix}labels are {labels.dtype} {labels.shape}; use one whole number an image")
    if images.ndim == 3:
        images = images[:, None]
    elif images.ndim == 4 and images.shape[1] not in (1, 3) and images.shape[3] in (1, 3):
        images = images.transpose(0, 3, 1, 2)
    if images.ndim != 4 or images.shape[1] not in (1, 3) or not images.size:
        given = arrays[f"{prefix}images"].shape
        raise DataError(f"{path}: {prefix}images are {given}; use (n, height, width), or 1 or 3 channels last")
    if resize and images.shape[2:] != resize:
        from erpe.pictures import fitted

        planes = (fitted(image.transpose(1, 2, 0) / 255, *resize) for image in images)
        images = np.stack([np.rint(each.clip(0, 1) * 255).astype(np.uint8).transpose(2, 0, 1) for each in planes])
    where = [f"{path}: {prefix}images[{place}]" for place in range(len(images))]
    return _Part(np.ascontiguousarray(images), labels.astype(np.int64), where)


def resize_words(height: int, width: int) -> str:
    """What gives images a size: the option of a command, and the line of a study file or a program."""
    return f'--resize {height}x{width} (in a study file or a program: resize = "{height}x{width}")'


def _checked(path: Path, names: tuple[str, ...], train: _Part, test: _Part | None) -> Read:
    for part in (train, test) if test else (train,):
        wrong = np.flatnonzero((part.labels < 0) | (part.labels >= len(names)))
        if len(wrong):
            label = part.labels[wrong[0]]
            use = "0 or more" if label < 0 else f"0 to {len(names) - 1}"  # without names, the labels say how many
            raise DataError(f"{part.where[wrong[0]]}: label {label}; use {use} instead")
    if test and test.pixels.shape[1:] != train.pixels.shape[1:]:
        (c, h, w), own = train.pixels.shape[1:], test.pixels.shape[1:]
        remedy = f"{resize_words(h, w)} makes all alike" if c == own[0] else "use as many channels in both"
        raise DataError(f"{path}: test images are {own}, training images {(c, h, w)}; {remedy}")
    if not 2 <= len(names) <= MOST_CLASSES:
        raise DataError(f"{path}: classes: {len(names)} given; use 2 to {MOST_CLASSES} instead")
    counts = np.bincount(train.labels, minlength=len(names))
    few = int(counts.argmin())
    if counts[few] < 2:
        what, last = "one image" if counts[few] else "no image", int(train.labels.argmax())
        why = "" if counts[few] else f", and {train.where[last]} has label {train.labels[last]}"
        raise DataError(f"{path}: class {names[few]} has {what} to train with{why}; a class needs 2 or more")
    if test:
        for place, twin in _twins(train, test):
            raise DataError(f"{test.where[place]}: also in the training set, as {train.where[twin]}; take one out")
        doubt = _contradiction(names, train) or _contradiction(names, test)
        return Read(path, names, train.pixels, train.labels, test.pixels, test.labels, part=False, doubt=doubt)
    if counts.min() < 4:
        where = f"class {names[few]} has {counts[few]} images, too few to set a fifth apart to test with"
        raise DataError(f"{path}: {where}; give 4 or more a class, or a test set")
    size = max(len(names), math.ceil(TEST_PART * len(train.labels)))
    first, second = stratified(train.labels, size, seed=0)
    kept, held = (_Part(train.pixels[rows], train.labels[rows], []) for rows in (first, second))
    twins = {place for place, _ in _twins(kept, held)}  # an image that is there twice tests nothing
    rows = np.array([place for place in range(len(held.labels)) if place not in twins], dtype=np.int64)
    if not len(rows):
        raise DataError(f"{path}: each image is there twice; nothing is left to test with")
    held, doubt = _Part(held.pixels[rows], held.labels[rows], []), _contradiction(names, train)
    return Read(path, names, kept.pixels, kept.labels, held.pixels, held.labels, part=True, doubt=doubt)


def _contradiction(names: tuple[str, ...], part: _Part) -> str:
    """Return a line on pictures that are there twice, byte for byte, in two classes; or nothing."""
    first: dict[bytes, int] = {}
    twins = [(place, first.setdefault(digest, place)) for place, digest in enumerate(_digests(part))]
    pairs = [(place, twin) for place, twin in twins if part.labels[place] != part.labels[twin]]
    if not pairs:
        return ""
    one, other = (f"{part.where[place]} (class {names[part.labels[place]]})" for place in pairs[0])
    more = f"; {len(pairs) - 1:,} more such pairs" if len(pairs) > 1 else ""
    return f"{one} is the same picture as {other}{more}"


def _digests(part: _Part) -> Iterator[bytes]:
    return (hashlib.sha256(image.tobytes()).digest() for image in part.pixels)


def _twins(train: _Part, test: _Part) -> Iterator[tuple[int, int]]:
    """Places of test images that are training images, byte for byte, and the places of those."""
    known = {digest: place for place, digest in enumerate(_digests(train))}
    for place, digest in enumerate(_digests(test)):
        if digest in known:
            yield place, known[digest]
