"""What a driver saw of a trial, kept in the trial's folder: `history.jsonl`, a line for each start and each epoch.

    {"at": 1764400000000, "tags": {"version.erpe": "0.2.0", ...}}    a driver began it, or goes on with it
    {"at": 1764400001000, "epoch": 1.0, "val/accuracy": 0.8, ...}    the first line on an epoch counts

It adds to Optuna's database, which knows the value of each epoch, when it was (milliseconds since 1970) and the other
measures. A line that was cut off is passed over; what is missing comes from the results or the checkpoint beside it.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import time
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from erpe.errors import StoreError
from erpe.io import open_plain, parse_json, read_plain
from erpe.store import FILES, HISTORY, STATE
from erpe.study.records import TrialRecord
from erpe.study.spec import StudySpec
from erpe.training.outcome import is_measures, read_outcome


class Point(NamedTuple):
    """A measure at a step: when, in milliseconds since 1970, and its value."""

    at: int
    value: float


Points = dict[str, dict[int, Point]]
"""Measure -> step -> its last point."""


class History(NamedTuple):
    """What is known of a trial beside what the database has."""

    tags: dict[str, str]
    """Of the driver that had it last; empty: not known."""
    points: Points
    """Of its epochs."""


class Journal:
    """The file of a trial that runs, for its driver alone.

    Raises:
        StoreError: it cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        """Read what earlier drivers wrote."""
        self.path = folder / HISTORY
        lines = _lines(folder)
        self._at = max((line["at"] for line in lines), default=0)
        self._tags = next((line["tags"] for line in reversed(lines) if "tags" in line), None)
        self._epochs = {int(line["epoch"]) for line in lines if "epoch" in line}

    def start(self, tags: dict[str, str]) -> None:
        """Note whose driver has the trial, unless it is known."""
        if tags != self._tags:
            self._append({"tags": tags})
            self._tags = dict(tags)

    def epoch(self, measures: dict[str, float]) -> None:
        """Note an epoch, unless it is known."""
        if int(measures["epoch"]) not in self._epochs:
            self._append(measures)
            self._epochs.add(int(measures["epoch"]))

    def _append(self, fact: dict[str, Any]) -> None:
        """Write a line whole or not at all; one that a kill cut off before it keeps a line of its own."""
        self._at = max(int(time.time() * 1000), self._at + 1)  # rises though the clock may step back
        line = json.dumps({"at": self._at} | fact).encode() + b"\n"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with os.fdopen(open_plain(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND), "a+b", buffering=0) as file:
                size = file.tell()
                line = line if not size or os.pread(file.fileno(), 1, size - 1) == b"\n" else b"\n" + line
                if file.write(line) < len(line):
                    file.truncate(size)
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise StoreError(f"{self.path}: cannot be written ({error.strerror or error}); nothing is lost") from None


def read_history(trial: TrialRecord, folder: Path, spec: StudySpec) -> History:
    """Return what a trial's folder tells of the epochs that the database has, as far as the two agree."""
    began, lines = milliseconds(trial.started), _lines(folder)
    tags: dict[str, str] = next((line["tags"] for line in reversed(lines) if "tags" in line), {})
    found: dict[int, dict[str, Any]] = {}
    for line in lines:
        if _agrees(line, trial, spec):
            found.setdefault(int(line["epoch"]), line)
    if lost := trial.epochs.keys() - found.keys():
        kept = {int(entry["epoch"]): entry for entry in _kept(trial, folder) if _agrees(entry, trial, spec)}
        ended, last = max(milliseconds(trial.ended), began), max(trial.epochs)
        for epoch in lost:
            at = began + max(epoch, (ended - began) * epoch // (last + 1))
            found[epoch] = (kept.get(epoch) or spec.measured(trial.epochs[epoch])) | {"at": at}
    points: Points = {}
    for epoch, line in sorted(found.items()):
        for key, value in line.items():
            if key not in ("at", "epoch"):  # as a measure, MLflow would draw the epoch first when runs are compared
                points.setdefault(key, {})[epoch] = Point(line["at"], value)
    return History(tags, points)


def milliseconds(time: datetime | None) -> int:
    """Return a time of Optuna's database in milliseconds since 1970; 0: not known."""
    return int(time.timestamp() * 1000) if time else 0


def is_line(found: Any) -> bool:
    """Whether it is what a line says."""
    if not isinstance(found, dict) or not isinstance(found.get("at"), int) or not 0 <= found["at"] < 1 << 53:
        return False
    tags = found.get("tags")
    if isinstance(tags, dict):
        return all(isinstance(text, str) for item in tags.items() for text in item)
    return is_measures(found) and 0 < found.get("epoch", 0) < 1 << 31


def _lines(folder: Path) -> list[dict[str, Any]]:
    lines = []
    with contextlib.suppress(OSError):
        for line in read_plain(folder / HISTORY, FILES[HISTORY]).splitlines():
            with contextlib.suppress(ValueError):
                if is_line(fact := parse_json(line)):
                    lines.append(fact)
    return lines


def _agrees(measures: dict[str, Any], trial: TrialRecord, spec: StudySpec) -> bool:
    with contextlib.suppress(KeyError, TypeError, ValueError):
        return spec.value(measures) == trial.epochs.get(int(measures["epoch"]))
    return False


def _kept(trial: TrialRecord, folder: Path) -> list[dict[str, float]]:
    """Return the history in a trial's results, or in the checkpoint of one that has none; no tensor is read."""
    if found := read_outcome(trial.config, folder):
        return list(found["history"])
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(folder / STATE, framework="np") as file:
            facts = parse_json(file.metadata()["erpe"])
        own = facts["config"] == trial.config.model_dump_json() and all(map(is_measures, facts["history"]))
        return list(facts["history"]) if own else []
    except (OSError, SafetensorError, ValueError, KeyError, TypeError):
        return []
