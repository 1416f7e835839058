"""Several controllers as one: the arms of a study take turns, so that a study stopped halfway is half done for all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from erpe.execution.controller import StudyController
from erpe.execution.trial_loop import TrialEvent
from erpe.study.records import StudyRecord, TrialRecord


@dataclass(frozen=True)
class Budget:
    """What an arm may spend: a number of trials, or an amount of something that trials cost."""

    trials: int
    """How many, where no amount is given."""
    amount: float | None = None
    """In the unit of `cost`; trials are started until it is spent."""
    cost: Callable[[TrialRecord, int], float] = lambda trial, epochs: float(epochs)
    """Cost of a number of epochs of a trial."""

    def share(self, study: StudyRecord) -> float:
        """Return the part of the budget that is used; a running trial counts as a whole one."""
        if self.amount is None:
            return len(study.trials) / self.trials
        return sum(self._used(trial) for trial in study.trials) / self.amount

    def allowed(self, study: StudyRecord) -> int:
        """How many trials the arm may have by now."""
        if self.amount is None:
            return self.trials
        return len(study.trials) + (self.share(study) < 1)

    def _used(self, trial: TrialRecord) -> float:
        # A trial that failed at once costs something too, or a space of failures would never end.
        epochs = trial.config.train.epochs if trial.state == "RUNNING" else max(1, len(trial.epochs))
        return self.cost(trial, epochs)


@dataclass
class FairShareController:
    """Hands out the next trial of the arm that has used the least of its budget."""

    controllers: list[StudyController]
    budgets: list[Budget]
    _whose: dict[str, StudyController] = field(default_factory=dict)

    def left(self) -> bool:
        """Whether an arm has something to run."""
        return any(
            controller.study().counts["RUNNING"] or len(controller.study().trials) < budget.allowed(controller.study())
            for controller, budget in zip(self.controllers, self.budgets, strict=True)
        )

    def next_trial(self, beside: TrialRecord | None = None) -> TrialRecord | None:
        """Return a trial to run; None when all budgets are used, or when draining.

        Args:
            beside: a trial it should run beside; then only its arm has a turn.
        """
        arms = sorted(
            zip(self.controllers, self.budgets, strict=True), key=lambda arm: arm[1].share(arm[0].study())
        )  # stable: of equals the first of the table
        if beside:
            arms = [arm for arm in arms if arm[0] is self._whose[beside.uid]]
        for controller, budget in arms:
            controller.budget = budget.allowed(controller.study())
            trial = controller.next_trial()
            if trial is not None:
                self._whose[trial.uid] = controller
                return trial
        return None

    def on_trial_result(self, trial: TrialRecord, event: TrialEvent) -> bool:
        """See `StudyController.on_trial_result`."""
        return self._whose[trial.uid].on_trial_result(trial, event)

    def on_trial_error(self, trial: TrialRecord, reason: str) -> bool:
        """See `StudyController.on_trial_error`."""
        return self._whose[trial.uid].on_trial_error(trial, reason)

    def folder(self, trial: TrialRecord) -> Path:
        """See `StudyController.folder`."""
        return self._whose[trial.uid].folder(trial)


TrialController = StudyController | FairShareController
"""What an executor runs trials for."""
