"""What a study calls: every call is one line in the spool, and returns; MLflow gets it in the background."""

from __future__ import annotations

import json
import threading
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from erpe.config import TrialConfig
from erpe.errors import ErpeError, StoreError, StudyError, TrackingError, nearest
from erpe.store import Store
from erpe.tracking.sender import Sender
from erpe.tracking.server import examine
from erpe.tracking.spool import Event, Spool


@dataclass
class _Known:
    """What the spool has of one run."""

    steps: set[int] = field(default_factory=set)
    step: int = 0
    """The last epoch."""
    measures: dict[str, float] = field(default_factory=dict)
    """Of the last epoch, and final ones."""
    told: dict[str, str] = field(default_factory=dict)
    """The last start and end. A trial starts and ends once; a study goes on after a pause."""

    def observe(self, event: Event) -> None:
        if event.kind != "epoch":
            self.measures |= event.metrics
            if event.kind in ("start_study", "end_study"):
                self.told.clear()
            self.told[event.kind] = _essence(event)
            return
        self.steps.add(event.step)
        if event.step >= self.step:
            self.step, self.measures = event.step, dict(event.metrics)

    def covers(self, event: Event) -> bool:
        if event.kind == "epoch":
            return event.step in self.steps
        return self.told.get(event.kind) == _essence(event) and not self.news(event.metrics)

    def news(self, metrics: dict[str, float]) -> dict[str, float]:
        """Measures that differ; NaN does not differ from NaN."""
        return {key: value for key, value in metrics.items() if repr(self.measures.get(key)) != repr(float(value))}


def _essence(event: Event) -> str:
    """The event without what the spool adds, and without measures, which are compared one by one."""
    return event.model_dump_json(exclude={"seq", "ts", "step", "metrics"})


class Tracker:
    """Records one study. Calls may be repeated, also by a later process: nothing is recorded twice.

    Every call raises `StoreError` if the spool cannot be written, and nothing else.
    """

    def __init__(self, store: Store, study: str, *, send: bool = True) -> None:
        """Read what earlier processes recorded, and start sending what has not arrived.

        Args:
            send: False leaves everything in the spool, for `sync`.
        Raises:
            ConfigError: the name of the study cannot be the name of a file.
            StoreError: the spool cannot be written, or had a damaged line, which is now beside it.
        """
        self._store = store
        self._runs: defaultdict[str, _Known] = defaultdict(_Known)
        self.removed: set[str] = set()
        """uids of removed trials."""
        self.registered: set[str] = set()
        """uids of trials whose model is registered, as soon as MLflow has the events."""
        self._mutex = threading.Lock()
        self._spool = Spool(store.spool, study, self._observe)
        with self._spool.exclusive():
            pass
        self._sender = Sender(store, study, self.removed)
        self._stop, self._wake, self._last = threading.Event(), threading.Event(), threading.Event()
        self._thread = threading.Thread(
            target=self._sender.run, args=(self._stop, self._wake, self._last), name=f"mlflow {study}", daemon=True
        )
        if send:
            self._thread.start()

    @property
    def problem(self) -> str | None:
        """What keeps MLflow from getting the events and will not mend itself: one line. The spool keeps them."""
        return self._sender.problem

    def start_study(self, uid: str, spec: dict[str, Any], tags: dict[str, str], name: str = "") -> None:
        """A parent run. An experiment may have several, each with a name of its own."""
        self._put(Event(kind="start_study", uid=uid, config=json.loads(json.dumps(spec)), tags=tags, name=name))

    def start_trial(
        self,
        uid: str,
        number: int,
        config: TrialConfig,
        tags: dict[str, str],
        *,
        parent: str | None = None,
        name: str = "",
    ) -> None:
        """A trial's run; its parameters are `config.flat()`.

        Args:
            parent: uid of its study.
            name: none: `trial NUMBER`.
        """
        settings = config.model_dump(mode="json")
        self._put(
            Event(kind="start_trial", uid=uid, number=number, parent=parent, config=settings, tags=tags, name=name)
        )

    def epoch(self, uid: str, step: int, metrics: dict[str, float]) -> None:
        """Measures of one epoch. The first word on a step counts, also after a restart."""
        self._put(Event(kind="epoch", uid=uid, step=step, metrics=metrics))

    def end_trial(
        self, uid: str, state: str, metrics: dict[str, float], folder: Path | None, reason: str | None
    ) -> None:
        """A trial is COMPLETE, PRUNED or FAIL.

        Args:
            metrics: final measures; one equal to the last epoch's is not recorded twice.
            folder: the trial's results, sent along if it is COMPLETE.
            reason: why it was pruned or failed; the last line becomes a tag, all of it an artifact.
        """
        run = self._runs[uid]
        news = run.news(metrics)
        step = run.step + bool(run.measures.keys() & news)  # what replaces an epoch's measure comes after it
        self._end("end_trial", uid, state, news, folder, step=step, reason=reason)

    def remove_trial(self, uid: str, parent: str) -> None:
        """A trial that ended is given up: its run and artifacts go. Its other events are not sent any more.

        Args:
            parent: uid of its study.
        """
        self._put(Event(kind="remove_trial", uid=uid, parent=parent))

    def end_study(
        self,
        uid: str,
        best_uid: str | None,
        metrics: dict[str, float],
        folder: Path | None,
        state: str,
        *,
        name: str = "",
        model: str = "",
    ) -> None:
        """The study ends, or pauses: summary measures, Optuna's plots, the best trial's results, and the champion.

        Args:
            folder: results of the best trial.
            state: COMPLETE, FAIL, or what else stopped it.
            name: as at its start.
            model: under which name the best trial becomes the champion; none: it does not.
        """
        news = self._runs[uid].news(metrics)
        self._end("end_study", uid, state, news, folder, best=best_uid, name=name, model=model)

    def _end(
        self, kind: Any, uid: str, state: str, metrics: dict[str, float], folder: Path | None, **more: Any
    ) -> None:
        if folder is not None:
            folder = folder.resolve()
            inside = folder.is_relative_to(self._store.root)
            more["folder"] = str(folder.relative_to(self._store.root) if inside else folder)
        self._put(Event(kind=kind, uid=uid, state=state, metrics=metrics, **more))

    def _put(self, event: Event) -> None:
        with self._mutex, self._spool.exclusive():
            if not self._runs[event.uid].covers(event):
                self._spool.write(event)
        self._wake.set()

    def _observe(self, event: Event) -> None:
        if event.kind == "remove_trial":
            self.removed.add(event.uid)
        if event.model and event.folder and event.best:
            self.registered.add(event.best)
        self._runs[event.uid].observe(event)

    def lag(self) -> int:
        """Events that have not been acknowledged by the tracking server."""
        return max(0, self._spool.seq - self._sender.ack.seq)

    def close(self, timeout: float = 30) -> int:
        """Send what is left, for at most `timeout` seconds or until someone must mend something.

        Returns:
            Events left in the spool; `sync` sends them later.
        """
        self._last.set()
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(timeout)
        self._stop.set()
        return self.lag()


def lags(store: Store) -> dict[str, int]:
    """Events of each study that wait in the spool, without sending any."""
    return {study: Tracker(store, study, send=False).lag() for study in _studies(store)}


def sync(store: Store, study: str | None = None, timeout: float = 600) -> dict[str, int]:
    """Send what waits in the spools of the store.

    Returns:
        Events left, by study.
    Raises:
        StudyError: the store has no spool of this name.
        StoreError: a spool cannot be read, or had a damaged line, which is now beside it; the others were sent.
        TrackingError: the server is down, refuses, or is not MLflow.
    """
    deadline = time.monotonic() + timeout
    left: dict[str, int] = {}
    error: ErpeError | None = None
    known = _studies(store)
    if study and study not in known:
        raise StudyError(f"study {study!r}: not in this store; {nearest(study, known) if known else 'it has none'}")
    health = examine(store.tracking_uri)
    if known and health.state != "well":
        raise TrackingError(health.line)
    for name in [study] if study else known:
        try:
            Sender(store, name).again()
            tracker = Tracker(store, name)
            left[name] = tracker.close(max(1.0, deadline - time.monotonic()))
            if tracker.problem:
                error = TrackingError(tracker.problem)
        except StoreError as damaged:
            error = damaged
    if error:
        raise error
    return left


def _studies(store: Store) -> list[str]:
    return sorted(path.stem for path in store.spool.glob("*.jsonl"))
