"""A study from one Optuna database to another: with the numbers, states and times of its trials."""

from __future__ import annotations

import contextlib
from typing import Any

import optuna
from optuna.trial import FrozenTrial

from erpe.study.records import CONFIG, END, EPOCH, FINAL, REMOVED, STUDY
from erpe.study.storage import Database, retry_while_unavailable


def continues(new: optuna.Study, old: optuna.Study) -> bool:
    """Whether `new` has all that `old` has of their common beginning, so that it may take its place."""
    known, later = old.get_trials(deepcopy=False), new.get_trials(deepcopy=False)
    finals = {key: value for key, value in old.user_attrs.items() if key.startswith(FINAL)}
    return (
        len(known) <= len(later)
        and finals.items() <= new.user_attrs.items()
        and all(_goes_on(after, before) for after, before in zip(later, known, strict=False))
    )


def _goes_on(new: FrozenTrial, old: FrozenTrial) -> bool:
    if old.state.is_finished():
        return facts(new) == facts(old)
    fixed = {key: old.user_attrs[key] for key in (CONFIG, END) if key in old.user_attrs}
    return (
        old.datetime_start in (None, new.datetime_start)
        and old.params.items() <= new.params.items()
        and old.intermediate_values.items() <= new.intermediate_values.items()
        and fixed.items() <= new.user_attrs.items()
    )


def facts(trial: FrozenTrial) -> tuple[Any, ...]:
    """All there is to a trial, but for where a database keeps it."""
    return (
        trial.number, trial.state, trial.values, trial.params, trial.distributions, trial.user_attrs,
        trial.system_attrs, trial.intermediate_values, trial.datetime_start, trial.datetime_complete,
    )  # fmt: skip


@retry_while_unavailable
def copy(source: Database, target: Database, name: str, removed: set[int]) -> None:
    """Put a study in the place of the one of its name. Killed in between, the same call finishes it.

    Args:
        removed: numbers of the trials that were given up, here or there; they do not return.
    Raises:
        StoreError: the database does not let us.
    """
    found, drivers = optuna.load_study(study_name=name, storage=source.backend), 0
    with contextlib.suppress(KeyError):  # there is none
        drivers = target.study_attrs(name).get(EPOCH, 0) + 1  # a driver that runs it is one no more
        optuna.delete_study(study_name=name, storage=target.backend)
    study = optuna.create_study(study_name=name, storage=target.backend, directions=found.directions)
    attrs = found.user_attrs
    own = {EPOCH: max(drivers, attrs.get(EPOCH, 0))} | ({REMOVED: sorted(removed)} if removed else {})
    for key, value in ({STUDY: attrs[STUDY]} | attrs | own).items():  # without the first it would be no study of ours
        study.set_user_attr(key, value)
    study.add_trials(found.get_trials(deepcopy=False))
