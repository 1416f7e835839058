"""What a trial and an epoch cost beside their training: Optuna's session, tracker, MLflow and Ray, one on the other.

Trials train nothing here. Two studies of every stack tell them apart: the trials of one have an epoch, those of the
other `EPOCHS` more.
"""

from __future__ import annotations

import contextlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from erpe.bench.timing import machine
from erpe.config import TrialConfig
from erpe.execution.callbacks import Progress, TrialProgress
from erpe.execution.controller import StudyController
from erpe.execution.executors import InProcess, ResourceRequest, Workers, on_ray
from erpe.execution.trial_loop import play
from erpe.store import Store, sqlite_url
from erpe.study.session import StudySession
from erpe.study.spec import define
from erpe.tracking.study_tags import study_tags
from erpe.tracking.tracker import Tracker

TRIALS = 6
"""Of a study; the first one warms up."""

EPOCHS = 60
DRAIN_SECONDS = 60.0


class Empty:
    """A training that trains nothing."""

    warning: str | None = None

    def __init__(self, config: TrialConfig, folder: Path) -> None:
        self.config = config
        self.history: list[dict[str, float]] = []

    @staticmethod
    def ahead(trainings: list[Any]) -> None:
        """There is nothing to share."""

    def epoch(self) -> dict[str, float]:
        """As many measures as a real epoch has."""
        names = ("train/loss", "val/loss", "val/accuracy", "lr", "time/epoch_seconds")
        self.history.append({"epoch": float(len(self.history) + 1)} | dict.fromkeys(names, 0.5))
        return self.history[-1]

    def settle(self) -> None:
        """Nothing is written."""

    def finish(self) -> dict[str, float]:
        """One measure."""
        return {"val/accuracy": 0.5}


class NoTracker:
    """A tracker that records nothing."""

    def start_trial(self, *_: Any, **__: Any) -> None:
        """Nothing."""

    tell = epoch = end_trial = start_trial

    def lag(self) -> int:
        """Nothing waits."""
        return 0

    def close(self, timeout: float) -> int:
        """Nothing is left."""
        return 0


@dataclass(frozen=True)
class Own(Store):
    """A store with its own databases, whatever the environment names."""

    @property
    def storage_url(self) -> str:
        """See `Store`."""
        return sqlite_url(self.root / "optuna.db")

    @property
    def tracking_uri(self) -> str:
        """See `Store`."""
        return sqlite_url(self.root / "mlflow.db")


class Spent(NamedTuple):
    """Milliseconds a trial."""

    wall: float
    """From the end of the first trial to that of the last."""
    cpu: float
    """Processor time of this process for the same, until MLflow has everything."""


Stack = Callable[[str, int], Spent]
"""Plays a study of this name, whose trials have that number of epochs."""


class Watch(Progress):
    """Notes the end of the first trial, when MLflow has all of it, and of the last."""

    def __init__(self, tracker: Any, sent: bool) -> None:
        self._tracker, self._sent, self._count = tracker, sent, 0
        self._began = self._ended = (0.0, 0.0)

    def on_end(self, moment: TrialProgress) -> None:
        """Record that a trial is complete."""
        self._count += 1
        if self._count == 1:
            until = time.monotonic() + DRAIN_SECONDS
            while self._sent and self._tracker.lag() and time.monotonic() < until:
                time.sleep(0.01)
            self._began = time.perf_counter(), time.process_time()
        self._ended = time.perf_counter(), 0.0

    def spent(self) -> Spent:
        """Of all trials but the first; the tracker has been closed."""
        wall, cpu = self._ended[0] - self._began[0], time.process_time() - self._began[1]
        return Spent(1000 * wall / (self._count - 1), 1000 * cpu / (self._count - 1))


def bare(name: str, epochs: int) -> Spent:
    """Trials one after the other; nothing is shown."""
    config = define("relu", "digits", epochs=epochs).base
    watch = Watch(NoTracker(), False)
    for _ in range(TRIALS):
        for _ in play(config, Path(name), Empty):
            pass
        watch.on_end(TrialProgress("", "search", 0, "COMPLETE", 0, 0, None, None, config, {}, 0, None, 0))
    return watch.spent()


def conducted(store: Store, track: Callable[[str], Any], workers: Workers, sent: bool = False) -> Stack:
    """Run a study as `tune` does.

    Args:
        track: name of the study -> its tracker.
        workers: where trials run.
        sent: whether the tracker sends.
    """

    def stack(name: str, epochs: int) -> Spent:
        spec, tracker = define("relu", "digits", epochs=epochs), track(name)
        watch = Watch(tracker, sent)
        with StudySession.open(store, spec, name=name) as session:
            tags = study_tags(spec, name, None)
            session.record_tags(tags)
            workers.search(StudyController(session, spec, tracker, store, TRIALS, watch, tags), Empty)
            tracker.close(DRAIN_SECONDS)
            return watch.spent()

    return stack


@contextlib.contextmanager
def stacks() -> Iterator[dict[str, Stack]]:
    """Name -> stack, each with what the one before has, and one thing more."""
    with tempfile.TemporaryDirectory() as folder:
        store, here = Own(Store.open(folder).root), InProcess(ResourceRequest())
        with on_ray(ResourceRequest(concurrency=1), TRIALS, store.root / "ray") as ray:
            yield {
                "bare loop": bare,
                "+ Optuna": conducted(store, lambda name: NoTracker(), here),
                "+ tracker": conducted(store, lambda name: Tracker(store, name, send=False), here),
                "+ MLflow": conducted(store, lambda name: Tracker(store, name), here, sent=True),
                "+ Ray": conducted(store, lambda name: Tracker(store, name), ray, sent=True),
            }


def bench_overhead(*, rounds: int = 5) -> dict[str, Any]:
    """Milliseconds of a trial of one epoch, and of each further epoch, in interleaved rounds.

    Returns:
        `machine`, and a row a stack: `name`; `trial_ms` and `epoch_ms`, medians over the rounds, each with its `_low`
        and `_high`; `trial_cpu_ms` and `epoch_cpu_ms`, of processor time of this process; `n` rounds.
    """
    found: dict[str, list[dict[str, float]]] = {}
    with stacks() as all_of_them:
        for turn in range(rounds + 1):  # the first imports what is imported late
            for place, (name, stack) in enumerate(all_of_them.items()):
                short, long = (stack(f"bench-{turn}-{place}-{epochs}", epochs) for epochs in (1, 1 + EPOCHS))
                found.setdefault(name, []).append(
                    {
                        "trial": short.wall, "epoch": (long.wall - short.wall) / EPOCHS,
                        "trial_cpu": short.cpu, "epoch_cpu": (long.cpu - short.cpu) / EPOCHS,
                    }
                )  # fmt: skip
    rows = [{"name": name} | _summary(counted[1:]) for name, counted in found.items()]
    return {"machine": machine(torch.device("cpu")) | {"trials": TRIALS, "epochs": EPOCHS}, "rows": rows}


def _summary(rounds: list[dict[str, float]]) -> dict[str, float]:
    summary: dict[str, float] = {}
    for name in ("trial", "epoch", "trial_cpu", "epoch_cpu"):
        values = [each[name] for each in rounds]
        summary |= {f"{name}_ms": statistics.median(values)}
        summary |= {} if name.endswith("cpu") else {f"{name}_ms_low": min(values), f"{name}_ms_high": max(values)}
    return summary | {"n": len(rounds)}
