"""`run`: a whole study, from its file to confirmed, tested and timed models, as often as the command is given.

    run(load_plan("studies/digits_nine.toml"), Store.open("runs"))

1. Search: the arms take turns; only the validation part is seen. 2. Confirm: the best configuration of each arm,
with fresh seeds on the full training set; at the end of each such run the test split is opened, once. 3. Time: all
confirmed runs, interleaved, one after the other, when nothing else runs.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from threading import Event
from typing import Any, Unpack

from erpe.checkpoints import RemoteCheckpoints, checked_out
from erpe.errors import StudyError
from erpe.execution.callbacks import Progress
from erpe.execution.controller import StudyController
from erpe.execution.executors import How, Workers
from erpe.execution.fair_share import Budget, FairShareController
from erpe.execution.objective import Objective
from erpe.execution.signals import interruptible
from erpe.search.ready import prepare
from erpe.store import OUTCOME, Store
from erpe.study.backup import backed_up
from erpe.study.lookup import identified
from erpe.study.naming import search_name, seeds_stem
from erpe.study.objectives import Goals, check_limits
from erpe.study.openings import Openings, check_replacing, openings
from erpe.study.plan import Arm, Plan
from erpe.study.reading import read_studies
from erpe.study.records import ExperimentRef, StudyRecord, TrialRecord
from erpe.study.session import StudySession
from erpe.study.spec import StudySpec
from erpe.text import last_line
from erpe.tracking.provenance import made_with
from erpe.tracking.study_tags import study_tags

Started = Callable[[], Workers]
"""Starts the workers when it is called first."""


@dataclass(frozen=True)
class CampaignResult:
    """How a study stands when `run` returns."""

    study: str
    confirmed: dict[str, int]
    """Arm -> runs that are trained and tested."""
    failed: dict[str, str]
    """Arm without any complete trial -> why."""
    interrupted: bool
    """Ctrl-C ended it early; the same command continues it."""
    openings: Openings
    """How often the test set was opened for this study, ever."""
    lag: int
    """Changes that MLflow does not show yet; the store has them."""
    problem: str | None
    """Why MLflow does not get them, where waiting does not help."""
    seconds: float
    finished: datetime | None
    """When the study had ended already before this call, which then trained nothing; None: it had not."""
    page: Path | None = None
    """Its report, where one was written."""


@backed_up
def run(
    plan: Plan, store: Store, *, offline: bool = False, replace: bool = False, progress: Progress | None = None,
    work: Objective | None = None, **how: Unpack[How],
) -> CampaignResult:  # fmt: skip
    """Search, confirm and time every arm.

    Args:
        offline: needs no MLflow; what it should show waits in the store, for `erpe sync`.
        replace: accept that a changed file replaces results of the test set; more seeds never do.
        work: what a trial is; default: train a Vision Transformer.
        how: where trials run, see `ResourceRequest`.
    Raises:
        ConfigError: numbers that make no sense, or a GPU that is not there.
        StudyError: a study of this name has other settings, or results that would be replaced, or someone runs it.
        DataError, StoreError: the data or the store cannot be used; trials stay as they are.
        KeyboardInterrupt: the second Ctrl-C. Checkpoints of finished epochs are safe.
    """
    from erpe.tracking.tracker import Tracker

    began = time.monotonic()
    where, work, remote, tags = prepare("erpe study run", plan.dataset, store, Goals.of(plan.search).timed, work, how)
    progress, before = progress or Progress(), _members(store, plan)
    if replaced := check_replacing(plan, before, replace):
        progress.on_warning(replaced)
    arms = plan.arms()
    for arm in arms:
        check_limits(plan.search_spec(arm))
    with contextlib.ExitStack() as opened:
        tracker = Tracker(store, plan.name, send=not offline)
        opened.callback(tracker.close, 1)  # after an error, too
        campaign = _Campaign(plan, store, tracker, progress, tags, remote)
        searches = opened.enter_context(campaign.searches())
        opened.enter_context(interruptible(campaign.draining, progress))
        progress.on_phase("data")
        work.prepare()
        most = len(arms) * max(plan.search.trials, plan.confirm.seeds)
        started = functools.partial(where.workers, most, store, plan.name, remote, progress, campaign.draining)
        with contextlib.ExitStack() as working:
            workers = functools.cache(lambda: campaign.started(working.enter_context(started())))
            confirmed = campaign.play(searches, work, workers)
        if not offline:
            progress.on_phase("tracking")
        lag, after = 0 if offline else tracker.close(60, campaign.draining), _members(store, plan)
        return CampaignResult(
            plan.name, confirmed, campaign.failed, campaign.draining.is_set(),
            openings(after, [arm.name for arm in arms]), lag, tracker.problem, time.monotonic() - began,
            _finished(before, after),
        )  # fmt: skip


def _members(store: Store, plan: Plan) -> list[StudyRecord]:
    """Every search and confirmation of the study that was begun."""
    return [found for found in read_studies(store) if found.part_of and found.part_of.study == plan.name]


def _finished(before: list[StudyRecord], after: list[StudyRecord]) -> datetime | None:
    """When the last trial had ended, if nothing was done since; a study that Ctrl-C stopped at once had not."""
    if _work_of(before) != _work_of(after) or any(part.counts["RUNNING"] for part in after):
        return None
    return max(filter(None, (part.ended for part in before)), default=None)


def _work_of(parts: list[StudyRecord]) -> dict[str, tuple[int, int]]:
    """Map each part to its epochs and to its trials that were measured at the end: any work changes them."""
    return {part.name: (sum(len(trial.epochs) for trial in part.trials), len(part.finals)) for part in parts}


@dataclass
class _Campaign:
    plan: Plan
    store: Store
    tracker: Any
    progress: Progress
    tags: dict[str, str]
    remote: RemoteCheckpoints | None
    failed: dict[str, str] = field(default_factory=dict)
    draining: Event = field(default_factory=Event)
    """Set by Ctrl-C."""

    def started(self, workers: Workers) -> Workers:
        """Note what trials train on."""
        self.tags["device"] = workers.device
        return workers

    def play(self, searches: list[StudyController], work: Objective, workers: Started) -> dict[str, int]:
        """All three phases; those that are done are done. The number of confirmed runs of each arm."""
        self._take_turns(searches, [self._budget(c) for c in searches], "search", work.start, workers)
        self._tell(searches)
        if self.draining.is_set():
            return {}
        with self.confirmations(searches) as confirmations:
            seeds = [Budget(self.plan.confirm.seeds)] * len(confirmations)
            self._take_turns(confirmations, seeds, "confirm", work.confirm, workers)
            try:
                if not self.draining.is_set():
                    self._time(confirmations, work, workers)
            finally:
                self._tell(confirmations)  # now that the times are known, whose means it tells
            return {c.arm: c.study().counts["COMPLETE"] for c in confirmations}

    @contextlib.contextmanager
    def searches(self) -> Iterator[list[StudyController]]:
        """Every arm's search, leased."""
        specs = [(arm, self.plan.search_spec(arm), search_name(self.plan.name, arm.name)) for arm in self.plan.arms()]
        with contextlib.ExitStack() as opened:
            yield [self._open(opened, *each) for each in specs]

    @contextlib.contextmanager
    def confirmations(self, searches: list[StudyController]) -> Iterator[list[StudyController]]:
        """Yield the confirmation of every arm that has a best configuration, leased; another best is another study."""
        with contextlib.ExitStack() as opened:
            found = []
            for arm, search in zip(self.plan.arms(), searches, strict=True):
                best = search.session.read().best
                if best is None:
                    self.failed[arm.name] = _why(search)
                    continue
                spec = self.plan.confirm_spec(arm, best.config)
                name = identified(self.store, seeds_stem(self.plan.name, arm.name), spec)
                found.append(self._open(opened, arm, spec, name, best.number))
            yield found

    def _open(
        self, opened: contextlib.ExitStack, arm: Arm, spec: StudySpec, name: str, best: int | None = None
    ) -> StudyController:
        made = self.plan.model_dump(mode="json"), made_with(self.tags)
        part_of = ExperimentRef(self.plan.name, arm.name, spec.phase, *made, best)
        trials = self.plan.search.trials if spec.phase == "search" else self.plan.confirm.seeds
        session = opened.enter_context(StudySession.open(self.store, spec, trials=trials, name=name, part_of=part_of))
        tags = self.tags | study_tags(spec, name, part_of)
        return StudyController(
            session, spec, self.tracker, self.store, 0, self.progress, tags, arm.name, self.remote, self.draining
        )

    def _budget(self, search: StudyController) -> Budget:
        """Return what the search of an arm may spend; the same for all."""
        how, trials = self.plan.search, self.plan.search.trials
        if how.budget == "trials":
            return Budget(trials)
        if how.budget == "epochs":
            return Budget(trials, float(trials * search.spec.epochs))
        return Budget(trials, self.plan.flops_per_image(), flops_per_image)

    def _take_turns(
        self, controllers: list[StudyController], budgets: list[Budget], phase: str, start: Any, workers: Started
    ) -> None:
        """Run a phase to its end; the parents' runs are opened before it."""
        shared = FairShareController(controllers, budgets)
        if shared.left() and not self.draining.is_set():  # workers take a while to start
            workers()
            self.progress.on_phase(phase)
            for controller in controllers:
                controller.tags["device"] = self.tags["device"]
                controller.session.record_tags(controller.tags)
            self._tell(controllers)
        while shared.left() and not self.draining.is_set():  # pruned trials may have left some budget
            workers().search(shared, start)

    def _tell(self, controllers: list[StudyController]) -> None:
        """Tell the tracker how a phase stands for each arm."""
        for controller in controllers:
            self.tracker.tell(controller.session.name)

    def _time(self, confirmations: list[StudyController], work: Objective, workers: Started) -> None:
        """Time every confirmed run in one go, seed by seed, unless all are timed already."""
        runs = [(c, trial) for c in confirmations for trial in c.study().trials if trial.state == "COMPLETE"]
        runs.sort(key=lambda run: run[1].number)  # stable: within a seed, in the order of the table
        if all(trial.number in c.session.read().finals for c, trial in runs):
            return
        workers()
        self.progress.on_phase("time")
        folders = [c.folder(trial) for c, trial in runs]
        with checked_out(self.remote, *(folder for folder in folders if (folder / OUTCOME).exists())):
            times = workers().call(work.time, folders)
        for (controller, trial), found in zip(runs, times, strict=True):
            controller.session.record_final(trial.number, found)
            self.tracker.end_trial(controller.session.name, trial)
        if lost := times.count({}):
            self.progress.on_warning(f"{lost} of {len(runs)} confirmed runs have no times: their models are gone")


def flops_per_image(trial: TrialRecord, epochs: int) -> float:
    """FLOPs of a number of epochs of a trial, for every training image, by the closed form."""
    from erpe.model.flops import train_step_flops

    return train_step_flops(trial.config.model) * epochs


def _why(search: StudyController) -> str:
    reasons = search.session.read().reasons
    if not reasons:
        raise StudyError(f"study {search.study().shown}: no trial was completed")
    return last_line(next(iter(reasons.values())))
