"""Run a search in this process, for a machine without Ray."""

from __future__ import annotations

import traceback

from erpe.execution.fair_share import TrialController
from erpe.execution.trial_loop import PackRunner, TrialFactory
from erpe.execution.trial_queue import TrialQueue


def run_inline(controller: TrialController, start: TrialFactory, size: int = 1) -> None:
    """Run the search in this process: the next trial, an epoch of it, a report.

    Args:
        size: trials of one shape that train as one program; one that ends makes room for another.
    Raises:
        ErpeError: see `StudyController.on_trial_result`.
    """
    queue, runner = TrialQueue(controller, size), PackRunner(start)
    while pack := queue.next_pack():
        runner.hold({trial.uid: (trial.config, controller.folder(trial)) for trial in pack})
        try:
            events = runner.round()
        except Exception:
            runner.hold({})
            queue.on_crash(pack, traceback.format_exc())
            continue
        for trial in pack:
            if trial.uid in events:
                queue.on_event(trial, events[trial.uid])
        queue.release(pack)
