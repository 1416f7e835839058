"""Run a search in this process, for a machine without Ray."""

from __future__ import annotations

import traceback

from erpe.execution.controller import TrialController
from erpe.execution.packing import Packs
from erpe.execution.trial_loop import PackRunner, TrialFactory
from erpe.study.records import TrialRecord


def run_inline(controller: TrialController, start: TrialFactory, pack: int = 1) -> None:
    """Run the search in this process, one pack of trials after the other: for a machine without Ray.

    Args:
        pack: trials of one shape that train as one program; one that ends makes room for another.
    Raises:
        ErpeError: see `StudyController.on_trial_result`.
    """
    packs, together = Packs(controller, pack), PackRunner(start)
    trials: dict[str, TrialRecord] = {}
    while True:
        for trial in packs.join(list(trials.values())):
            trials[trial.uid] = trial
            together.add(trial.uid, trial.config, controller.folder(trial))
        if not trials:
            return
        packs.apart(_round(controller, together, trials))


def _round(controller: TrialController, together: PackRunner, trials: dict[str, TrialRecord]) -> list[TrialRecord]:
    """Handle one event of each trial and drop those that end; return the trials to run again after a crash."""
    events = together.round()
    while True:
        try:
            uid, event = next(events)
        except StopIteration:
            return []
        except Exception:
            reason, crashed = traceback.format_exc(), list(trials.values())
            for trial in crashed:
                together.drop(trial.uid)
            trials.clear()
            return [trial for trial in crashed if controller.on_trial_error(trial, reason)]
        if not controller.on_trial_result(trials[uid], event):
            together.drop(uid)
            del trials[uid]
