"""Two trials, runs or studies side by side: the settings, versions and measures in which they differ.

for row in differ(store, "digits-relu/3", "digits-relu/5"):
    row.part, row.name, row.first, row.second
"""

from __future__ import annotations

import statistics
from collections import Counter
from typing import Any, NamedTuple

from erpe.errors import StudyError
from erpe.settings import flatten
from erpe.store import Store
from erpe.study.lookup import any_trial, parts_of
from erpe.study.reading import read_studies
from erpe.study.records import StudyRecord, TrialRecord, arm_of


class Difference(NamedTuple):
    """What two sides say of one thing; None: that side has no such thing."""

    part: str
    """settings, versions or measures."""
    name: str
    first: Any
    second: Any


def differ(store: Store, first: str, second: str) -> list[Difference]:
    """Return what differs.

    Args:
        first, second: two trials or runs, as STUDY/3 or STUDY/ARM/seed-0; or two studies.
    Raises:
        StudyError: one is not there; or one is a study and the other a trial.
    """
    records = read_studies(store)
    sides = [_facts(records, given) for given in (first, second)]
    kinds = [kind for kind, _ in sides]
    if kinds[0] != kinds[1]:
        raise StudyError(f"{first} is a {kinds[0]}, {second} a {kinds[1]}; use two trials, as STUDY/3, or two studies")
    rows = []
    for part in sides[0][1]:
        a, b = (facts[part] for _, facts in sides)
        names = [name for name in dict.fromkeys([*a, *b]) if a.get(name) != b.get(name)]
        rows += [Difference(part, name, a.get(name), b.get(name)) for name in names]
    return rows


def _facts(records: list[StudyRecord], given: str) -> tuple[str, dict[str, dict[str, Any]]]:
    """Whether it is a study or a trial, and its settings, versions and measures."""
    if "/" in given:
        part, trial = any_trial(records, given)
        measures = _measures(part, trial)
        return "trial", {"settings": trial.config.flat(), "versions": dict(part.made_with), "measures": measures}
    parts = parts_of(records, given)
    if plan := (parts[0].part_of.plan if parts[0].part_of else None):
        settings, measures = flatten(plan), _arms(parts)
    else:
        settings, best = flatten(parts[0].about.spec), parts[0].best
        measures = {f"best: {name}": value for name, value in (_measures(parts[0], best) if best else {}).items()}
    settings = {name.removeprefix("base.").replace("space.axes.", "space."): each for name, each in settings.items()}
    counts = sum((Counter(_counted(part)) for part in parts), Counter())
    return "study", {"settings": settings, "versions": dict(parts[0].made_with), "measures": counts | measures}


def _counted(part: StudyRecord) -> dict[str, int]:
    """Trials of a search by state, or seeds of a confirmation."""
    what = "seeds" if part.phase == "confirm" else "trials"
    return {f"{what} {state.lower()}": count for state, count in part.counts.items()}


def _measures(part: StudyRecord, trial: TrialRecord) -> dict[str, Any]:
    """Measures of a trial; its last epoch's has the name of what it is, which another phase may not have."""
    sign, key = part.goals.reported(part.phase)
    shown: dict[str, Any] = {"state": trial.state.lower(), "epochs": len(trial.epochs)}
    shown |= {} if trial.value is None else {key: sign * trial.value}
    return shown | (trial.verdict.metrics if trial.verdict else {}) | part.finals.get(trial.number, {})


def _arms(parts: list[StudyRecord]) -> dict[str, float]:
    """Mean test accuracy of each arm over its seeds."""
    found = {}
    for arm in dict.fromkeys(part.arm for part in parts):
        _, seeds = arm_of(parts, arm)
        tested = [t.verdict.metrics.get("test/accuracy") for t in (seeds.trials if seeds else []) if t.verdict]
        if known := [accuracy for accuracy in tested if accuracy is not None]:
            found[f"{arm}: test/accuracy, mean of {len(known)}"] = statistics.mean(known)
    return found
