"""Which trials run together in one worker: trials of one shape, up to the size of a pack. Does not know Ray."""

from __future__ import annotations

from typing import Any, Protocol

from erpe.config import TrialConfig
from erpe.study.records import TrialRecord

OWN = (
    "seed", "model.dropout", "model.drop_path", "train.epochs", "train.lr", "train.weight_decay", "train.warmup",
    "train.label_smoothing", "train.clip_norm", "train.ema", "train.redraw",
)  # fmt: skip
"""Settings that trials of one shape may each have for themselves; see `erpe.training.batched`."""


def shape(config: TrialConfig) -> dict[str, Any]:
    """Return what trials must have in common to be trained as one program."""
    return {name: value for name, value in config.flat().items() if name not in OWN}


class Hands(Protocol):
    """Hands out trials."""

    def next_trial(self, beside: TrialRecord | None = None) -> TrialRecord | None:
        """Return a trial to run; see `FairShareController.next_trial`."""


class Packs:
    """Hands out trials by the pack.

    A trial whose shape does not fit waits for the next pack, so at most one pack's trials are ever asked for ahead
    of results. A place that becomes free is given to a trial of that shape, as long as no other one waits.
    """

    def __init__(self, hands: Hands, most: int) -> None:
        self._hands, self.most = hands, most
        self._waiting: list[TrialRecord] = []
        self._resting: list[list[TrialRecord]] = []
        self._apart: set[str] = set()

    @property
    def left(self) -> bool:
        """Whether trials that were handed out wait here."""
        return bool(self._waiting or self._resting)

    def next_pack(self) -> list[TrialRecord]:
        """Return the next pack.

        One that rests, with trials that join it, or a new one; empty if there is nothing to run.
        """
        members = self._resting.pop(0) if self._resting else []
        return members + self.join(members)

    def join(self, members: list[TrialRecord]) -> list[TrialRecord]:
        """Trials that join these now; a new pack if none are given."""
        if members:
            group, beside = list(members), None
        else:
            first = self._waiting.pop(0) if self._waiting else self._hands.next_trial()
            if first is None:
                return []
            group = [first]
            beside = first
        for trial in [trial for trial in self._waiting if self._fits(group, trial)][: self.most - len(group)]:
            self._waiting.remove(trial)
            group.append(trial)
        while self._room(group, beside):
            found = self._hands.next_trial(beside)
            if found is None:
                break
            (group if self._fits(group, found) else self._waiting).append(found)
        return group[len(members) :]

    def rest(self, members: list[TrialRecord]) -> None:
        """Keep what is left of a pack, for a worker to continue."""
        if members:
            self._resting.append(members)

    def apart(self, trials: list[TrialRecord]) -> None:
        """Trials whose worker crashed: each goes on alone, so that a poisonous one takes no other along again."""
        self._apart.update(trial.uid for trial in trials)
        self._waiting = trials + self._waiting

    def _fits(self, group: list[TrialRecord], trial: TrialRecord) -> bool:
        alone = any(each.uid in self._apart or each.config.train.compile == "on" for each in (*group, trial))
        return not alone and shape(trial.config) == shape(group[0].config)

    def _room(self, group: list[TrialRecord], beside: TrialRecord | None) -> bool:
        if any(each.uid in self._apart for each in group):
            return False
        return len(group) + len(self._waiting) < self.most if beside else len(group) < self.most and not self._waiting
