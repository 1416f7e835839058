"""How far a server has a study, as far as it confirmed: what is not behind is not asked for."""

from __future__ import annotations

import contextlib
import hashlib
import json
import time

from erpe import __version__
from erpe.io import parse_json, read_plain, write_atomic
from erpe.store import Store, sqlite_path
from erpe.tracking.image import RunImage
from erpe.tracking.marks import GONE, Mark

CHECKED = 50
"""Runs that a look compares in full though they seem whole: what was lost within a learning curve is found in turn."""


class Cursor:
    """How far a server has a study: a small file, whose loss costs a comparison and nothing else."""

    def __init__(self, store: Store, study: str) -> None:
        """Read what is known of the server that the store names; nothing, if that cannot be read."""
        digest = hashlib.sha256(store.destination.encode()).hexdigest()[:8]
        self.path = store.tracking / f"{study}-{digest}.json"
        self.server = store.destination
        self.at = 0.0
        """When it was written last, in seconds since 1970."""
        self.runs: dict[str, Mark] = {}
        self.whole: dict[str, str] = {}
        """Fingerprints of runs that lacked nothing when they were compared in full, the longest ago first."""
        self.left = ""
        """What MLflow's database was like when it was left, see `database_state`; empty: unknown."""
        self.unchecked = 0
        """How many of `whole` were not compared in full since someone else wrote to that database."""
        self._uri = store.tracking_uri
        with contextlib.suppress(OSError, ValueError, TypeError, AttributeError, KeyError):
            found = parse_json(read_plain(self.path))
            self.runs = {str(uid): Mark(int(steps), str(state)) for uid, (steps, state) in found["runs"].items()}
            self.at, self.unchecked = float(found["at"]), int(found["unchecked"])
            self.whole = {str(uid): str(text) for uid, text in found["whole"].items()}
            self.left = str(found["left"])

    def write(self) -> None:
        """Keep it.

        Raises:
            OSError: the disk is full, or the folder is gone.
        """
        self.at, self.left = time.time(), database_state(self._uri)
        kept = {key: value for key, value in vars(self).items() if key not in ("path", "_uri")}
        write_atomic(self.path, json.dumps(kept))

    def begin_look(self) -> None:
        """Forget the runs whose turn it is to be compared in full: MLflow is looked at as a whole."""
        self.unchecked = max(0, (self.unchecked if self._is_as_left() else len(self.whole)) - CHECKED)
        for uid in [*self.whole][:CHECKED]:
            del self.whole[uid]

    def is_last_word(self) -> bool:
        """Whether nobody wrote to MLflow's database since all runs of the cursor were found whole there."""
        whole = all(uid in self.whole or mark.state == GONE for uid, mark in self.runs.items())
        return whole and not self.unchecked and self._is_as_left()

    def _is_as_left(self) -> bool:
        return self.left != "" and self.left == database_state(self._uri)


def database_state(uri: str) -> str:
    """Return what changes when anyone writes to a SQLite database, or erpe is another version; empty for a server."""
    path, found = sqlite_path(uri), [__version__]
    if path is None:
        return ""
    for end in ("", "-wal"):
        with contextlib.suppress(OSError):
            stat = path.with_name(path.name + end).stat()
            found.append(f"{stat.st_ino} {stat.st_size} {stat.st_ctime_ns}")
    return ", ".join(found)


def fingerprint(shown: RunImage | None) -> str:
    """Return what tells whether a server shows a run as it did before; another version of erpe does not trust it."""
    return hashlib.sha256(json.dumps([__version__, shown], sort_keys=True).encode()).hexdigest()[:16]
