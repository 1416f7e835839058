"""`tune`: from a specification to a tuned and tested model, as often as the command is given.

    result = tune(define("relu_general", "digits"), Store.open("runs"), trials=6)

The same call continues the same study: after the end (nothing is left to do), after Ctrl-C, after a kill.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Unpack

from erpe.checkpoints import checked_out
from erpe.config import TrialConfig
from erpe.errors import ConfigError
from erpe.execution.callbacks import Progress
from erpe.execution.controller import StudyController
from erpe.execution.executors import How, Workers
from erpe.execution.objective import Objective
from erpe.execution.signals import interruptible
from erpe.search.ready import prepare
from erpe.store import Store
from erpe.study.backup import backed_up
from erpe.study.objectives import check_limits
from erpe.study.session import StudySession
from erpe.study.spec import StudySpec
from erpe.study.starting_points import NOTHING, Start
from erpe.tracking.study_tags import study_tags


@dataclass(frozen=True)
class TuneResult:
    """How a study stands when `tune` returns."""

    study: str
    """Its name."""
    counts: dict[str, int]
    """Trials by state: COMPLETE, PRUNED, FAIL, RUNNING (to be continued)."""
    best: int | None
    """Number of the complete trial with the highest value, within the limits of cost; there is none: None."""
    value: float | None
    """Its first objective: by default the validation accuracy."""
    config: TrialConfig | None
    metrics: dict[str, float]
    """Its measures on the validation part."""
    test: dict[str, float] | None
    """Its measures on the test split, opened once when all trials were done."""
    folder: Path | None
    """Its checkpoint and results."""
    reasons: dict[int, str]
    """Number of a trial that failed, or is above a limit of cost -> why."""
    refused: int
    """Draws that were not trained, as they would have cost too much."""
    front: dict[int, dict[str, float]]
    """Of several objectives: number of a trial that no other one dominates -> its objectives."""
    interrupted: bool
    """Ctrl-C ended the search early; the same command continues it."""
    lag: int
    """Changes that MLflow does not show yet; the store has them."""
    problem: str | None
    """Why MLflow does not get them, where waiting does not help."""
    seconds: float
    finished: datetime | None
    """When the study had ended already before this call, which then trained nothing; None: it had not."""


@backed_up
def tune(
    spec: StudySpec, store: Store, *, trials: int, name: str | None = None, new: bool = False, start: Start = NOTHING,
    progress: Progress | None = None, work: Objective | None = None, **how: Unpack[How],
) -> TuneResult:  # fmt: skip
    """Search until `trials` trials are done, then test the best one.

    Args:
        trials: of the whole study; those of earlier calls count.
        name: of the study; default: DATASET-VARIANT.
        new: another study, beside the ones of this name.
        start: what a new study begins with.
        work: what a trial is; default: train a Vision Transformer.
        how: where trials run, see `ResourceRequest`.
    Raises:
        ConfigError: numbers that make no sense, or a GPU that is not there.
        StudyError: the study of this name has other settings, or is being run by someone else.
        DataError, StoreError: the data or the store cannot be used; trials stay as they are.
        KeyboardInterrupt: the second Ctrl-C. Checkpoints of finished epochs are safe.
    """
    from erpe.tracking.provenance import made_with
    from erpe.tracking.tracker import Tracker

    began = time.monotonic()
    if trials < (least := max(1, len(start.points))):
        raise ConfigError(f"trials: {trials} given; use {least} or more instead")
    where, work, remote, tags = prepare("erpe tune", spec.base.data.dataset, store, spec.goals.timed, work, how)
    check_limits(spec)
    progress = progress or Progress()
    with contextlib.ExitStack() as opened:
        session = opened.enter_context(
            StudySession.open(store, spec, trials=trials, name=name, new=new, made_with=made_with(tags), start=start)
        )
        for note in _notes(session, start):
            progress.on_warning(note)
        tags |= study_tags(spec, session.name, None)
        tracker = Tracker(store, session.name)
        opened.callback(tracker.close, 1)  # after an error, too
        controller = StudyController(session, spec, tracker, store, trials, progress, tags, remote=remote)
        opened.enter_context(interruptible(controller.draining, progress))
        finished = None if _left(session, trials) else session.read().ended
        if not finished:
            progress.on_phase("data")
            work.prepare()
            session.record_tags(tags)
            tracker.tell(session.name)
            if not controller.draining.is_set():  # workers take a while to start
                with where.workers(trials, store, session.name, remote, progress, controller.draining) as workers:
                    tags["device"] = workers.device
                    _run(controller, work, workers)
        return _close(controller, began, finished)


def _notes(session: StudySession, start: Start) -> Iterator[str]:
    """Say what becomes of the starting points, and what a run that is repeated was made with."""
    if start.points and session.points != list(start.points):
        yield f"study {session.name} had begun before: it keeps its own starting points"
    if not session.read().trials:
        yield from start.notes


def _left(session: StudySession, trials: int) -> bool:
    """Whether there are trials to run or to continue, or a best one to test."""
    study = session.read()
    untested = study.best is not None and study.best.number not in study.finals
    return untested or len(study.trials) < trials or study.counts["RUNNING"] > 0


def _run(controller: StudyController, work: Objective, workers: Workers) -> None:
    """Search; then the best trial meets the test split, once."""
    controller.progress.on_phase("search")
    workers.search(controller, work.start)
    study = controller.session.read()
    if controller.draining.is_set() or study.best is None or study.best.number in study.finals:
        return
    controller.progress.on_phase("test")
    best = study.best
    folder = controller.folder(best)
    with checked_out(controller.remote, folder):
        tested = workers.call(work.evaluate, folder)
    controller.session.record_final(best.number, tested)


def _close(controller: StudyController, began: float, finished: datetime | None) -> TuneResult:
    """Tell the tracker how the study ends, or pauses, and sum up."""
    session, tracker = controller.session, controller.tracker
    study = session.read()
    best, over = study.best, not _left(session, controller.budget)
    test = study.finals.get(best.number) if best else None
    tracker.tell(study.name)
    controller.progress.on_phase("tracking")
    lag = tracker.close(30 if over else 5, controller.draining)
    return TuneResult(
        study=study.name,
        counts=dict(study.counts),
        best=best.number if best else None,
        value=best.value if best else None,
        config=best.config if best else None,
        metrics=(best.verdict.metrics if best and best.verdict else {}) | (test or {}),
        test=test,
        folder=controller.folder(best) if best else None,
        reasons=study.reasons,
        refused=study.refused,
        front=study.front,
        interrupted=not over,
        lag=lag,
        problem=tracker.problem,
        seconds=time.monotonic() - began,
        finished=finished,
    )
