"""The trials of a search that have not ended: asked of the controller, given to workers. Does not know Ray.

    while pack := queue.next_pack():           # without packs: [trial], the next one
        queue.on_event(trial, event)           # run it, and report
        queue.release(pack)                    # those that go on wait for their next pack

              next_pack               on_event: it has ended
    WAITING -------------> RUNNING -------------------------> gone
       ^                   |   ^
       |     on_crash      |   |  next_pack
       +-------------------+   |
                           v   |
                  release  RESTING

A trial whose shape does not fit waits for the next pack, so at most one pack's trials are ever asked for ahead of
results. After a crash each trial of a pack goes on alone, so that a poisonous one takes no other along again.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

from erpe.config import TrialConfig
from erpe.execution.fair_share import TrialController
from erpe.execution.trial_loop import TrialEvent
from erpe.study.records import TrialRecord

OWN = (
    "seed", "model.dropout", "model.drop_path", "train.epochs", "train.lr", "train.weight_decay", "train.warmup",
    "train.label_smoothing", "train.clip_norm", "train.ema", "train.redraw",
)  # fmt: skip
"""Settings that trials of one shape may each have for themselves; see `erpe.training.batched`."""


def shape(config: TrialConfig) -> dict[str, Any]:
    """Return what trials must have in common to be trained as one program."""
    return {name: value for name, value in config.flat().items() if name not in OWN}


class State(Enum):
    """Of a trial that has not ended."""

    WAITING = "not begun, or its worker crashed"
    RUNNING = "in a pack"
    RESTING = "left over from a pack"


@dataclass(eq=False)
class _Entry:
    trial: TrialRecord
    shape: dict[str, Any] | None
    """What trials beside it have, too; None: it runs alone."""
    state: State = State.WAITING

    def fits(self, other: _Entry) -> bool:
        return self.shape is not None and self.shape == other.shape


class TrialQueue:
    """Hands out a controller's trials by the pack, and passes on what becomes of them.

    Args:
        size: most trials of a pack, which are of one shape and train as one program.
    """

    def __init__(self, controller: TrialController, size: int = 1) -> None:
        self._controller, self._size = controller, size
        self._entries: dict[str, _Entry] = {}  # by uid, in the order of asking

    @property
    def running(self) -> bool:
        """Whether a worker has any of them, which may yet come back."""
        return any(entry.state is State.RUNNING for entry in self._entries.values())

    def next_pack(self) -> list[TrialRecord]:
        """Return the next pack: trials that rest before those that wait; empty if there is nothing to run.

        A new pack is of one arm. A place that became free in an old one goes to the arm whose turn it is.
        """
        ready = [entry for state in (State.RESTING, State.WAITING) for entry in self._in(state)]
        first = ready[0] if ready else self._ask()
        if first is None:
            return []
        pack = [first, *filter(first.fits, ready[1:])][: self._size]
        beside = first.trial if first.state is State.WAITING else None
        while first.shape and len(pack) + sum(each not in pack for each in self._in(State.WAITING)) < self._size:
            found = self._ask(beside)
            if found is None:
                break
            if first.fits(found):
                pack.append(found)
        for entry in pack:
            entry.state = State.RUNNING
        return [entry.trial for entry in pack]

    def on_event(self, trial: TrialRecord, event: TrialEvent) -> bool:
        """Record what a worker says; whether the trial goes on. See `StudyController.on_trial_result`."""
        goes_on = self._controller.on_trial_result(trial, event)
        if not goes_on:
            del self._entries[trial.uid]
        return goes_on

    def on_crash(self, pack: list[TrialRecord], reason: str) -> None:
        """Record that a pack's worker died; each of its trials that may be tried again waits."""
        for trial in pack:
            if self._controller.on_trial_error(trial, reason):
                self._entries[trial.uid] = _Entry(trial, None)
            else:
                del self._entries[trial.uid]

    def release(self, pack: list[TrialRecord]) -> None:
        """Take back what is left of a pack."""
        for trial in pack:
            if trial.uid in self._entries:
                self._entries[trial.uid].state = State.RESTING

    def _in(self, state: State) -> list[_Entry]:
        return [entry for entry in self._entries.values() if entry.state is state]

    def _ask(self, beside: TrialRecord | None = None) -> _Entry | None:
        trial = self._controller.next_trial(beside)
        if trial is None:
            return None
        alone = self._size == 1 or trial.config.train.compile == "on"
        entry = self._entries[trial.uid] = _Entry(trial, None if alone else shape(trial.config))
        return entry
