"""Read and write plain files: whole or not at all, never through a link, never larger than expected."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import stat
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from erpe.errors import StoreError

if TYPE_CHECKING:
    import numpy as np

MOST_BYTES = 64 * 2**20
"""Of an array read from a store; a hostile file could unfold to any size."""

MIB = 2**20

MOST_JSON = 16 * MIB
"""Bytes of any JSON file that is read; erpe writes far smaller ones."""

_UNFOLLOWED = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write a file whole or not at all: temporary file, fsync, rename.

    Raises:
        OSError: the disk is full or the folder is gone; the old file is intact.
    """
    data = content.encode() if isinstance(content, str) else content
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            os.fchmod(handle, 0o644)  # a temporary file is its owner's alone
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def open_plain(path: Path, flags: int) -> int:
    """Return the descriptor of a plain file: no link, which could point anywhere, and no pipe, which could never
    answer.

    Raises:
        OSError: it is one, or cannot be opened.
    """
    try:
        handle = os.open(path, flags | _UNFOLLOWED, 0o644)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise OSError(errno.ELOOP, "a link", str(path)) from None
        raise
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(errno.EINVAL, "not a plain file", str(path))
    return handle


def read_plain(path: Path, most: int = MOST_JSON) -> bytes:
    """Return the bytes of a plain file that someone else may have written.

    Raises:
        OSError: there is none, it is no plain file, or it has more than `most` bytes.
    """
    with os.fdopen(open_plain(path, os.O_RDONLY), "rb") as file:
        if os.fstat(file.fileno()).st_size > most:
            raise OSError(errno.EFBIG, f"more than {most} bytes", str(path))
        return file.read()


def parse_json(data: bytes | str) -> Any:
    """Return what a JSON text says.

    Raises:
        ValueError: it is none, or nested deeper than anyone would.
    """
    try:
        return json.loads(data)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_json(path: Path) -> Any:
    """Return a JSON file of the store.

    Raises:
        StoreError: it is missing, damaged, too large or no plain file.
    """
    try:
        return parse_json(read_plain(path))
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise StoreError(f"{path}: cannot be read ({why}); the file is missing or damaged") from None


def remove_folder(folder: Path) -> None:
    """Remove a folder with all that is in it; one that is gone, or half gone, is no mistake.

    Raises:
        StoreError: it is a link, or cannot be removed.
    """
    try:
        shutil.rmtree(folder)
    except FileNotFoundError:
        return
    except OSError as error:
        place = error.filename or folder
        raise StoreError(f"{place}: cannot be removed ({error.strerror or error}); the same command goes on") from None


def size_mib(path: Path) -> float:
    """Return what a file or folder takes, in MiB."""
    return sum(each.lstat().st_size for each in [path, *path.rglob("*")] if each.is_file()) / 2**20


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Return the arrays of an `.npz`; nothing in it can run code.

    Raises:
        StoreError: it is missing, damaged, no plain file, or larger, also when unfolded, than `MOST_BYTES`.
    """
    import numpy as np

    try:
        data = io.BytesIO(read_plain(path, MOST_BYTES))
        if sum(part.file_size for part in zipfile.ZipFile(data).infolist()) > MOST_BYTES:
            raise StoreError(f"{path}: larger than {MOST_BYTES} bytes")
        with np.load(data, allow_pickle=False) as found:
            return {name: found[name] for name in found.files}
    except StoreError:
        raise
    except OSError as error:
        raise StoreError(f"{path}: missing or damaged ({error.strerror or error})") from None
    except Exception as error:  # of zipfile, zlib, lzma and numpy, about bytes that may be anyone's
        raise StoreError(f"{path}: missing or damaged ({type(error).__name__}: {str(error)[:200]})") from None
