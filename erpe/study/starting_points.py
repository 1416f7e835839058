"""What a search begins with: points of the user's own, and what an earlier study found.

start = from_file("points.toml", spec)                # [[points]] tables of settings, run first, in this order
start = from_study(read_studies(store), "digits-relu", spec)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.exceptions import DuplicatedStudyError
from optuna.trial import FrozenTrial, TrialState, create_trial

from erpe.config import TrialConfig
from erpe.errors import ConfigError, ErpeError, StudyError, nearest
from erpe.study.distributions import Axis, Choices, Floats, default_point, inside
from erpe.study.entries import dotted, typed
from erpe.study.lookup import any_trial, parts_of
from erpe.study.naming import shown
from erpe.study.reading import read_about
from erpe.study.records import STUDY, StudyInfo, StudyRecord, TrialRecord
from erpe.study.search_space import read_toml
from erpe.study.spec import StudySpec, differences_from
from erpe.study.storage import Database, retry_while_unavailable

START = "erpe.start"
"""Attribute of a study: its starting points. Of a trial: which of them it is."""


class Start(NamedTuple):
    """What a new search begins with; a study that has begun keeps its own."""

    points: tuple[dict[str, Any], ...] = ()
    """Settings of the first trials; what is not in one is sampled."""
    known: tuple[tuple[dict[str, Any], list[float]], ...] = ()
    """Settings and objectives of trials that another study measured alike: the sampler learns from them."""
    notes: tuple[str, ...] = ()
    """What did not fit, a line each."""


NOTHING = Start()
"""Only the defaults."""


@retry_while_unavailable
def begin(database: Database, name: str, spec: StudySpec, about: StudyInfo, start: Start, afresh: str) -> optuna.Study:
    """Return the study of a name; one that is new gets what it is and its starting points.

    Args:
        afresh: the option that makes another study.
    Raises:
        StudyError: it is of another specification.
    """
    try:
        study = optuna.create_study(study_name=name, storage=database.backend, directions=spec.goals.directions)
    except DuplicatedStudyError:
        study = optuna.load_study(study_name=name, storage=database.backend)
    if STUDY not in study.user_attrs and not study.get_trials(deepcopy=False):
        if start.points:
            study.set_user_attr(START, {"points": start.points, "known": start.known})
        study.set_user_attr(STUDY, about._asdict())
    known = read_about(name, study.user_attrs)
    if changed := differences_from(known.spec, spec):
        fits = afresh == "--new" and all(each.startswith("space.") for each in changed)
        raise StudyError(
            f"study {shown(name)} has other settings ({'; '.join(changed)}); {afresh} starts afresh beside it"
            + (f", --new --warm-start {shown(name)} with what fits of it" if fits else "")
        )
    if known.settings != about.settings:  # of another budget, or of another Optuna
        study.set_user_attr(STUDY, known._replace(settings=about.settings)._asdict())
    return study


def queue(study: optuna.Study, trials: list[FrozenTrial], spec: StudySpec) -> None:
    """Queue the starting points, then the defaults, each once, whatever was cut short left of them in `trials`."""
    start = study.user_attrs.get(START, {})
    queued = (TrialState.WAITING, TrialState.COMPLETE)
    there = {trial.user_attrs.get(START) for trial in trials if trial.state in queued}
    for number, (params, value) in enumerate(start.get("known", [])):
        if f"known {number}" not in there:
            study.add_trial(_known_trial(number, params, value, spec))
    for number, point in enumerate([*start.get("points", []), default_point(spec.space, spec.base)]):
        if number not in there:
            study.enqueue_trial(point, user_attrs={START: number})


def from_file(path: str | Path, spec: StudySpec) -> Start:
    """Return the points of a TOML file.

    Raises:
        ConfigError: one line naming the file, the point, and what is wrong with it.
    """
    table = read_toml(path)
    entries = table.get("points")
    if set(table) != {"points"} or not isinstance(entries, list) or not all(isinstance(each, dict) for each in entries):
        raise ConfigError(f"{path}: use [[points]] tables of settings, and nothing else")
    return Start(tuple(_point(f"{path}: points[{number}]", each, spec) for number, each in enumerate(entries)))


def _point(where: str, entries: dict[str, Any], spec: StudySpec) -> dict[str, Any]:
    axes = {name: axis for name, axis in spec.space.axes.items() if len(axis.probes()) > 1}
    point = {}
    try:
        for name, value in dotted(entries).items():
            if name not in axes:
                raise ConfigError(f"{name} is not searched; {nearest(name, axes)}")
            point[name] = typed(name, value)
            if not inside(axes[name], point[name]):
                raise ConfigError(f"{name}: {value!r} given; use {_words(axes[name])} instead")
    except ErpeError as error:
        raise ConfigError(f"{where}: {error}") from None
    if idle := set(point) - set(spec.space.active(spec.base.flat() | point)):
        raise ConfigError(f"{where}: {min(idle)} has no effect with the other settings; leave it out")
    return point


def _words(axis: Axis) -> str:
    return f"one of {list(axis.values)}" if isinstance(axis, Choices) else f"{axis.low:g} to {axis.high:g}"


def from_run(records: list[StudyRecord], run: str) -> tuple[TrialConfig, dict[str, Any], dict[str, str]]:
    """Return the configuration of a recorded run, those of its settings that are not the defaults, and what it was made
    with. One that was trained on all images gets a validation part, as every run of a search.

    Args:
        run: see `erpe.study.lookup.find_trial`.
    Raises:
        StudyError: there is no such run.
        ConfigError: it is of a plug-in that is not loaded.
    """
    part, trial = any_trial(records, run)
    unset = {"seed"} | ({"data.validation"} if trial.config.data.validation == 0 else set())
    settings = {name: value for name, value in trial.config.overrides.items() if name not in unset}
    return trial.config, settings, part.made_with


def from_study(records: list[StudyRecord], name: str, spec: StudySpec) -> Start:
    """Return the best configuration of an earlier study, and its other trials where they were measured alike.

    Args:
        name: STUDY or STUDY/ARM, of any search space; of several arms, those of this variant if there are any.
    Raises:
        StudyError: there is none of this name, or none of its trials is complete.
    """
    parts = [part for part in parts_of(records, name) if part.phase == "search"]
    alike = [part for part in parts if part.about.spec["base"]["model"]["variant"] == spec.variant]
    found = [part for part in alike or parts if part.best]
    if not found:
        raise StudyError(f"warm start from {name}: no complete trial; `erpe status {name}` shows why")
    part = max(found, key=lambda part: part.best.value if part.best and part.best.value is not None else 0)
    assert part.best
    point, lacks = _fit(part.best, spec)
    notes = [f"warm start from {part.shown}: its best trial, {part.best.number}, comes first"]
    notes += [f"{setting} is sampled: {value!r} of that trial is not in this space" for setting, value in lacks.items()]
    known = []
    if all(each.startswith("space.") for each in differences_from(part.about.spec, spec)):
        fits = [(spec.goals.values(trial), *_fit(trial, spec)) for trial in spec.goals.eligible(part.trials)]
        known = [(point, list(values.values())) for values, point, lacks in fits if not lacks]
        notes.append(f"{len(known)} of its {len(fits)} complete trials fit this space; the sampler learns from them")
    return Start((point,), tuple(known), ("; ".join(notes),))


def _fit(trial: TrialRecord, spec: StudySpec) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the settings of a trial that lie in the space, and those that do not."""
    flat = trial.config.flat()
    active = [name for name in spec.space.active(spec.base.flat() | flat) if len(spec.space.axes[name].probes()) > 1]
    fits = {name: flat[name] for name in active if name in flat and inside(spec.space.axes[name], flat[name])}
    return fits, {name: flat.get(name) for name in active if name not in fits}


def _known_trial(number: int, params: dict[str, Any], values: list[float], spec: StudySpec) -> FrozenTrial:
    """Return a trial of another study as Optuna keeps it; without a configuration of ours it counts nowhere."""
    ranges, mark = {name: _distribution(spec.space.axes[name]) for name in params}, {START: f"known {number}"}
    return create_trial(state=TrialState.COMPLETE, params=params, distributions=ranges, values=values, user_attrs=mark)


def _distribution(axis: Axis) -> BaseDistribution:
    if isinstance(axis, Choices):
        return CategoricalDistribution(axis.values)
    if isinstance(axis, Floats):
        return FloatDistribution(axis.low, axis.high, log=axis.log)
    return IntDistribution(axis.low, axis.high, step=axis.step)
