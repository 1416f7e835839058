"""Carries an outbox to MLflow: as often as it takes, in bounded memory, one process at a time."""

from __future__ import annotations

import json
import os
import threading
import traceback
from collections import defaultdict
from typing import TYPE_CHECKING, NamedTuple

from filelock import FileLock, Timeout

from erpe.errors import ErpeError
from erpe.io import open_plain
from erpe.store import Store
from erpe.text import first_line, redact
from erpe.tracking.connection import Health, examine
from erpe.tracking.outbox import Ack, Event, Outbox
from erpe.tracking.run_state import RunState

if TYPE_CHECKING:
    from erpe.tracking.projection import Projection

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0
"""Seconds between attempts while nothing gets through: doubled each time."""

_ATTEMPTS = 3
"""So often is an event tried that a healthy server will not take."""


class Repaired(NamedTuple):
    """Runs that MLflow had acknowledged and had not any more, and which are sent again."""

    missing: int = 0
    """Were not there at all."""
    short: int = 0
    """Lacked something, or were in another state."""


class Sender:
    """Sends one study's events in order; how far they have arrived is in `STUDY.ack`."""

    def __init__(self, store: Store, study: str, removed: set[str] | None = None) -> None:
        """Prepare; `removed` has the uids of trials that the outbox removes later on."""
        self.store, self.study = store, study
        self._removed = set() if removed is None else removed
        self.outbox = Outbox(store.outbox, study)
        self.problem: str | None = None
        """What the user must repair; empty while the server is only down."""
        self.repaired = Repaired()
        self._uri = store.destination
        self._projection: Projection | None = None
        self._failures = 0
        self._singly = 0
        self._look, self._sent = True, False
        self._whole: set[str] = set()
        self._until = 0
        self._refused = store.outbox / f"{study}.refused"
        self._lock = FileLock(store.outbox / f"{study}.sender", thread_local=False)

    @property
    def ack(self) -> Ack:
        """How far this destination has everything; another destination has nothing yet."""
        ack = self.outbox.ack
        return ack if ack.uri == self._uri else Ack(self._uri)

    def run(self, stop: threading.Event, wake: threading.Event, last: threading.Event) -> None:
        """Send until `stop`; once `last` is set, until all is sent or the user must repair something.

        What had arrived earlier is looked at first; what was sent now, at the end.
        """
        pause, once_more = FIRST_PAUSE, True
        try:
            while not stop.is_set():
                wake.clear()
                closing = last.is_set()  # asked before the step: what is told until then is in the outbox
                moved = self.step()
                if closing and moved is None and self._sent and once_more:
                    self._look, once_more = True, False
                    continue
                if closing and not moved and (moved is None or self.problem or self._all_sent()):
                    break
                if moved is None:
                    wake.wait(1)  # another process may write to the outbox, too
                elif not moved:
                    stop.wait(pause)
                pause = min(2 * pause, LONGEST_PAUSE) if moved is False else FIRST_PAUSE
        finally:
            self._lock.release(force=True)  # a thread that dies of something unforeseen must not keep it

    def again(self) -> None:
        """Send from the first event on, if some were refused: what has arrived does not change."""
        if self._refused.exists():
            self.outbox.acknowledge(Ack(self._uri))
            self._refused.unlink()

    def step(self) -> bool | None:
        """Send one batch: True if it arrived, False if it did not, None if there is nothing to send."""
        events: list[tuple[Event, int]] = []
        try:
            if self._look and self.ack.offset and not self._refused.exists():
                self._take_turn()
                self._audit(self.ack)
            self._look = False
            ack = self.ack
            events = self.outbox.read(ack.offset)
            if not events:
                return None
            self._take_turn()
            if events[0][0].seq <= self._singly:
                events = events[:1]
            if projection := self._open(ack):
                projection.apply(
                    [event for event, _ in events if event.uid not in self._whole or event.seq > self._until]
                )
                self._arrived(events[-1])
            return True
        except Timeout:
            return False  # another process sends
        except _Unwell as error:
            return self._unwell(error.health)
        except ErpeError as error:
            self.problem = str(error)
            return False
        except Exception as error:
            return self._understand(error, events)

    def _take_turn(self) -> None:
        if not self._lock.is_locked:
            self._lock.acquire(timeout=0)

    def _all_sent(self) -> bool:
        return not self.outbox.read(self.ack.offset)

    def _audit(self, ack: Ack) -> None:
        """Begin again from the first event if MLflow lacks some that it acknowledged; runs that are whole are left."""
        expected: defaultdict[str, RunState] = defaultdict(RunState)
        offset, seq, behind = 0, 0, False
        while not behind and (batch := self.outbox.read(offset)):
            for event, offset in batch:
                expected[event.uid].observe(event)
                seq = event.seq
                if behind := (offset, seq) == (ack.offset, ack.seq):
                    break
        for uid in self._removed & expected.keys():
            del expected[uid]
        projection = self._open(ack)
        if projection is None:
            self.repaired = Repaired(missing=len(expected))
            return
        from erpe.tracking.verify import audit

        missing, short = audit(projection.client, projection.experiment, expected)
        self._whole, self._until = expected.keys() - missing - short, seq
        self.repaired = Repaired(self.repaired.missing + len(missing), self.repaired.short + len(short))
        if missing or short or not behind:  # or the acknowledgement is of another outbox
            self.outbox.acknowledge(Ack(self._uri))

    def _open(self, ack: Ack) -> Projection | None:
        """Connect; nothing if the experiment has vanished, so that all must be sent again from the first event."""
        if self._projection is None:
            # a server that is not MLflow may say yes to everything
            if (health := examine(self.store.tracking_uri)).state != "well":
                raise _Unwell(health)
            from erpe.tracking.projection import Projection

            projection = Projection(self.store, self.study, self._removed)
            if not projection.find_experiment():
                if ack.offset:
                    self._whole = set()
                    self.outbox.acknowledge(Ack(self._uri))
                    return None
                projection.create_experiment()
            self._projection = projection
        return self._projection

    def _arrived(self, last: tuple[Event, int]) -> None:
        event, end = last
        self.outbox.acknowledge(Ack(self._uri, end, event.seq))
        self._failures, self._sent = 0, True
        self.problem = f"MLflow refused events; {self._refused} says why" if self._refused.exists() else None

    def _understand(self, error: Exception, events: list[tuple[Event, int]]) -> bool:
        """Wait for a server that is down; name what the user must repair; set apart an event that cannot be sent."""
        self._projection = None
        health = examine(self.store.tracking_uri)
        if health.state != "well":
            return self._unwell(health)
        self._failures += 1
        self._look = self._look and self._failures < _ATTEMPTS  # sending does not wait for a look that fails
        if events and _definite(error):
            self._singly = max(self._singly, events[-1][0].seq)
            if len(events) == 1 and self._failures >= _ATTEMPTS:
                self._set_apart(events[0], error)
                return True
        elif self._failures >= _ATTEMPTS:
            self.problem = f"{self._uri}: {redact(first_line(error))}"
        return False

    def _unwell(self, health: Health) -> bool:
        self.problem = health.line if health.state == "refuses" else None
        return False

    def _set_apart(self, event: tuple[Event, int], error: Exception) -> None:
        told = redact("".join(traceback.format_exception(error)))
        with os.fdopen(open_plain(self._refused, os.O_WRONLY | os.O_CREAT | os.O_APPEND), "a") as file:
            file.write(json.dumps({"event": event[0].model_dump(exclude_defaults=True), "error": told}) + "\n")
        self._arrived(event)


class _Unwell(Exception):
    def __init__(self, health: Health) -> None:
        self.health = health


def _definite(error: Exception) -> bool:
    """Whether trying again is of no use: MLflow says that the request is wrong, or we have a bug."""
    from mlflow.exceptions import MlflowException

    if isinstance(error, MlflowException):
        return error.get_http_status_code() in (400, 404, 409)
    return not isinstance(error, OSError | ImportError)  # an import may meet one that another thread has begun
