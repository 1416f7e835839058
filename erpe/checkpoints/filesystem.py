"""Files in storage that fsspec knows, whole or not at all; it may go away for a while."""

from __future__ import annotations

import hashlib
import os
import tempfile
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from erpe.errors import ConfigError, ErpeError, StoreError
from erpe.io import MIB
from erpe.store import FILES
from erpe.text import redact

PATIENCE_SECONDS = 60.0
"""How long a call waits for storage that went away before the study stops, resumable."""

# One write of these appears whole or not at all; elsewhere a file is written under another name and moved.
_OBJECTS = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "memory"}

# Its defaults wait for minutes before anyone may try again.
_OPTIONS = {
    "s3": {"config_kwargs": {"connect_timeout": 5, "read_timeout": 30, "retries": {"total_max_attempts": 1}}},
}  # fmt: skip

T = TypeVar("T")


@dataclass(frozen=True)
class Remote:
    """A folder or a bucket at a URL, which must be there.

    Raises:
        StoreError: by every call, when the storage is away for longer than our patience, or refuses us.
        ConfigError: by every call, when there is no such kind of storage, or its package is not installed.
    """

    url: str
    patience: float = PATIENCE_SECONDS

    def write(self, name: str, data: bytes) -> None:
        """Write a file, whole or not at all."""
        with tempfile.NamedTemporaryFile(prefix="erpe-") as file:
            file.write(data)
            file.flush()
            self.send(Path(file.name), name)

    def read(self, name: str, most: int = MIB) -> bytes | None:
        """Return a small file, or None if there is none."""
        with tempfile.TemporaryDirectory(prefix="erpe-") as folder:
            path = Path(folder) / "file"
            return path.read_bytes() if self._reach(partial(self._get, name, path, most), False) else None

    def clear(self, name: str) -> None:
        """Remove a folder."""
        self._reach(partial(self._remove, name), None)

    def send(self, path: Path, name: str) -> None:
        """Write a file of this machine there."""
        if self._reach(partial(self._put, path, name), None) is None:
            raise StoreError(f"checkpoints {self}: no such bucket or folder")

    def fetch(self, name: str, path: Path, sha256: str | None = None) -> bool:
        """Write a file, under its name only when all of it is here."""
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        os.close(handle)
        draft = Path(temporary)
        try:
            if not self._reach(partial(self._get, name, draft, FILES[path.name]), False):
                return False
            if sha256 and sha256_of(draft) != sha256:
                raise StoreError(f"checkpoints {self}/{name}: its checksum differs; the file is damaged")
            draft.chmod(0o644)
            os.replace(draft, path)
            return True
        finally:
            draft.unlink(missing_ok=True)

    def _open(self) -> tuple[Any, str]:
        """Its file system, and the path there.

        Raises:
            ConfigError: no such kind is known, or its package is not installed.
        """
        import fsspec

        protocol = self.url.partition("://")[0]
        wanted = {} if protocol in fsspec.config.conf else _OPTIONS.get(protocol, {})
        try:
            return fsspec.core.url_to_fs(self.url.rstrip("/"), **wanted)
        except ImportError as error:
            raise ConfigError(f"ERPE_CHECKPOINTS {self}: {error} (of s3: `pip install 'erpe[s3]'`)") from None
        except ValueError as error:
            raise ConfigError(f"ERPE_CHECKPOINTS {self}: {error}; use s3://BUCKET/FOLDER instead") from None

    def _put(self, path: Path, name: str) -> bool:
        system, root = self._open()
        target = f"{root}/{name}"
        if _is_objects(system):
            system.put_file(str(path), target)
            return True
        if not system.isdir(root):  # else a mount that is not there would be made on a host's own disk
            raise FileNotFoundError(root)
        draft = f"{target}.{uuid.uuid4().hex}"
        system.makedirs(target.rpartition("/")[0], exist_ok=True)
        system.put_file(str(path), draft)
        system.mv(draft, target)
        return True

    def _get(self, name: str, path: Path, most: int) -> bool:
        system, root = self._open()
        found = system.info(f"{root}/{name}")
        if found["type"] != "file" or found.get("islink") or found["size"] > most:
            raise StoreError(f"checkpoints {self}/{name}: no plain file of at most {most} bytes, and so not taken")
        system.get_file(f"{root}/{name}", str(path))
        return True

    def _remove(self, name: str) -> None:
        system, root = self._open()
        system.invalidate_cache()
        system.rm(f"{root}/{name}", recursive=True)

    def _reach(self, call: Callable[[], T], missing: T) -> T:
        """Return the call's answer, or what stands for a file that is not there. Storage that is away is waited for.

        Raises:
            StoreError: it stayed away, or refuses us.
        """
        began, pause = time.monotonic(), 0.1
        while True:
            try:
                return call()
            except FileNotFoundError:
                return missing
            except ErpeError:
                raise
            except Exception as error:  # those of botocore, paramiko and aiohttp have no class in common
                waited = time.monotonic() - began
                said = " ".join(str(error).split())[:200] or type(error).__name__
                if isinstance(error, PermissionError) or waited > self.patience:
                    why = f"cannot be reached ({redact(said)}); nothing is lost, the same command continues"
                    raise StoreError(f"checkpoints {self}: {why}") from error
            time.sleep(pause)
            pause = min(2 * pause, 5.0)

    def __str__(self) -> str:
        return redact(self.url)


def _is_objects(system: Any) -> bool:
    protocols = {system.protocol} if isinstance(system.protocol, str) else set(system.protocol)
    return bool(protocols & _OBJECTS)


def sha256_of(path: Path) -> str:
    """Of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
