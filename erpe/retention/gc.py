"""`gc`: give up what a policy names, in the database, on the disk and in MLflow together.

    gc(Store.open("runs"), Policy(keep_best=3), dry_run=True)

The study is leased; then, in this order,

1. the Optuna database: the trials are marked. Their rows stay, so that they count and samplers learn from them.
2. the folders of checkpoints and results.
3. MLflow, now or whenever it is brought up to date: of a removed trial it should show nothing.

Killed in between, the same call finds the marks and goes on from there: it finishes every trial that is marked.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

import optuna

from erpe.checkpoints import find_remote, name_of
from erpe.errors import BusyError, ConfigError, StudyError
from erpe.io import remove_folder, size_mib
from erpe.retention.orphans import Stray, sweep_strays
from erpe.retention.policy import Policy, decide
from erpe.store import Store
from erpe.study import storage
from erpe.study.backup import keeping
from erpe.study.lock import acquire
from erpe.study.lookup import parts_of, studies_of
from erpe.study.reading import mark_removed, read_studies, read_study
from erpe.study.records import StudyRecord, TrialRecord
from erpe.tracking.deletion import Logged, LoggedStudy, is_server
from erpe.tracking.tracker import Tracker
from erpe.tracking.waiting import is_here

SECONDS = 600.0
"""How long MLflow may take for the runs of a study; `erpe sync` does the rest."""


class Swept(NamedTuple):
    """What goes of a study, and what stays."""

    study: str
    arm: str
    """Of it; empty for a study of `erpe tune`."""
    phase: str
    """`search` or `confirm`."""
    going: list[int]
    """Numbers of trials."""
    checkpoints_mib: float
    artifacts_mib: float
    staying: dict[str, list[int]]
    """Why (see `erpe.retention.policy`) -> numbers."""
    removed: list[int]
    """Numbers of trials that went before."""


class Sweep(NamedTuple):
    """What `gc` removed, or would remove."""

    studies: list[Swept]
    running: list[str]
    """Studies that were left alone, since someone runs them."""
    strays: list[Stray]
    lag: int
    """Changes that MLflow does not show yet; the store has them."""
    problem: str | None
    """Why MLflow does not get them, where waiting does not help."""
    on_server: bool
    """Whether MLflow is a server, whose own `mlflow gc` frees the rows of deleted runs."""


def gc(
    store: Store, policy: Policy, *, study: str | None = None, dangling: bool = False, dry_run: bool = False
) -> Sweep:
    """Remove what the policy names, and finish what a killed call has begun.

    Args:
        study: STUDY, or STUDY/ARM; default: all that were run from this store, but for those that run now.
        dangling: also remove what belongs to no trial and no run, see `erpe.retention.orphans`; in the store alone,
            since a remote may be that of other stores, too.
        dry_run: change nothing, and say what would go.
    Raises:
        ConfigError: no condition was given, or a number makes no sense.
        BusyError: someone runs the study.
        StudyError: there is none of that name, or it was run from another store.
        StoreError: the database cannot be used; or a folder cannot be removed.
        TrackingError: MLflow does not say which models are registered.
    """
    policy.check()
    if not policy.asks and not dangling:
        raise ConfigError(
            "gc: no condition given; use --keep-best K, --older-than DAYS, --failed (together they spare more) "
            "or --dangling; --dry-run shows what would be removed"
        )
    experiments = _choose(store, study)
    logged = Logged(store)
    swept: list[Swept] = []
    running: list[str] = []
    lag, problem = 0, None
    for experiment, names in experiments.items():
        try:
            with contextlib.nullcontext() if dry_run else keeping(store), _leased(store, names) as database:
                known = logged.study(experiment)
                records = [_read(database, name) for name in names]
                plans = [_plan(store, record, policy, known) for record in records]  # all, before anything is written
                swept += plans
                if dry_run:
                    continue
                for record, plan in zip(records, plans, strict=True):
                    _remove(store, database, record, plan.going)
                if known.exists:
                    tracker = Tracker(store, experiment)
                    lag += tracker.close(SECONDS)
                    problem = problem or tracker.problem
        except BusyError:
            if study is not None:
                raise
            running.append(experiment)
    strays = sweep_strays(store, logged, None if study is None else experiments, dry_run) if dangling else []
    return Sweep(swept, running, strays, lag, problem, is_server(store))


def _choose(store: Store, study: str | None) -> dict[str, list[str]]:
    """Return the parts of each experiment, for those that were run into this store; raises StudyError."""
    records = read_studies(store)
    chosen = studies_of(records if study is None else parts_of(records, study))
    own = {name: parts for name, parts in chosen.items() if any(is_here(store, part.name) for part in parts)}
    if study is not None and not own:
        raise StudyError(f"study {study}: was run from another store, which has its files; --store names it")
    return {name: [part.name for part in parts] for name, parts in own.items()}


@contextlib.contextmanager
def _leased(store: Store, names: list[str]) -> Iterator[storage.Database]:
    """Hold the studies of an experiment until the block ends; raises BusyError if someone runs one of them."""
    with contextlib.closing(storage.Database(store.storage_url)) as database, contextlib.ExitStack() as leases:
        for name in names:
            leases.callback(acquire(database.url, name).release)
        yield database


@storage.retry_while_unavailable
def _read(database: storage.Database, name: str) -> StudyRecord:
    return read_study(optuna.load_study(study_name=name, storage=database.backend))


def _plan(store: Store, study: StudyRecord, policy: Policy, logged: LoggedStudy) -> Swept:
    """Return what goes of a study; what a killed call has marked and not removed goes, too."""
    registered = {trial.uid for trial in study.trials if logged.is_registered(trial.uid)}
    fate = decide(study, policy, registered, datetime.now())
    half = [trial for trial in study.trials if trial.removed and _folder(store, study, trial).exists()]
    going = sorted([*half, *fate.going], key=lambda trial: trial.number)
    folders = [_folder(store, study, trial) for trial in going]
    return Swept(
        study=study.experiment,
        arm=study.arm,
        phase=study.phase,
        going=[trial.number for trial in going],
        checkpoints_mib=sum(size_mib(folder) for folder in folders if folder.exists()),
        artifacts_mib=sum(logged.size_mib(trial.uid) for trial in going),
        staying=fate.staying,
        removed=[trial.number for trial in study.trials if trial.removed and trial not in half],
    )


def _remove(store: Store, database: storage.Database, study: StudyRecord, going: list[int]) -> None:
    """Remove all but what is in MLflow."""
    mark_removed(database, study.name, set(going))
    remote = find_remote()
    for folder in [_folder(store, study, trial) for trial in study.trials if trial.number in going]:
        remove_folder(folder)
        if remote:
            remote.remove(name_of(folder))


def _folder(store: Store, study: StudyRecord, trial: TrialRecord) -> Path:
    return store.trial_folder(study.name, trial.number, trial.config.seed)
