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


class _Plan(NamedTuple):
    study: StudyRecord
    going: list[TrialRecord]
    swept: Swept


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
            with (
                contextlib.nullcontext() if dry_run else keeping(store),
                _LeasedExperiment.lease(store, logged, experiment, names) as held,
            ):
                plans = [held.plan(name, policy) for name in names]  # all is known before anything is written
                swept += [plan.swept for plan in plans]
                for plan in [] if dry_run else plans:
                    held.remove(plan)
                unsent, said = (0, None) if dry_run else held.send()
                lag, problem = lag + unsent, problem or said
        except BusyError:
            if study is not None:
                raise
            running.append(experiment)
    strays = sweep_strays(store, logged, None if study is None else experiments, dry_run) if dangling else []
    return Sweep(swept, running, strays, lag, problem, is_server(store))


def _choose(store: Store, study: str | None) -> dict[str, list[str]]:
    """Return the parts of each experiment, for those that were run into this store.

    Raises:
        StudyError: there is none of that name, or it was run from another store.
    """
    records = read_studies(store)
    chosen = studies_of(records if study is None else parts_of(records, study))
    own = {name: parts for name, parts in chosen.items() if any(is_here(store, part.name) for part in parts)}
    if study is not None and not own:
        raise StudyError(f"study {study}: was run from another store, which has its files; --store names it")
    return {name: [part.name for part in parts] for name, parts in own.items()}


class _LeasedExperiment(NamedTuple):
    """Studies that share an experiment, leased."""

    store: Store
    database: storage.Database
    experiment: str
    logged: LoggedStudy

    @classmethod
    @contextlib.contextmanager
    def lease(cls, store: Store, logged: Logged, experiment: str, names: list[str]) -> Iterator[_LeasedExperiment]:
        """Hold them until the block ends.

        Raises:
            BusyError: someone runs one of them.
        """
        with (
            contextlib.closing(storage.Database(store.storage_url)) as database,
            contextlib.ExitStack() as leases,
        ):
            for name in names:
                leases.callback(acquire(database.url, name).release)
            yield cls(store, database, experiment, logged.study(experiment))

    def plan(self, name: str, policy: Policy) -> _Plan:
        """Remove what is planned of a study; what a killed call has marked and not removed goes, too."""
        study = read_leased(self.database, name)
        registered = {trial.uid for trial in study.trials if self.logged.is_registered(trial.uid)}
        fate = decide(study, policy, registered, datetime.now())
        before = [trial for trial in study.trials if trial.removed]
        half = [trial for trial in before if self._folder(study, trial).exists()]
        going = sorted([*half, *fate.going], key=lambda trial: trial.number)
        folders = [self._folder(study, trial) for trial in going]
        swept = Swept(
            study=study.experiment,
            arm=study.arm,
            phase=study.phase,
            going=[trial.number for trial in going],
            checkpoints_mib=sum(size_mib(folder) for folder in folders),
            artifacts_mib=sum(self.logged.size_mib(trial.uid) for trial in going),
            staying=fate.staying,
            removed=[trial.number for trial in before if trial not in half],
        )
        return _Plan(study, going, swept)

    def _folder(self, study: StudyRecord, trial: TrialRecord) -> Path:
        return self.store.trial_folder(study.name, trial.number, trial.config.seed)

    def remove(self, plan: _Plan) -> None:
        """All but what is in MLflow."""
        mark_removed(self.database, plan.study.name, {trial.number for trial in plan.going})
        remote = find_remote()
        for trial in plan.going:
            remove_folder(self._folder(plan.study, trial))
            if remote:
                remote.remove(name_of(self._folder(plan.study, trial)))

    def send(self) -> tuple[int, str | None]:
        """Bring MLflow up to date, if it has the study: how many changes are left, and what keeps it from them."""
        if not self.logged.exists:
            return 0, None
        tracker = Tracker(self.store, self.experiment)
        return tracker.close(SECONDS), tracker.problem


@storage.retry_while_unavailable
def read_leased(database: storage.Database, name: str) -> StudyRecord:
    """Read a study while no other process writes to it."""
    return read_study(optuna.load_study(study_name=name, storage=database.backend))
