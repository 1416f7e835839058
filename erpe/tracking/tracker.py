"""What a driver calls: it notes when things were, and wakes a thread that brings MLflow up to date meanwhile."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import optuna

from erpe.errors import BusyError, StudyError, TrackingError
from erpe.store import Store
from erpe.study import storage
from erpe.study.lock import acquire
from erpe.study.lookup import parts_of
from erpe.study.reading import read_studies, read_study
from erpe.study.records import GROUP, STUDY, StudyRecord, TrialRecord
from erpe.study.spec import check_name
from erpe.tracking.connection import examine
from erpe.tracking.history import Journal
from erpe.tracking.marks import INTERRUPTED, study_mark
from erpe.tracking.publisher import Publisher, Repaired, is_shown
from erpe.tracking.spool import read_spool
from erpe.tracking.waiting import lags, own

BEGIN_SECONDS = 30.0
"""What begins is shown so much later, or with the next epoch: MLflow takes seconds to import, and the workers that
start meanwhile need both cores."""

PERIOD = 1.0
"""Seconds between two steps, at least; doubled each time while nothing gets through."""

LONGEST_PAUSE = 30.0
"""As many seconds at most."""

HURRY_SECONDS = 5.0
"""How long the rest is sent once somebody waits for the end."""


class Tracker:
    """Publishes one study, in a thread. Calls may be repeated, also by a later process: nothing is there twice.

    Every call raises `StoreError` if the store cannot be written, and nothing else.
    """

    def __init__(self, store: Store, study: str, *, send: bool = True, parts: list[StudyRecord] | None = None) -> None:
        """Start publishing. Until `close` the study is at work.

        Args:
            send: False publishes nothing and leaves it to `sync`.
            parts: of a study that this process does not run, as they stand; default: what the database has, until
                `close` and whenever it changes.
        Raises:
            ConfigError: the name of the study cannot be the name of a file.
        """
        check_name(study)
        self.store, self.study = store, study
        read_spool(store, study)
        self._parts = _Parts(store, study)
        self.publisher = Publisher(store, study, (lambda: parts) if parts else self._parts.read)
        self.elsewhere = parts is not None and _is_running(store, parts)
        """Whether another process is at work on it, also afterwards."""
        self._journals: dict[str, Journal] = {}
        self._told = self._arrived = 0
        self._whole = False
        self._wake, self._last = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._publish, name=f"mlflow {study}", daemon=True)
        if send:
            self._thread.start()

    def _publish(self) -> None:
        """Publish until the study is over and all is there, or the user must repair something."""
        publisher, pause = self.publisher, PERIOD
        self._wake.wait(BEGIN_SECONDS)
        try:
            while not publisher.stop.is_set():
                self._wake.clear()
                told, last = self._told, self._last.is_set()  # before the step: what is told later comes with the next
                if arrived := publisher.step(self.elsewhere or not last, last):
                    self._arrived, self._whole, pause = told, last, PERIOD
                if last and (arrived or publisher.problem):
                    return
                if arrived:
                    self._wake.wait(BEGIN_SECONDS)
                (publisher.stop if last else self._last).wait(pause)
                pause = min(2 * pause, LONGEST_PAUSE)
        finally:
            publisher.close()
            self._parts.close()

    @property
    def problem(self) -> str | None:
        """Why MLflow does not get the study, where waiting does not help: one line. The store has it."""
        return self.publisher.problem

    def tell(self, study: str) -> None:
        """Show how a part of the study, as the database calls it, stands: it begins, or has news."""
        self._told += 1
        self._parts.news.add(study)

    def start_trial(self, study: str, trial: TrialRecord, tags: dict[str, str]) -> None:
        """Note whose driver has a trial from now on.

        Args:
            study: its part, as the database calls it.
            tags: of the driver.
        """
        self._journal(study, trial).start(tags)
        self.tell(study)

    def epoch(self, study: str, trial: TrialRecord, measures: dict[str, float]) -> None:
        """Note when an epoch was, and its measures. The first word on it counts, also after a restart."""
        self._journal(study, trial).epoch(measures)
        self.tell(study)
        self._wake.set()

    def end_trial(self, study: str, trial: TrialRecord) -> None:
        """Show how a trial ended, or what was measured of it later."""
        self._journals.pop(trial.uid, None)
        self.tell(study)
        self._wake.set()

    def _journal(self, study: str, trial: TrialRecord) -> Journal:
        if trial.uid not in self._journals:
            self._journals[trial.uid] = Journal(self.store.trial_folder(study, trial.number, trial.config.seed))
        return self._journals[trial.uid]

    def lag(self) -> int:
        """Return how many changes were told and are not there yet."""
        return self._told - self._arrived

    def close(self, timeout: float = 30, asked: threading.Event | None = None) -> int:
        """Publish what is left, for at most `timeout` seconds or until the user must repair something.

        Args:
            asked: set once somebody waits for the end, as after Ctrl-C: then `HURRY_SECONDS` more are the most.
        Returns:
            How many changes MLflow lacks; `sync` sends them later.
        """
        self._parts.look_again()
        self._last.set()
        self._wake.set()
        deadline = time.monotonic() + timeout
        while self._thread.is_alive() and (left := deadline - time.monotonic()) > 0:
            if asked and asked.is_set():
                asked, deadline, left = None, 0.0, min(left, HURRY_SECONDS)
            self._thread.join(min(left, 0.2) if asked else left)
        self.publisher.stop.set()
        return 0 if self._whole else max(1, lags(self.store, self.study).get(self.study, self.lag()))


class _Parts:
    """The parts of a study as the database has them; one without news, and a trial that ended, are read once."""

    def __init__(self, store: Store, study: str) -> None:
        self._store, self._study = store, study
        self.news: set[str] = set()
        """Parts to read; any thread adds to them."""
        self._database: storage.Database | None = None
        self._known: dict[str, tuple[optuna.Study, dict[int, TrialRecord]]] = {}
        self._records: dict[str, StudyRecord] = {}

    @storage.retry_while_unavailable
    def read(self) -> list[StudyRecord]:
        """Return all parts.

        Raises:
            StoreError: the database cannot be read.
        """
        if self._database is None:
            if not storage.exists(storage.parse(self._store.storage_url)):
                return []
            self._database = storage.Database(self._store.storage_url)
            attrs = {name: self._database.study_attrs(name) for name in self._database.names()}
            found = {name for name, own in attrs.items() if own.get(GROUP, {}).get("study", name) == self._study}
            self.news |= {name for name in found if STUDY in attrs[name]}
        for name in self.news.copy():
            self.news.discard(name)  # before it is read: what is told meanwhile is for the next time
            try:
                if name not in self._known:
                    self._known[name] = optuna.load_study(study_name=name, storage=self._database.backend), {}
                self._records[name] = read_study(*self._known[name])
            except BaseException:
                self.news.add(name)
                raise
        return [self._records[name] for name in sorted(self._records)]

    def look_again(self) -> None:
        """Read all parts again, also what nobody told of."""
        self.news.update(list(self._known))

    def close(self) -> None:
        """Leave the database alone."""
        if self._database:
            self._database.close()


_DOWN = "start it, or name another with MLFLOW_TRACKING_URI; nothing is lost"


def sync(
    store: Store,
    study: str | None = None,
    timeout: float = 600,
    tell: Callable[[str, int, Repaired], None] = lambda study, left, repaired: None,
    mend: Callable[[], object] = lambda: None,
) -> dict[str, int]:
    """Bring MLflow to what the store has.

    Args:
        tell: called for each study with the number of changes left and what MLflow had lost.
        mend: called before MLflow is used; true if it made MLflow forget everything.
    Returns:
        Changes left, by study.
    Raises:
        StudyError: the store has no study of this name.
        StoreError: the database cannot be read.
        TrackingError: the server is down, refuses, or is not MLflow.
    """
    deadline, known = time.monotonic() + timeout, own(store)
    if study and study not in known:
        study = parts_of(read_studies(store), study)[0].experiment  # of an arm, or of another store
        if study not in known:
            raise StudyError(
                f"study {study}: none of its trials is in this store; use --store with the one that has them"
            )
    chosen = {study: known[study]} if study else known
    behind = [name for name, parts in chosen.items() if not is_shown(store, name, parts)]
    if behind and mend():
        behind = [*chosen]
    if behind and (health := examine(store.tracking_uri)).state != "well":
        raise TrackingError(f"{health.fact}; {_DOWN if health.state == 'down' else health.advice}".rstrip("; "))
    left, problem = dict.fromkeys(chosen, 0), None
    for name, parts in chosen.items():
        repaired = Repaired()
        if name in behind:
            tracker = Tracker(store, name, parts=parts)
            patience = max(1.0, deadline - time.monotonic())
            left[name] = tracker.close(min(patience, BEGIN_SECONDS) if tracker.elsewhere else patience)
            repaired, problem = tracker.publisher.repaired, tracker.problem or problem
        tell(name, left[name], repaired)
    if problem:
        raise TrackingError(problem)
    return left


def _is_running(store: Store, members: list[StudyRecord]) -> bool:
    """Whether a driver holds one of these studies."""
    url = storage.parse(store.storage_url)
    try:
        for member in members:
            if study_mark(member, members, running=False).state == INTERRUPTED:
                acquire(url, member.name).release()
    except BusyError:
        return True
    return False
