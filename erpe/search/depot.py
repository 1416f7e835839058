"""Checkpoints on their way between hosts that share no folder: `ERPE_CHECKPOINTS`, a place that fsspec knows.

    URL/STUDY/NUMBER-SEED/owner                           the attempt at this trial that counts
    URL/STUDY/NUMBER-SEED/ATTEMPT/training.safetensors    its last epoch
    URL/STUDY/NUMBER-SEED/ATTEMPT/..., files.json         its results; last, their checksums

Each attempt writes to a folder of its own: one that was cut off, and comes back when another one trains its trial,
overwrites nothing, however late its bytes arrive. The driver brings what has ended into its store; then it goes here.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from erpe.errors import ConfigError, ErpeError, StoreError
from erpe.store import FILES, MIB, OWNER, STATE, let_go, parse_json
from erpe.telling import redact

PATIENCE_SECONDS = 60.0
"""How long a call waits for storage that went away before the study stops, resumable."""

OPENING_SECONDS = 5.0
"""How long the first call waits."""

LISTING, OUTCOME = "files.json", "outcome.json"

# One write of these appears whole or not at all; elsewhere a file is written under another name and moved.
_OBJECTS = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "memory"}

# Its defaults wait for minutes before anyone may try again.
_OPTIONS = {
    "s3": {"config_kwargs": {"connect_timeout": 5, "read_timeout": 30, "retries": {"total_max_attempts": 1}}},
}  # fmt: skip

T = TypeVar("T")


def find_depot() -> Depot | None:
    """What `ERPE_CHECKPOINTS` names; none: all hosts share the store's folder.

    Raises:
        ConfigError, StoreError: it cannot be read.
    """
    url = os.environ.get("ERPE_CHECKPOINTS")
    if not url:
        return None
    Depot(url, OPENING_SECONDS).read(OWNER)  # a wrong key should not take a minute to be told
    return Depot(url)


@dataclass(frozen=True)
class Depot:
    """Folders of trials at a URL, which must be there.

    Raises:
        StoreError: by every call, when the storage is away for longer than our patience, or refuses us.
        ConfigError: by every call, when there is no such kind of storage, or its package is not installed.
    """

    url: str
    patience: float = PATIENCE_SECONDS

    # Between a trial's folder here and the depot

    def begin(self, folder: Path, trial: str) -> str:
        """A new attempt, which begins with what the folder has, and counts from then on."""
        attempt = uuid.uuid4().hex
        self._send_all(folder, f"{trial}/{attempt}")
        self.write(f"{trial}/{OWNER}", attempt.encode())
        return attempt

    def save(self, folder: Path, trial: str, attempt: str) -> bool:
        """Send what the folder has now; whether the attempt still counts."""
        self._send_all(folder, f"{trial}/{attempt}")
        return self._owner(trial) == attempt

    def receive(self, folder: Path, trial: str) -> bool:
        """Bring what counts of a trial into a folder, and nothing else; whether there was anything.

        Raises:
            StoreError: a file has other bytes than were sent, or has no place in a trial's folder.
        """
        attempt = self._owner(trial)
        if attempt is None:
            return False
        folder.mkdir(parents=True, exist_ok=True)
        place = f"{trial}/{attempt}"
        listing = self.read(f"{place}/{LISTING}")
        if listing is None:
            return self._receive(f"{place}/{STATE}", folder / STATE)
        sums = _parse_sums(listing, f"{self}/{place}/{LISTING}")
        for name in sorted(sums, key=OUTCOME.__eq__):  # it makes the folder a finished one: last
            if not self._receive(f"{place}/{name}", folder / name, sums[name]):
                raise StoreError(f"checkpoints {self}/{place}/{name}: missing; its trial would have to begin again")
        let_go(folder)
        return True

    # For the driver

    def offer(self, folder: Path) -> None:
        """Send what the store has of a trial and the depot lacks: it was begun without one, or is to be measured."""
        trial = name_of(folder)
        if (folder / OUTCOME).exists() or ((folder / STATE).exists() and self._owner(trial) is None):
            self.begin(folder, trial)

    def bring(self, folder: Path, finished: bool) -> None:
        """Bring a trial that has ended into the store.

        Args:
            finished: it has results, and not only the checkpoint of a trial that was pruned.
        Raises:
            StoreError: they are not there.
        """
        self.receive(folder, name_of(folder))
        if finished and not (folder / OUTCOME).exists():
            raise StoreError(f"checkpoints {self}/{name_of(folder)}: no results there; the same command tries again")

    def remove(self, folder: Path) -> None:
        """Remove what is there of a trial; that there is nothing is no mistake."""
        self.clear(name_of(folder))

    # Single files

    def write(self, name: str, data: bytes) -> None:
        """Write a file, whole or not at all."""
        with tempfile.NamedTemporaryFile(prefix="erpe-") as file:
            file.write(data)
            file.flush()
            self._send(Path(file.name), name)

    def read(self, name: str, most: int = MIB) -> bytes | None:
        """A small file, or None if there is none."""
        with tempfile.TemporaryDirectory(prefix="erpe-") as folder:
            path = Path(folder) / "file"
            return path.read_bytes() if self._reach(partial(self._get, name, path, most), False) else None

    def clear(self, name: str) -> None:
        """Remove a folder."""
        self._reach(partial(self._remove, name), None)

    def _send_all(self, folder: Path, place: str) -> None:
        """The results of a finished trial, or else its last epoch's checkpoint, if it has any."""
        if not (folder / OUTCOME).exists():
            if (folder / STATE).exists():
                self._send(folder / STATE, f"{place}/{STATE}")
            return
        names = [name for name in FILES if name != STATE and (folder / name).exists()]
        for name in names:
            self._send(folder / name, f"{place}/{name}")
        self.write(f"{place}/{LISTING}", json.dumps({name: _sha256(folder / name) for name in names}).encode())

    def _send(self, path: Path, name: str) -> None:
        if self._reach(partial(self._put, path, name), None) is None:
            raise StoreError(f"checkpoints {self}: no such bucket or folder")

    def _receive(self, name: str, path: Path, sha256: str | None = None) -> bool:
        """A file, under its name only when all of it is here."""
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        os.close(handle)
        draft = Path(temporary)
        try:
            if not self._reach(partial(self._get, name, draft, FILES[path.name]), False):
                return False
            if sha256 and _sha256(draft) != sha256:
                raise StoreError(f"checkpoints {self}/{name}: its checksum differs; the file is damaged")
            draft.chmod(0o644)
            os.replace(draft, path)
            return True
        finally:
            draft.unlink(missing_ok=True)

    def _owner(self, trial: str) -> str | None:
        found = (self.read(f"{trial}/{OWNER}", 100) or b"").decode(errors="replace")
        return found if re.fullmatch(r"[0-9a-f]{32}", found) else None

    # fsspec

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
            raise ConfigError(f"ERPE_CHECKPOINTS {self}: {error}; s3://BUCKET/FOLDER would do") from None

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
        """The call's answer, or what stands for a file that is not there. Storage that is away is waited for.

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


@contextmanager
def lent(depot: Depot | None, *folders: Path) -> Iterator[None]:
    """Finished trials of the store, in the depot for a worker to measure; what it measures comes home."""
    if depot is None:
        yield
        return
    for folder in folders:
        depot.offer(folder)
    yield
    for folder in folders:
        depot.bring(folder, finished=True)
        depot.remove(folder)


def name_of(folder: Path) -> str:
    """A trial's name in the depot, from its folder in the store: STUDY/NUMBER-SEED."""
    return "/".join(folder.parts[-2:])


def _is_objects(system: Any) -> bool:
    protocols = {system.protocol} if isinstance(system.protocol, str) else set(system.protocol)
    return bool(protocols & _OBJECTS)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _parse_sums(data: bytes, where: str) -> dict[str, str]:
    """Name -> checksum."""
    try:
        sums = parse_json(data)
    except ValueError:
        sums = None
    if not isinstance(sums, dict) or OUTCOME not in sums or not sums.keys() <= FILES.keys() - {STATE}:
        raise StoreError(f"checkpoints {redact(where)}: no list of a trial's files; it is damaged")
    return sums
