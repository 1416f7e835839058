"""The tracker's outbox, rebuilt from the Optuna database and the trials' folders: only what it does not have.

    reconcile(Store.open("runs"))             # every study that no process is running
    rebuild(study, tracker, store)            # by the driver of a study, at its start and end

The database knows every trial, its configuration, the value of each epoch, how it ended and what was measured later;
a folder knows the other measures of the epochs. What only the outbox knew is gone with it: versions, commit and machine
of `erpe tune`. The studies' own time stands in for the time of the events.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from erpe.errors import ConfigError, StoreError, StudyError
from erpe.store import STATE, Store
from erpe.study import storage
from erpe.study.lock import acquire
from erpe.study.lookup import studies_of
from erpe.study.records import StudyRecord, TrialRecord, arm_of, read_studies
from erpe.study.spec import StudySpec
from erpe.tracking.study_logger import end_study, end_trial, folder_of, start_trial, study_tags
from erpe.tracking.tracker import Tracker
from erpe.training.outcome import read_outcome


class Rebuilt(NamedTuple):
    """What was done for a study of `erpe study run` or `erpe tune`."""

    study: str
    events: int = 0
    """Told again."""
    running: bool = False
    """Left alone, since an erpe is running it, which tells what is missing itself."""
    damage: str = ""
    """What was wrong with the outbox; that line is now beside it."""
    broken: StoreError | None = None
    """Why nothing could be done."""


Tale = tuple[int, Callable[[], None]]
"""When something happened, in milliseconds since 1970, and how to tell it."""


def reconcile(store: Store, study: str | None = None) -> list[Rebuilt]:
    """Tell the outboxes of a store what only the database knows. Nothing is sent; a study in order costs a look.

    Args:
        study: its name; default: all.
    Raises:
        StoreError: the database cannot be read.
    """
    return [
        _attempt(store, name, members)
        for name, members in studies_of(read_studies(store)).items()
        if study in (None, name)
    ]


def _attempt(store: Store, experiment: str, members: list[StudyRecord]) -> Rebuilt:
    try:
        return _reconcile(store, experiment, members)
    except StoreError as error:
        return Rebuilt(experiment, broken=error)


def _reconcile(store: Store, experiment: str, members: list[StudyRecord]) -> Rebuilt:
    tracker, damage = _open(store, experiment)
    if not any(_missing(member, members, tracker, store) for member in members):
        return Rebuilt(experiment, damage=damage)
    with contextlib.ExitStack() as leases:
        url = storage.parse(store.storage_url)
        try:
            for member in members:
                leases.callback(acquire(url, member.name).release)
        except StudyError:
            return Rebuilt(experiment, running=True, damage=damage)
        members = [now for now in read_studies(store) if now.experiment == experiment]  # no process changes them now
        tales = [tale for member in members for tale in _missing(member, members, tracker, store)]
        return Rebuilt(experiment, _tell(tales, tracker), damage=damage)


def _open(store: Store, experiment: str) -> tuple[Tracker, str]:
    """Return the outbox, and what was wrong with it: once that has been moved away, it opens."""
    try:
        return Tracker(store, experiment, send=False), ""
    except StoreError as damaged:
        return Tracker(store, experiment, send=False), str(damaged)


def _missing(member: StudyRecord, members: list[StudyRecord], tracker: Tracker, store: Store) -> list[Tale]:
    """Return what a study lacks that no process runs, its end included."""
    tales = [*_trials(member, tracker, store, member.trials)]
    known = tracker.known(member.about.uid)
    if member.trials and (known.state in ("", "RUNNING") or tales):
        last = max(_ms(time) for trial in member.trials for time in (trial.started, trial.ended))
        tales.append((last + 1, partial(end_study, tracker, store, member, _is_over(member, members))))
    return tales


def rebuild(member: StudyRecord, tracker: Tracker, store: Store) -> int:
    """Tell what the outbox lacks of the trials that have ended. The driver tells of the others, and of the study's end.

    Returns:
        How many events.
    """
    return _tell([*_trials(member, tracker, store, [t for t in member.trials if t.state != "RUNNING"])], tracker)


def _tell(tales: list[Tale], tracker: Tracker) -> int:
    before = tracker.seq
    for at, tale in tales:
        with tracker.rebuilding(at):
            tale()
    return tracker.seq - before


def _trials(member: StudyRecord, tracker: Tracker, store: Store, trials: list[TrialRecord]) -> Iterator[Tale]:
    """Yield what the outbox lacks of some trials of a study, and of its start, without which they have no parent."""
    trials = [trial for trial in trials if not trial.removed]
    lacking = [trial for trial in trials if _lacks(member, trial, tracker)]
    started = tracker.known(member.about.uid).started
    if not trials or (started and not lacking):
        return
    spec, part_of = _spec(member), member.part_of
    tags = _made_with(member) | study_tags(spec, member.name, part_of)
    if not started:
        name = member.name if part_of else ""
        tell = partial(tracker.start_study, member.about.uid, member.about.spec, tags, name)
        yield min(_ms(trial.started) for trial in trials), tell
    for trial in lacking:
        yield from _trial(member, trial, tracker, store, spec, tags)


def _lacks(member: StudyRecord, trial: TrialRecord, tracker: Tracker) -> bool:
    known = tracker.known(trial.uid)
    if not known.started or not trial.epochs.keys() <= known.steps:
        return True
    if not trial.verdict:
        return False
    return known.state != trial.verdict.state or bool(known.news(trial.verdict.metrics | _later(member, trial)))


def _trial(
    member: StudyRecord, trial: TrialRecord, tracker: Tracker, store: Store, spec: StudySpec, tags: dict[str, str]
) -> Iterator[Tale]:
    """Yield a trial's start, the epochs and the end that the outbox lacks, each at its time or what is known of it."""
    known, began = tracker.known(trial.uid), _ms(trial.started)
    if not known.started:
        arm = member.part_of.arm if member.part_of else ""
        yield began, partial(start_trial, tracker, member.about.uid, trial, tags, arm, spec.phase)
    lost = sorted(trial.epochs.keys() - known.steps)
    measured = _measured(trial, folder_of(store, member.name, trial), spec) if lost else {}
    ended, last = max(_ms(trial.ended), began), max(trial.epochs, default=0)
    for epoch in lost:
        at = began + max(epoch, (ended - began) * epoch // (last + 1))
        yield at, partial(tracker.epoch, trial.uid, epoch, measured.get(epoch) or spec.measured(trial.epochs[epoch]))
    if trial.verdict:
        ended = max(ended, began + last + 1)
        yield ended, partial(end_trial, tracker, store, member.name, trial)
        if later := _later(member, trial):
            yield ended + 1, partial(end_trial, tracker, store, member.name, trial, later)


def _later(member: StudyRecord, trial: TrialRecord) -> dict[str, float]:
    """Return the times of a confirmed run, which are measured after its end.

    The test of a search's best trial is told with its study.
    """
    return member.finals.get(trial.number, {}) if member.phase == "confirm" else {}


def _measured(trial: TrialRecord, folder: Path, spec: StudySpec) -> dict[int, dict[str, float]]:
    """All measures of a trial's epochs, as far as its folder has them and agrees with the database."""
    found = read_outcome(trial.config, folder) or _checkpoint(trial, folder)
    measured = {}
    for epoch in found["history"] if found else ():
        with contextlib.suppress(KeyError, TypeError, ValueError):
            own = {str(name): float(value) for name, value in epoch.items()}
            if spec.value(own) == trial.epochs.get(int(own["epoch"])):
                measured[int(own["epoch"])] = own
    return measured


def _checkpoint(trial: TrialRecord, folder: Path) -> dict[str, Any] | None:
    """Return what the checkpoint of a trial that did not end, or was pruned, says of it; its tensors are not read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(folder / STATE, framework="np") as file:
            facts = json.loads(file.metadata()["erpe"])
        own = facts["config"] == trial.config.model_dump_json() and isinstance(facts["history"], list)
        return facts if own else None
    except (OSError, SafetensorError, ValueError, KeyError, TypeError):
        return None


def _is_over(member: StudyRecord, members: list[StudyRecord]) -> bool:
    """Whether a study did all that was last requested. A search of `tune` ends with a test."""
    if member.counts["RUNNING"]:
        return False
    if member.part_of is None:
        return member.best is None or member.best.number in member.finals
    plan = member.part_of.plan
    if member.phase == "confirm":
        return len(member.trials) >= int(plan["confirm"]["seeds"])
    if plan["search"]["budget"] == "trials":
        return len(member.trials) >= int(plan["search"]["trials"])
    return arm_of(members, member.part_of.arm)[1] is not None


def _made_with(member: StudyRecord) -> dict[str, str]:
    """Where a study was made, as far as the database knows."""
    made = member.part_of.made_with if member.part_of else {}
    command = "study run" if member.part_of else "train" if member.name.startswith("train-") else "tune"
    commit = {"mlflow.source.git.commit": made["git_sha"]} if made.get("git_sha", "unknown") != "unknown" else {}
    return made | commit | {"mlflow.source.name": f"erpe {command}", "mlflow.source.type": "LOCAL"}


def _spec(member: StudyRecord) -> StudySpec:
    try:
        return StudySpec(**member.about.spec)
    except (ConfigError, TypeError) as error:
        raise StoreError(f"study {member.shown}: {error}; another version of erpe wrote it") from None


def _ms(time: datetime | None) -> int:
    return int(time.timestamp() * 1000) if time else 0
