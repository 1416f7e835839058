"""Checkpoints on their way between hosts that share no folder: `ERPE_CHECKPOINTS`, a place that fsspec knows.

    URL/STUDY/NUMBER-SEED/owner                           the attempt at this trial that counts
    URL/STUDY/NUMBER-SEED/ATTEMPT/training.safetensors    its last epoch
    URL/STUDY/NUMBER-SEED/ATTEMPT/..., files.json         its results; last, their checksums

Each attempt writes to a folder of its own: one that was cut off, and comes back when another attempt trains its trial,
overwrites nothing, however late its bytes arrive. The driver brings what has ended into its store; then it goes here.
"""

from __future__ import annotations

import json
import os
import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from erpe.checkpoints.filesystem import Remote, sha256_of
from erpe.errors import StoreError
from erpe.io import parse_json
from erpe.store import FILES, OWNER, STATE, let_go
from erpe.text import redact

OPENING_SECONDS = 5.0
"""How long the first call waits."""

LISTING, OUTCOME = "files.json", "outcome.json"


def find_remote() -> RemoteCheckpoints | None:
    """Return what `ERPE_CHECKPOINTS` names; None where all hosts share the store's folder.

    Raises:
        ConfigError, StoreError: it cannot be read.
    """
    url = os.environ.get("ERPE_CHECKPOINTS")
    if not url:
        return None
    RemoteCheckpoints(url, OPENING_SECONDS).read(OWNER)  # a wrong key should not take a minute to be told
    return RemoteCheckpoints(url)


@dataclass(frozen=True)
class RemoteCheckpoints(Remote):
    """Folders of trials; what its calls raise, see `Remote`."""

    # Between a trial's folder here and the remote

    def new_attempt(self, folder: Path, trial: str) -> str:
        """Start a new attempt, which begins with what the folder has, and counts from then on."""
        attempt = uuid.uuid4().hex
        self._send_all(folder, f"{trial}/{attempt}")
        self.write(f"{trial}/{OWNER}", attempt.encode())
        return attempt

    def save(self, folder: Path, trial: str, attempt: str) -> bool:
        """Send what the folder has now; whether the attempt still counts."""
        self._send_all(folder, f"{trial}/{attempt}")
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
        place = f"{trial}/{attempt}"
        listing = self.read(f"{place}/{LISTING}")
        if listing is None:
            self.fetch(f"{place}/{STATE}", folder / STATE)
            return False
        sums = _parse_sums(listing, f"{self}/{place}/{LISTING}")
        for name in sorted(sums, key=OUTCOME.__eq__):  # it makes the folder a finished one: last
            if not self.fetch(f"{place}/{name}", folder / name, sums[name]):
                raise StoreError(f"checkpoints {self}/{place}/{name}: missing; its trial would have to begin again")
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

    def remove(self, folder: Path) -> None:
        """Remove what is there of a trial; that there is nothing is no mistake."""
        self.clear(name_of(folder))

    def _send_all(self, folder: Path, place: str) -> None:
        """Download the results of a finished trial, or else its last epoch's checkpoint, if it has any."""
        if not (folder / OUTCOME).exists():
            if (folder / STATE).exists():
                self.send(folder / STATE, f"{place}/{STATE}")
            return
        names = [name for name in FILES if name != STATE and (folder / name).exists()]
        for name in names:
            self.send(folder / name, f"{place}/{name}")
        self.write(f"{place}/{LISTING}", json.dumps({name: sha256_of(folder / name) for name in names}).encode())

    def _owner(self, trial: str) -> str | None:
        found = (self.read(f"{trial}/{OWNER}", 100) or b"").decode(errors="replace")
        return found if re.fullmatch(r"[0-9a-f]{32}", found) else None


@contextmanager
def checked_out(remote: RemoteCheckpoints | None, *folders: Path) -> Iterator[None]:
    """Finished trials of the store, in the remote for a worker to measure; what it measures comes home."""
    if remote is None:
        yield
        return
    for folder in folders:
        remote.upload(folder)
    yield
    for folder in folders:
        remote.collect(folder, finished=True)
        remote.remove(folder)


def name_of(folder: Path) -> str:
    """Return a trial's name in the remote, from its folder in the store: STUDY/NUMBER-SEED."""
    return "/".join(folder.parts[-2:])


def _parse_sums(data: bytes, where: str) -> dict[str, str]:
    """Name -> checksum."""
    try:
        sums = parse_json(data)
    except ValueError:
        sums = None
    if not isinstance(sums, dict) or OUTCOME not in sums or not sums.keys() <= FILES.keys() - {STATE}:
        raise StoreError(f"checkpoints {redact(where)}: no list of a trial's files; it is damaged")
    return sums
