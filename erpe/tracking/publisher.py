"""Brings MLflow to what a study holds, in bounded memory, one process at a time.

Each step compares what should be there with what is there, and makes the calls that are left. A call that is made twice
changes nothing, so a kill anywhere costs a comparison.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from filelock import FileLock, Timeout

from erpe.errors import ErpeError
from erpe.store import Store
from erpe.study.records import StudyRecord
from erpe.text import first_line, redact
from erpe.tracking.connection import examine
from erpe.tracking.cursor import Cursor, fingerprint
from erpe.tracking.image import RunImage, desired
from erpe.tracking.marks import GONE, Mark

if TYPE_CHECKING:
    from erpe.tracking.mlflow_calls import Experiment

_ATTEMPTS = 3
"""So often is tried what a healthy server will not take."""


class Repaired(NamedTuple):
    """Runs that MLflow had confirmed and had not any more, and which are sent again."""

    missing: int = 0
    """Were not there at all."""
    short: int = 0
    """Lacked something, or were in another state."""


class Publisher:
    """Publishes one study to the server that the store names."""

    def __init__(self, store: Store, study: str, read: Callable[[], list[StudyRecord]]) -> None:
        """Publish nothing yet.

        Args:
            read: returns all parts of the study as they stand.
        """
        self.store, self.study = store, study
        self.problem: str | None = None
        """What the user must repair; None while the server is only down."""
        self.repaired = Repaired()
        """What MLflow had lost of what it had."""
        self.stop = threading.Event()
        """Set by others: a step ends after the run that it is at."""
        self.cursor = Cursor(store, study)
        self._read = read
        self._experiment: Experiment | None = None
        self._shown: dict[str, RunImage] = {}
        """What is known to be there of runs that have not ended."""
        self._look = self._sent = self._begun = False  # begun: a server that is down is asked before more is read
        self._failures: Counter[str] = Counter()
        self._refused: dict[str, str] = {}
        self._lock = FileLock(self.cursor.path.with_suffix(".lock"), thread_local=False)

    def close(self) -> None:
        """Let another process publish."""
        self._lock.release(force=True)

    def step(self, running: bool, last: bool = False) -> bool:
        """Bring MLflow to where the study is; whether it is there.

        The first step, and one after a failure, looks at all that is there.

        Args:
            running: whether a driver is at work on the study.
            last: look once more if anything was sent.
        """
        at = ""
        try:
            if not self._lock.is_locked:
                self._lock.acquire(timeout=0)
                self.cursor = Cursor(self.store, self.study)  # another process may have been first
            self._begun = self._begun or bool(self._read())
            if not self._begun:
                return True
            self._look = self._experiment is None
            if not (experiment := self._experiment or self._open()):
                return False
            try:
                for image in desired(self._read(), self.store, running, self._is_known):
                    if self.stop.is_set():
                        return False
                    at = image.uid
                    self._bring(image, experiment)
                at = ""
            finally:
                self.cursor.write()
            self._shown = {uid: shown for uid, shown in self._shown.items() if not shown.ended}
            if last and self._sent:
                self._experiment, self._sent = None, False
                return self.step(running)
            uid, why = next(iter(self._refused.items()), ("", ""))
            self.problem = f"MLflow refuses {len(self._refused)} run(s) of {self.study}; {uid}: {why}" if uid else None
            return not self._refused
        except Timeout:
            pass  # another process publishes
        except ErpeError as error:
            self.problem = str(error)
        except Exception as error:
            self._judge(error, at)
        self._experiment = None
        return False

    def _open(self) -> Experiment | None:
        """Look at all that MLflow has of the study; None: it does not answer."""
        if not self._is_well():  # a server that is not MLflow may say yes to everything
            return None
        from erpe.tracking.mlflow_calls import Experiment

        experiment = Experiment(self.store, self.study)
        self._shown = experiment.observe()
        self.cursor.begin_look()
        self._experiment = experiment
        return experiment

    def _is_known(self, uid: str, mark: Mark) -> bool:
        """Whether nothing is to be done for a run; a look also asks that it shows what it showed when it was whole."""
        known = self.cursor.runs.get(uid) == mark
        if known and self._look:
            shown = self._shown.get(uid)
            gone = mark.state == GONE and (shown is None or shown.deleted)  # a server keeps its row
            known = gone or self.cursor.whole.get(uid) == fingerprint(shown)
        return known or uid in self._refused

    def _bring(self, want: RunImage, experiment: Experiment) -> None:
        """Make the calls that one run needs, and its parent if it is not there."""
        from erpe.tracking.comparison import diff, read_points

        before, missing = self.cursor.runs.get(want.uid), want.uid not in self._shown
        shown = self._shown.get(want.uid) or experiment.find(want.uid)
        calls = diff(want, read_points(experiment.client, want, shown))
        if want.above and want.parent not in experiment.runs:
            calls = diff(want.above, None) + calls
        for call in calls:
            getattr(experiment, call.what)(call)
        if self._look and calls and before and want.state != GONE and (missing or before == want.mark):
            self.repaired = Repaired(self.repaired.missing + missing, self.repaired.short + (not missing))
        if self._look and not calls and shown:
            self.cursor.whole[want.uid] = fingerprint(shown)
        self._sent = self._sent or bool(calls)
        self.cursor.runs[want.uid] = want.mark
        self._shown[want.uid] = want._replace(run=experiment.runs.get(want.uid, ""), status="RUNNING")

    def _judge(self, error: Exception, uid: str) -> None:
        """Wait for a server that is down; of what a healthy one will not take, set a run apart, or name the problem."""
        if not self._is_well():
            return
        self._failures[uid] += 1
        if self._failures[uid] >= _ATTEMPTS:
            said = redact(first_line(error))
            if uid and _is_definite(error):
                self._refused[uid] = said
            else:
                self.problem = f"{self.store.destination}: {said}"

    def _is_well(self) -> bool:
        if (health := examine(self.store.tracking_uri)).state == "well":
            return True
        self.problem = None if health.state == "down" else health.line
        return False


def is_shown(store: Store, study: str, members: list[StudyRecord]) -> bool:
    """Whether MLflow's database is as it was left, with all of a study in it: then nobody needs to look.

    Raises:
        StoreError: another version of erpe wrote a study.
    """
    cursor = Cursor(store, study)
    lacking = desired(members, store, False, lambda uid, mark: cursor.runs.get(uid) == mark)
    return cursor.is_last_word() and next(lacking, None) is None


def _is_definite(error: Exception) -> bool:
    """Whether trying again is of no use: MLflow says that the request is wrong, or we have a bug."""
    from mlflow.exceptions import MlflowException

    if isinstance(error, MlflowException):
        return error.get_http_status_code() in (400, 404, 409)
    return not isinstance(error, OSError | ImportError)  # an import may meet one that another thread has begun
