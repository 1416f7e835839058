"""What a study calls: every call is one line in the outbox, and returns; MLflow gets it in the background."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from erpe.config import TrialConfig
from erpe.errors import ErpeError, StoreError, StudyError, TrackingError, nearest
from erpe.store import Store
from erpe.tracking.connection import examine
from erpe.tracking.outbox import Event, Outbox
from erpe.tracking.publisher import Repaired, Sender
from erpe.tracking.run_state import RunState

BEGIN_SECONDS = 30.0
"""A study that has only started is sent so much later, or when there is more to tell: MLflow takes seconds to import,
and the workers that start meanwhile need both cores."""


class Tracker:
    """Records one study. Calls may be repeated, also by a later process: nothing is recorded twice.

    Every call raises `StoreError` if the outbox cannot be written, and nothing else.
    """

    def __init__(self, store: Store, study: str, *, send: bool = True) -> None:
        """Read what earlier processes recorded, and start sending what has not arrived.

        Args:
            send: False leaves everything in the outbox, for `sync`.
        Raises:
            ConfigError: the name of the study cannot be the name of a file.
            StoreError: the outbox cannot be written, or had a damaged line, which is now beside it.
        """
        self._store = store
        self._runs: defaultdict[str, RunState] = defaultdict(RunState)
        self.removed: set[str] = set()
        """uids of removed trials."""
        self.registered: set[str] = set()
        """uids of trials whose model is registered, as soon as MLflow has the events."""
        self._at = 0
        self._mutex = threading.Lock()
        self._outbox = Outbox(store.outbox, study, self._observe)
        with self._outbox.exclusive():
            pass
        self._sender = Sender(store, study, self.removed)
        self._stop, self._wake, self._last = threading.Event(), threading.Event(), threading.Event()
        self._begin = threading.Event()
        self._thread = threading.Thread(target=self._send, name=f"mlflow {study}", daemon=True)
        if send:
            self._thread.start()

    def _send(self) -> None:
        self._begin.wait(BEGIN_SECONDS)
        self._sender.run(self._stop, self._wake, self._last)

    @property
    def problem(self) -> str | None:
        """Why MLflow does not get the events, where waiting does not help: one line. The outbox keeps them."""
        return self._sender.problem

    @contextmanager
    def rebuilding(self, at: int) -> Iterator[None]:
        """Log what is told inside the block as of `at` (milliseconds since 1970): the outbox lacks it."""
        self._at = at
        try:
            yield
        finally:
            self._at = 0

    @property
    def seq(self) -> int:
        """How many events the outbox has had."""
        return self._outbox.seq

    def known(self, uid: str) -> RunState:
        """Return what the outbox has of a run."""
        return self._runs.get(uid) or RunState()

    @property
    def repaired(self) -> Repaired:
        """What MLflow had lost of what it had."""
        return self._sender.repaired

    def start_study(self, uid: str, spec: dict[str, Any], tags: dict[str, str], name: str = "") -> None:
        """Log a parent run. An experiment may have several, each with a name of its own."""
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
        """Log a trial's run; its parameters are `config.flat()`.

        Args:
            parent: uid of its study.
            name: default: `trial NUMBER`.
        """
        settings = config.tree("json")
        self._put(
            Event(kind="start_trial", uid=uid, number=number, parent=parent, config=settings, tags=tags, name=name)
        )

    def epoch(self, uid: str, step: int, metrics: dict[str, float]) -> None:
        """Measures of one epoch. The first word on a step counts, also after a restart."""
        self._put(Event(kind="epoch", uid=uid, step=step, metrics=metrics))

    def end_trial(
        self, uid: str, state: str, metrics: dict[str, float], folder: Path | None, reason: str | None
    ) -> None:
        """Log that a trial is COMPLETE, PRUNED or FAIL.

        Args:
            metrics: final measures; one equal to the last epoch's is not recorded twice.
            folder: the trial's results, sent along if it is COMPLETE.
            reason: why it was pruned or failed; the last line becomes a tag, all of it an artifact.
        """
        run = self._runs[uid]
        news = run.news(metrics)
        step = run.step + bool(run.latest.keys() & news)  # what replaces an epoch's measure comes after it
        self._end("end_trial", uid, state, news, folder, step=step, reason=reason)

    def remove_trial(self, uid: str, parent: str) -> None:
        """Log that a trial that ended is removed: its run and artifacts go. Its other events are not sent any more.

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
        tags: dict[str, str] | None = None,
    ) -> None:
        """Log that the study ends, or pauses: summary measures, Optuna's plots, the best trial's results, and the
        champion.

        Args:
            folder: results of the best trial.
            state: COMPLETE, FAIL, or what else stopped it.
            name: as at its start.
            model: name under which the best trial becomes the champion; default: it does not.
            tags: that only its end knows.
        """
        news = self._runs[uid].news(metrics)
        self._end("end_study", uid, state, news, folder, best=best_uid, name=name, model=model, tags=tags or {})

    def _end(
        self, kind: Any, uid: str, state: str, metrics: dict[str, float], folder: Path | None, **more: Any
    ) -> None:
        if folder is not None:
            folder = folder.resolve()
            inside = folder.is_relative_to(self._store.root)
            more["folder"] = str(folder.relative_to(self._store.root) if inside else folder)
        self._put(Event(kind=kind, uid=uid, state=state, metrics=metrics, **more))

    def _put(self, event: Event) -> None:
        if self._at:
            event = event.model_copy(update={"ts": self._at, "rebuilt": True})
        with self._mutex, self._outbox.exclusive():
            if not self._runs[event.uid].covers(event):
                self._outbox.write(event)
        if not event.kind.startswith("start"):
            self._begin.set()
        self._wake.set()

    def _observe(self, event: Event) -> None:
        if event.kind == "remove_trial":
            self.removed.add(event.uid)
        if event.model and event.folder and event.best:
            self.registered.add(event.best)
        self._runs[event.uid].observe(event)

    def lag(self) -> int:
        """Events that have not been acknowledged by the tracking server."""
        return max(0, self._outbox.seq - self._sender.ack.seq)

    def close(self, timeout: float = 30) -> int:
        """Send what is left, for at most `timeout` seconds or until the user must repair something.

        Returns:
            Events left in the outbox; `sync` sends them later.
        """
        self._last.set()
        self._begin.set()
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(timeout)
        self._stop.set()
        return self.lag()


class Waiting(NamedTuple):
    """What MLflow has not got yet of an outbox."""

    events: Counter[str]
    """Run -> how many."""
    since: float | None
    """When the oldest happened, in seconds since 1970."""


def waiting(store: Store) -> dict[str, Waiting]:
    """Return what waits in each outbox; neither they nor MLflow are touched."""
    found = {}
    for study in _studies(store):
        sender = Sender(store, study)
        events, oldest = sender.outbox.waiting(sender.ack.offset)
        found[study] = Waiting(events, oldest / 1000 if events else None)
    return found


def lags(store: Store) -> dict[str, int]:
    """How many events of each study wait in the outbox."""
    return {study: found.events.total() for study, found in waiting(store).items()}


_DOWN = "start it, or name another with MLFLOW_TRACKING_URI; nothing is lost"


def sync(
    store: Store,
    study: str | None = None,
    timeout: float = 600,
    tell: Callable[[str, int, Repaired], None] = lambda study, left, repaired: None,
) -> dict[str, int]:
    """Send what waits in the outboxes of the store, and again what MLflow has lost.

    Args:
        tell: called for each study with the number of events left and what MLflow had lost.
    Returns:
        Events left, by study.
    Raises:
        StudyError: the store has no outbox of this name.
        StoreError: an outbox cannot be read, or had a damaged line, which is now beside it; the others were sent.
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
        raise TrackingError(f"{health.fact}; {health.advice if health.state == 'refuses' else _DOWN}".rstrip("; "))
    for name in [study] if study else known:
        try:
            Sender(store, name).again()
            tracker = Tracker(store, name)
            left[name] = tracker.close(max(1.0, deadline - time.monotonic()))
            tell(name, left[name], tracker.repaired)
            if tracker.problem:
                error = TrackingError(tracker.problem)
        except StoreError as damaged:
            error = damaged
    if error:
        raise error
    return left


def _studies(store: Store) -> list[str]:
    return sorted(path.stem for path in store.outbox.glob("*.jsonl"))
