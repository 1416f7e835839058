"""How far a server has a study, as far as it confirmed: what is not behind is not asked for."""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
import zlib

from erpe import __version__
from erpe.io import parse_json, read_plain, write_atomic
from erpe.store import Store
from erpe.tracking.image import RunImage
from erpe.tracking.marks import Mark

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
        self.looks = 0
        """How often the server was looked at as a whole."""
        self.runs: dict[str, Mark] = {}
        self.whole: dict[str, str] = {}
        """Fingerprints of the runs that were there as a whole when the server was looked at last."""
        with contextlib.suppress(OSError, ValueError, TypeError, AttributeError, KeyError):
            found = parse_json(read_plain(self.path))
            self.runs = {str(uid): Mark(int(steps), str(state)) for uid, (steps, state) in found["runs"].items()}
            self.at, self.looks = float(found["at"]), int(found["looks"])
            self.whole = {str(uid): str(text) for uid, text in found["whole"].items()}

    def write(self) -> None:
        """Keep it.

        Raises:
            OSError: the disk is full, or the folder is gone.
        """
        self.at = time.time()
        kept = {key: value for key, value in vars(self).items() if key != "path"}
        write_atomic(self.path, json.dumps(kept))

    def has_turn(self, uid: str) -> bool:
        """Whether this look compares a run in full that seems whole."""
        turns = -(-len(self.runs) // CHECKED)
        return zlib.crc32(uid.encode()) % turns == self.looks % turns


def fingerprint(shown: RunImage) -> str:
    """Return what tells whether a server shows a run as it did before; another version of erpe does not trust it."""
    return hashlib.sha256(json.dumps([__version__, shown], sort_keys=True).encode()).hexdigest()[:16]
