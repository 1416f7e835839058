"""Studies as Optuna's database holds them, read without a lease: `erpe status`, tracking and the report look here.

for study in read_studies(store):
    study.name, study.counts, study.best
"""

from __future__ import annotations

from typing import Any

import optuna
from optuna.trial import FrozenTrial
from pydantic import TypeAdapter

from erpe.config import TrialConfig
from erpe.errors import ConfigError, ErpeError, StoreError, StudyError, nearest
from erpe.store import Store
from erpe.study import records, storage
from erpe.study.naming import shown
from erpe.study.records import CONFIG, FINAL, STUDY, ExperimentRef, StudyInfo, StudyRecord, TrialOutcome, TrialRecord

_RECORD = TypeAdapter(StudyRecord)


def read_about(name: str, attrs: dict[str, Any]) -> StudyInfo:
    """Return what a study is, from its attributes.

    Raises:
        StudyError: erpe did not make it.
    """
    try:
        return StudyInfo(**attrs[STUDY])
    except (KeyError, TypeError):
        raise StudyError(
            f"study {shown(name)}: in Optuna's database, but not made by erpe; --name gives another"
        ) from None


def read_trial(uid: str, trial: FrozenTrial) -> TrialRecord:
    """Return a trial that counts.

    Raises:
        StoreError: its configuration is of another version.
    """
    end = trial.user_attrs.get(records.END)
    return TrialRecord(
        number=trial.number,
        uid=f"{uid}-{trial.number}",
        state=trial.state.name,
        config=read_config(trial),
        epochs=dict(sorted(_values(trial).items())),  # PostgreSQL keeps no order
        verdict=TrialOutcome(**end) if end else None,
        started=trial.datetime_start,
        ended=trial.datetime_complete,
        costs=trial.user_attrs.get(records.COSTS, {}),
    )


def _values(trial: FrozenTrial) -> dict[int, float]:
    own = {key: value for key, value in trial.user_attrs.items() if key.startswith(f"{records.VALUE}.")}
    return trial.intermediate_values or {int(key.rpartition(".")[2]): value for key, value in own.items()}


def read_config(trial: FrozenTrial) -> TrialConfig:
    """Return the configuration a trial was given.

    Raises:
        StoreError: it is of another version.
    """
    try:
        return TrialConfig(**trial.user_attrs[CONFIG])
    except (ConfigError, TypeError) as error:
        raise StoreError(f"trial {trial.number}: {error}; another version of erpe wrote it") from None


def read_study(study: optuna.Study, ended: dict[int, TrialRecord] | None = None) -> StudyRecord:
    """Return a study as it stands in the database.

    Args:
        ended: number -> trial that had ended when it was read before, and so stays as it was; more are added.
    """
    ended = {} if ended is None else ended
    attrs = study.user_attrs
    about = read_about(study.study_name, attrs)
    trials = study.get_trials(deepcopy=False)
    counted = [trial for trial in trials if CONFIG in trial.user_attrs]
    gone = frozenset(attrs.get(records.REMOVED, ()))
    found = {trial.number: ended.get(trial.number) or read_trial(about.uid, trial) for trial in counted}
    ended.update((trial.number, found[trial.number]) for trial in counted if trial.state.is_finished())
    return StudyRecord(
        name=study.study_name,
        about=about,
        trials=[record._replace(removed=number in gone) for number, record in found.items()],
        finals={int(key.removeprefix(f"{FINAL}.")): found for key, found in attrs.items() if key.startswith(FINAL)},
        part_of=ExperimentRef(**attrs[records.GROUP]) if records.GROUP in attrs else None,
        refused=sum(records.REFUSED in trial.user_attrs for trial in trials),
        tags=attrs.get(records.TAGS, {}),
    )


@storage.retry_while_unavailable
def read_studies(store: Store, name: str | None = None) -> list[StudyRecord]:
    """Return the studies of a store, or the one of that name, without disturbing a process that runs them.

    Studies of other programs are left out; so are those whose making was killed, which the same command makes again.

    Raises:
        StudyError: there is none of that name.
        StoreError: the database cannot be read.
    """
    url = storage.parse(store.storage_url)
    database = storage.Database(store.storage_url) if storage.exists(url) else None
    names = database.names() if database else []
    if name is not None and name not in names:
        if database:
            database.close()
        raise StudyError(
            f"study {name}: not in {storage.show(url)}; " + (nearest(name, names) if names else "it is empty")
        )
    if database is None:
        return []
    try:
        chosen = [optuna.load_study(study_name=each, storage=database.backend) for each in ([name] if name else names)]
        own = [study for study in chosen if name or STUDY in study.user_attrs]
        return [_RECORD.validate_python(read_study(study)) for study in own]
    except ErpeError:
        raise
    except (ValueError, LookupError, TypeError, AttributeError, AssertionError, RecursionError) as error:
        said = storage.first_line(error)
        raise StoreError(f"database {storage.show(url)}: damaged, or not written by erpe ({said})") from error
    finally:
        database.close()


@storage.retry_while_unavailable
def mark_removed(database: storage.Database, name: str, numbers: set[int]) -> None:
    """Note in the database that trials are given up, besides those that are."""
    study = optuna.load_study(study_name=name, storage=database.backend)
    known = set(study.user_attrs.get(records.REMOVED, ()))
    if not numbers <= known:
        study.set_user_attr(records.REMOVED, sorted(known | numbers))
