"""What the events of an outbox tell of a run: whether one more is news, and what MLflow should show of it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

from erpe.settings import flatten
from erpe.tracking.outbox import Event


class MetricPoint(NamedTuple):
    """A measure of a run as MLflow shows it: that of the highest step, and of these the last."""

    step: int
    ts: int
    value: float


@dataclass
class RunState:
    """One run, event by event."""

    started: bool = False
    """Whether its start was told."""
    state: str = ""
    """RUNNING, or how it ended; None: unknown."""
    ended: int = 0
    """When, in milliseconds since 1970; of a trial the first time, of a study the last. None: not known exactly."""
    parent: str | None = None
    tags: set[str] = field(default_factory=set)
    params: set[str] = field(default_factory=set)
    steps: set[int] = field(default_factory=set)
    """Its epochs."""
    curves: Counter[str] = field(default_factory=Counter)
    """Measure -> epochs that have it."""
    latest: dict[str, MetricPoint] = field(default_factory=dict)
    told: dict[str, str] = field(default_factory=dict)
    """The last start and end. A trial starts and ends once; a study goes on after a pause."""

    @property
    def step(self) -> int:
        """The last epoch."""
        return max(self.steps, default=0)

    def observe(self, event: Event) -> None:
        """Take note of the next event."""
        for key in event.metrics.keys() - {"epoch"}:  # which is the step
            if key not in self.latest or (event.step, event.ts) >= self.latest[key][:2]:
                self.latest[key] = MetricPoint(event.step, event.ts, event.metrics[key])
        if event.kind == "epoch":
            self.steps.add(event.step)
            self.curves.update(event.metrics.keys() - {"epoch"})
            return
        if event.kind == "remove_trial":
            self.told[event.kind] = _essence(event)
            return
        if event.kind in ("start_study", "end_study") and not event.rebuilt:
            self.told.clear()
        self.told[event.kind] = _essence(event)
        if event.kind in ("end_trial", "end_study"):
            if event.kind == "end_study" or self.state in ("", "RUNNING"):
                self.ended = 0 if event.rebuilt else event.ts
            self.state = event.state or "COMPLETE"
        else:
            self._start(event)

    def _start(self, event: Event) -> None:
        self.started, self.parent = True, event.parent
        self.tags |= event.tags.keys()
        if event.kind == "start_trial":
            self.params |= flatten(event.config).keys()
        if not (event.rebuilt and self.state):  # a start that is told after its end
            self.state = "RUNNING"

    def covers(self, event: Event) -> bool:
        """Whether an event tells nothing new."""
        if event.kind == "epoch":
            return event.step in self.steps
        return self.told.get(event.kind) == _essence(event) and not self.news(event.metrics)

    def news(self, metrics: dict[str, float]) -> dict[str, float]:
        """Measures that differ."""
        return {
            key: value
            for key, value in metrics.items()
            if key not in self.latest or not same(self.latest[key].value, value)
        }


def same(one: float, other: float) -> bool:
    """Whether two measures are equal; NaN does not differ from NaN."""
    return repr(float(one)) == repr(float(other))


def _essence(event: Event) -> str:
    """Return the event without what the outbox adds, and without measures, which are compared one by one."""
    return event.model_dump_json(exclude={"seq", "ts", "step", "metrics", "rebuilt"})
