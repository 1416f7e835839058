"""Checkpoints where hosts share no folder: `ERPE_CHECKPOINTS`, a place that fsspec knows.

    URL/STUDY/NUMBER-SEED/owner                  the attempt at this trial that counts
    URL/STUDY/NUMBER-SEED/ATTEMPT.safetensors    its last epoch, with a checksum in it
    URL/STUDY/NUMBER-SEED/ATTEMPT.zip            its results

Each attempt writes files of its own: one that was cut off, and comes back when another attempt trains its trial,
overwrites nothing, however late its bytes arrive. The driver brings what has ended into its store; then it goes here.
"""

from __future__ import annotations

import os
import re
import tempfile
import uuid
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile

from erpe.errors import ConfigError, ErpeError, StoreError
from erpe.io import MIB, write_atomic
from erpe.store import FILES, OUTCOME, OWNER, STATE, let_go
from erpe.text import redact

_OBJECTS = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "memory"}
"""One write of these appears whole or not at all; elsewhere a file is written under another name and moved."""


def find_remote() -> RemoteCheckpoints | None:
    """Return what `ERPE_CHECKPOINTS` names; None where all hosts share the store's folder.

    Raises:
        ConfigError, StoreError: it cannot be read.
    """
    url = os.environ.get("ERPE_CHECKPOINTS")
    if not url:
        return None
    RemoteCheckpoints(url, tries=2).read(OWNER)  # a wrong address should not take a minute to be told
    return RemoteCheckpoints(url)


@dataclass(frozen=True)
class RemoteCheckpoints:
    """Folders of trials in a folder or a bucket at a URL, which must be there.

    Raises:
        StoreError: by every call, when the storage stays away or refuses us.
        ConfigError: by every call, when there is no such kind of storage, or its package is not installed.
    """

    url: str
    tries: int = 8
    """Of each call to S3, with growing pauses, a minute in all; other clients have patience of their own."""

    # Between a trial's folder here and the remote

    def new_attempt(self, folder: Path, trial: str) -> str:
        """Start a new attempt, which begins with what the folder has, and counts from then on."""
        attempt = uuid.uuid4().hex
        self._send(folder, f"{trial}/{attempt}")
        self.write(f"{trial}/{OWNER}", attempt.encode())
        return attempt

    def save(self, folder: Path, trial: str, attempt: str) -> bool:
        """Send what the folder has now; whether the attempt still counts."""
        self._send(folder, f"{trial}/{attempt}")
        return self._owner(trial) == attempt

    def download(self, folder: Path, trial: str) -> bool:
        """Bring what counts of a trial into a folder, and nothing else.

        Returns:
            Whether there were results.
        Raises:
            StoreError: a file has other bytes than were sent, or has no place in a trial's folder.
        """
        attempt = self._owner(trial)
        if attempt is None:
            return False
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="erpe-") as scratch:
            results = Path(scratch) / "results.zip"
            if not self._fetch(f"{trial}/{attempt}.zip", results, sum(FILES.values())):
                self._fetch(f"{trial}/{attempt}.safetensors", folder / STATE, FILES[STATE])
                return False
            _unpack(results, folder, f"{self}/{trial}")
        let_go(folder)
        return True

    # For the driver

    def upload(self, folder: Path) -> None:
        """Send what the store has of a trial and the remote lacks: it was begun without one, or is to be measured."""
        trial = name_of(folder)
        if (folder / OUTCOME).exists() or ((folder / STATE).exists() and self._owner(trial) is None):
            self.new_attempt(folder, trial)

    def collect(self, folder: Path, finished: bool) -> None:
        """Bring a trial that has ended into the store.

        Args:
            finished: it has results, and not only the checkpoint of a trial that was pruned.
        Raises:
            StoreError: they are not there.
        """
        if not self.download(folder, name_of(folder)) and finished:
            raise StoreError(f"checkpoints {self}/{name_of(folder)}: no results there; the same command tries again")

    # Files

    def write(self, name: str, content: bytes | Path) -> None:
        """Write a file, whole or not at all."""
        try:
            with self._reached() as (system, root):
                kinds = [system.protocol] if isinstance(system.protocol, str) else system.protocol
                target = draft = f"{root}/{name}"
                if _OBJECTS.isdisjoint(kinds):
                    if not system.isdir(root):  # else a mount that is not there would be made on a host's own disk
                        raise FileNotFoundError(root)
                    draft = f"{target}.{uuid.uuid4().hex}"
                    system.makedirs(target.rpartition("/")[0], exist_ok=True)
                system.put_file(str(content), draft) if isinstance(content, Path) else system.pipe_file(draft, content)
                if draft != target:
                    system.mv(draft, target)
        except FileNotFoundError:
            raise StoreError(f"checkpoints {self}: no such bucket or folder") from None

    def read(self, name: str) -> bytes | None:
        """Return a file of at most 1 MiB, or None if there is none."""
        with tempfile.TemporaryDirectory(prefix="erpe-") as scratch:
            path = Path(scratch) / "file"
            return path.read_bytes() if self._fetch(name, path, MIB) else None

    def remove(self, name: str) -> None:
        """Remove a folder; that there is none is no mistake."""
        with suppress(FileNotFoundError), self._reached() as (system, root):
            system.invalidate_cache()
            system.rm(f"{root}/{name}", recursive=True)

    def _fetch(self, name: str, path: Path, most: int) -> bool:
        """Bring a file here, whole or not at all; whether there is one."""
        draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}")  # as `erpe.store.tidy` knows it
        try:
            with self._reached() as (system, root):
                found = system.info(f"{root}/{name}")
                if found["type"] != "file" or found.get("islink") or found["size"] > most:
                    raise StoreError(f"checkpoints {self}/{name}: no plain file of at most {most} bytes; not taken")
                system.get_file(f"{root}/{name}", str(draft))
            os.replace(draft, path)
            return True
        except FileNotFoundError:
            return False
        finally:
            draft.unlink(missing_ok=True)

    def _send(self, folder: Path, place: str) -> None:
        """Send the results of a finished trial, or else its last epoch's checkpoint, if it has any."""
        if (folder / OUTCOME).exists():
            with tempfile.NamedTemporaryFile(prefix="erpe-") as file:
                with ZipFile(file, "w", strict_timestamps=False) as archive:
                    for name in FILES.keys() - {STATE}:
                        if (folder / name).exists():
                            archive.write(folder / name, name)
                file.flush()
                self.write(f"{place}.zip", Path(file.name))
        elif (folder / STATE).exists():
            self.write(f"{place}.safetensors", folder / STATE)

    def _owner(self, trial: str) -> str | None:
        found = (self.read(f"{trial}/{OWNER}") or b"").decode(errors="replace")
        return found if re.fullmatch(r"[0-9a-f]{32}", found) else None

    @contextmanager
    def _reached(self) -> Iterator[tuple[Any, str]]:
        """Yield the file system, and the path in it; what goes wrong there, but for a missing file, is one line."""
        import fsspec

        retries = {"mode": "standard", "total_max_attempts": self.tries}
        s3 = {"config_kwargs": {"connect_timeout": 5, "read_timeout": 30, "retries": retries}}
        protocol = self.url.partition("://")[0]
        try:
            options = s3 if protocol == "s3" and "s3" not in fsspec.config.conf else {}
            opened = fsspec.core.url_to_fs(self.url.rstrip("/"), **options)
        except ImportError as error:
            raise ConfigError(f"ERPE_CHECKPOINTS {self}: {error} (of s3: `pip install 'erpe[s3]'`)") from None
        except ValueError as error:
            raise ConfigError(f"ERPE_CHECKPOINTS {self}: {error}; use s3://BUCKET/FOLDER instead") from None
        try:
            yield opened
        except (FileNotFoundError, ErpeError):
            raise
        except Exception as error:  # those of botocore, paramiko and aiohttp have no class in common
            said = " ".join(str(error).split())[:200] or type(error).__name__
            why = f"cannot be reached ({redact(said)}); nothing is lost, the same command continues"
            raise StoreError(f"checkpoints {self}: {why}") from error

    def __str__(self) -> str:
        return redact(self.url)


@contextmanager
def checked_out(remote: RemoteCheckpoints | None, *folders: Path) -> Iterator[None]:
    """Lend finished trials of the store to a worker that measures them; what it measures comes home."""
    if remote is None:
        yield
        return
    for folder in folders:
        remote.upload(folder)
    yield
    for folder in folders:
        remote.collect(folder, finished=True)
        remote.remove(name_of(folder))


def name_of(folder: Path) -> str:
    """Return a trial's name in the remote, from its folder in the store: STUDY/NUMBER-SEED."""
    return "/".join(folder.parts[-2:])


def _unpack(results: Path, folder: Path, where: str) -> None:
    try:
        with ZipFile(results) as archive:
            sizes = {entry.filename: entry.file_size for entry in archive.infolist()}
            if OUTCOME not in sizes or STATE in sizes or any(FILES.get(name, -1) < sizes[name] for name in sizes):
                raise ValueError("it has other files than a finished trial")
            for name in sorted(sizes, key=OUTCOME.__eq__):  # it makes the folder a finished one: last
                write_atomic(folder / name, archive.read(name))
    except (BadZipFile, zlib.error, EOFError, ValueError, RuntimeError) as error:
        raise StoreError(f"checkpoints {where}: the results are damaged ({error})") from None
