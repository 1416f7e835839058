"""Which trials of a study go and which stay. Nothing is removed in here, and nothing read."""

from __future__ import annotations

import math
from datetime import datetime, timedelta
from typing import NamedTuple

from erpe.errors import ConfigError
from erpe.study.records import BEST, CONFIRMED, OTHER, REGISTERED, UNFINISHED, StudyRecord, TrialRecord, irreplaceable


class Policy(NamedTuple):
    """What to give up: trials that ended and that every given condition names. Each condition spares more."""

    keep_best: int | None = None
    """Number of trials of every study to spare, those of the highest values; default: one."""
    older_than: float | None = None
    """Only trials that ended this number of days ago."""
    failed: bool = False
    """Only trials that failed."""

    @property
    def asks(self) -> bool:
        """Whether there is any condition; without one nothing goes."""
        return self.keep_best is not None or self.older_than is not None or self.failed

    def check(self) -> None:
        """Make sure that the numbers make sense.

        Raises:
            ConfigError: they do not.
        """
        if self.keep_best is not None and self.keep_best < 1:
            raise ConfigError(f"keep best: {self.keep_best} given; use 1 or more instead, the best trial always stays")
        if self.older_than is not None and not 0 <= self.older_than < math.inf:
            raise ConfigError(f"older than: {self.older_than} days given; use a finite number from 0 on instead")

    def names(self, trial: TrialRecord, now: datetime) -> bool:
        """Whether it asks for a trial that ended."""
        if self.failed and trial.state != "FAIL":
            return False
        if self.older_than is None:
            return self.asks
        return trial.ended is not None and (now - trial.ended) / timedelta(days=1) > self.older_than


class Fate(NamedTuple):
    """What becomes of the trials of a study that have not been removed."""

    going: list[TrialRecord]
    staying: dict[str, list[int]]
    """Why -> numbers."""


def decide(study: StudyRecord, policy: Policy, registered: set[str], now: datetime) -> Fate:
    """Apply a policy to a study.

    Args:
        registered: uids of trials whose model is registered.
        now: local time, as Optuna notes it.
    """
    going: list[TrialRecord] = []
    staying: dict[str, list[int]] = {why: [] for why in (BEST, REGISTERED, CONFIRMED, UNFINISHED, OTHER)}
    spared = irreplaceable(study, policy.keep_best or 1)
    for trial in study.trials:
        if trial.removed:
            continue
        why = spared.get(trial.number) or (REGISTERED if trial.uid in registered else "")
        if why or not policy.names(trial, now):
            staying[why or OTHER].append(trial.number)
        else:
            going.append(trial)
    return Fate(going, {why: numbers for why, numbers in staying.items() if numbers})
