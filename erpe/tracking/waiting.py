"""What MLflow does not show yet, as far as is known without asking it."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

from erpe.store import Store
from erpe.study.lookup import studies_of
from erpe.study.reading import read_studies
from erpe.study.records import StudyRecord
from erpe.tracking.cursor import Cursor
from erpe.tracking.history import milliseconds
from erpe.tracking.marks import INTERRUPTED, RUNNING, Mark, study_mark, trial_mark


class Waiting(NamedTuple):
    """What MLflow does not show yet of an experiment."""

    changes: Counter[str]
    """Run -> how many epochs, starts and ends."""
    since: float | None
    """When the oldest of them happened, in seconds since 1970, as far as is known without MLflow."""


def waiting(store: Store, study: str | None = None) -> dict[str, Waiting]:
    """Return what waits of each study that was run into this store; MLflow is not asked.

    Args:
        study: its name; default: all.
    """
    return {name: _waits(store, name, members) for name, members in own(store, study).items()}


def _waits(store: Store, name: str, members: list[StudyRecord]) -> Waiting:
    cursor, found, since = Cursor(store, name), Counter[str](), []
    for member in members:
        runs = [(trial.uid, trial_mark(member, trial), trial.started) for trial in member.trials]
        if runs:
            runs.append((member.about.uid, study_mark(member, members, running=False), member.ended or runs[0][2]))
        for uid, mark, at in runs:
            if lacking := _lacking(mark, cursor.runs.get(uid)):
                found[uid] = lacking
                since.append(max(milliseconds(at) / 1000, cursor.at))
    return Waiting(found, min(since, default=None))


def _lacking(want: Mark, there: Mark | None) -> int:
    if there is None:
        return want.steps + 1 + (want.state not in (RUNNING, INTERRUPTED))
    ended = {want.state, there.state} > {want.state} and {want.state, there.state} != {RUNNING, INTERRUPTED}
    return max(0, want.steps - there.steps) + ended


def lags(store: Store, study: str | None = None) -> dict[str, int]:
    """Return how many changes of each study MLflow does not show yet; see `waiting`."""
    return {name: found.changes.total() for name, found in waiting(store, study).items()}


def own(store: Store, study: str | None = None) -> dict[str, list[StudyRecord]]:
    """Return the studies, by name, whose trials lie in this store: several stores may share a database."""
    found = studies_of(read_studies(store))
    return {
        name: members
        for name, members in sorted(found.items())
        if study in (None, name) and any(is_here(store, member.name) for member in members)
    }


def is_here(store: Store, name: str) -> bool:
    """Whether trials of a part of a study lie in this store."""
    return (store.checkpoints / name).is_dir()
