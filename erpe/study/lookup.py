"""Which study a command means, and what a new one is called.

newest(database, "a")               # "a", or the one that `--new` made beside it last: "a-3"
beside(database, "a")               # what `--new` makes next: "a-4"
numbered(store, "train-a", spec)    # "train-a", or "train-a-2": the study of this specification, made or not
identified(store, "a.relu.confirm", spec)  # the same by six digits: "a.relu.confirm-4b0c5b"
parts_of(records, "digits-nine/favor")   # an arm's search and its seeds
find_trial(records, "digits-nine/favor/seed-1")
"""

from __future__ import annotations

import contextlib
import itertools
import math
import re
from difflib import get_close_matches
from typing import Any

from erpe.errors import StudyError, nearest
from erpe.store import Store
from erpe.study import storage
from erpe.study.naming import SEED
from erpe.study.records import STUDY, StudyRecord, TrialRecord, arm_of
from erpe.study.spec import StudySpec, differences_from

MOST_SHOWN = 100
"""Characters of a name that an error repeats; erpe makes no longer ones."""


def newest(database: storage.Database, wanted: str) -> str:
    """Return the study of a name, or the newest that `--new` made beside it; the name itself if there is none."""
    found = _numbered(database, wanted)
    return found[max(found)] if found else wanted


def beside(database: storage.Database, wanted: str) -> str:
    """Return a name that is free: the wanted one, or else NAME-2, NAME-3, ... above those that `--new` made before."""
    found, names = _numbered(database, wanted), set(database.names())
    if not found:
        return wanted
    numbers = itertools.count(max(found) + 1)
    return next(name for name in (f"{wanted}-{number}" for number in numbers) if name not in names)


def _numbered(database: storage.Database, wanted: str) -> dict[int, str]:
    """Return number -> study, the one of the wanted name is number 1; without one that was named NAME-2 by hand."""
    found = {}
    for name in database.names():
        numbered = re.fullmatch(re.escape(wanted) + r"-([2-9]|[1-9][0-9]+)", name)
        if name == wanted:
            found[1] = name
        elif numbered and _about(database, name).get("asked") in (wanted, None):  # None: of 0.1.0
            found[int(numbered[1])] = name
    return found


@storage.retry_while_unavailable
def identified(store: Store, stem: str, spec: StudySpec) -> str:
    """Return the name of a study that is called by its identity: STEM and six digits of it.

    A study is known by what its stored specification means, not by its digits: another version may have given it
    others.
    """
    known = _specified(store, re.escape(stem) + "-[0-9a-f]{6}")
    same = (name for name, stored in known.items() if not differences_from(stored, spec))
    return next(same, f"{stem}-{spec.identity[:6]}")


@storage.retry_while_unavailable
def numbered(store: Store, stem: str, spec: StudySpec, new: bool = False) -> str:
    """Return the newest study called STEM, STEM-2, STEM-3, ... that has this specification, or a name for one.

    Args:
        new: a name for another one.
    """
    known = _specified(store, re.escape(stem) + "(-[1-9][0-9]{0,4})?")  # six digits: of a confirmation
    numbers = {int(name.removeprefix(stem).removeprefix("-") or 1): name for name in known}
    same = [number for number, name in numbers.items() if not differences_from(known[name], spec)]
    if same and not new:
        return numbers[max(same)]
    return f"{stem}-{max(numbers) + 1}" if numbers else stem


def _specified(store: Store, pattern: str) -> dict[str, dict[str, Any]]:
    """Return the stored specifications of the studies whose names match."""
    if not storage.exists(storage.parse(store.storage_url)):
        return {}
    with contextlib.closing(storage.Database(store.storage_url)) as database:
        about = {name: _about(database, name) for name in database.names() if re.fullmatch(pattern, name)}
    return {name: found["spec"] for name, found in about.items() if "spec" in found}


def _about(database: storage.Database, name: str) -> dict[str, Any]:
    found = database.study_attrs(name).get(STUDY)
    return found if isinstance(found, dict) else {}


def studies_of(records: list[StudyRecord]) -> dict[str, list[StudyRecord]]:
    """Map each study to its parts: one of `erpe tune`; the searches and seeds of all arms of `erpe study run`."""
    found: dict[str, list[StudyRecord]] = {}
    for record in records:
        found.setdefault(record.experiment, []).append(record)
    return found


def parts_of(records: list[StudyRecord], given: str) -> list[StudyRecord]:
    """Return the parts of STUDY, or those of STUDY/ARM.

    Raises:
        StudyError: there is no such study, or no such arm.
    """
    study, _, arm = given.partition("/")
    known = studies_of(records)
    if study not in known:
        models = (f"{name}/{each}" for name, parts in known.items() for each in _arms(parts))  # called STUDY.ARM
        close = get_close_matches(study, [*known, *models], n=1, cutoff=0.8)
        hint = nearest(study, close or known) if known else "the store is empty"
        short = study if len(study) <= MOST_SHOWN else f"{study[:MOST_SHOWN]}..."
        raise StudyError(f"study {short}: not in this store; {hint}")
    if not arm:
        return known[study]
    if own := [part for part in known[study] if part.arm == arm]:
        return own
    arms = _arms(known[study])
    raise StudyError(f"study {study}: no arm {arm!r}; {nearest(arm, arms) if arms else 'it has trials only'}")


def _arms(parts: list[StudyRecord]) -> list[str]:
    return list(dict.fromkeys(part.arm for part in parts if part.arm))


def find_trial(
    records: list[StudyRecord], given: str, states: tuple[str, ...] = ("COMPLETE",)
) -> tuple[StudyRecord, TrialRecord | None]:
    """Return a trial, or the best one, and the part it is in; None: it is not there, or in no such state.

    Args:
        given: STUDY (its best trial, or the best arm), STUDY/NUMBER, STUDY/ARM (its first seed, or else the best trial
            of its search), STUDY/ARM/NUMBER or STUDY/ARM/seed-NUMBER.
    Raises:
        StudyError: there is no such study, or no such arm.
    """
    place, _, last = given.rpartition("/")
    number = re.fullmatch(rf"({SEED})?(\d{{1,9}})", last) if place else None
    parts = parts_of(records, place if number else given)
    if not parts[0].arm:
        return parts[0], _numbered_in(parts[0], int(number[2]), states) if number else parts[0].best
    best = max(_arms(parts), key=lambda arm: _value(arm_of(parts, arm)[0]))  # of equals the first; no test score
    search, seeds = arm_of(parts, best)
    if number:
        part = seeds if number[1] else search
        if "/" not in place or part is None:
            return parts[0], None
        return part, _numbered_in(part, int(number[2]), states)
    first = next((trial for trial in seeds.trials if trial.state == "COMPLETE"), None) if seeds else None
    return (seeds, first) if seeds and first else (search or parts[0], search.best if search else None)


def any_trial(records: list[StudyRecord], given: str) -> tuple[StudyRecord, TrialRecord]:
    """Return a trial in whatever state, and the part it is in; see `find_trial`.

    Raises:
        StudyError: there is none.
    """
    part, trial = find_trial(records, given, states=("COMPLETE", "PRUNED", "FAIL", "RUNNING"))
    if trial is None:
        raise StudyError(f"{given}: no such trial; `erpe status {part.experiment}` lists them")
    return part, trial


def _value(search: StudyRecord | None) -> float:
    return search.best.value if search and search.best and search.best.value is not None else -math.inf


def _numbered_in(part: StudyRecord, number: int, states: tuple[str, ...]) -> TrialRecord | None:
    return next((trial for trial in part.trials if trial.number == number and trial.state in states), None)
