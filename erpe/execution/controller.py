"""What happens to a study, in the one order that survives a kill anywhere. Nothing of Ray in here.

    controller.next_trial() -> TrialRecord         a trial to run
    controller.on_trial_result(trial, event)       True while the trial should go on

Everything is recorded in the session first; the tracker shows what is there. An epoch the tracker missed is replayed
from the trial's checkpoint; an ending it missed is in the session, as a decision that was not told.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from typing import Any

from erpe.checkpoints import RemoteCheckpoints, name_of
from erpe.errors import TrialError
from erpe.execution.callbacks import Progress, TrialProgress
from erpe.execution.trial_log import write_log
from erpe.execution.trial_loop import TrialEvent
from erpe.store import Store
from erpe.study.records import StudyRecord, TrialRecord
from erpe.study.session import StudySession
from erpe.study.spec import StudySpec


@dataclass
class StudyController:
    """Run a study: every event goes to the session first, then to the tracker, then to callbacks."""

    session: StudySession
    spec: StudySpec
    tracker: Any
    """`erpe.tracking.tracker.Tracker`, which also makes its calls repeatable."""
    store: Store
    budget: int
    progress: Progress = field(default_factory=Progress)
    tags: dict[str, str] = field(default_factory=dict)
    """Tags of every run."""
    arm: str = ""
    """Arm of a study file's study; empty for `tune`."""
    remote: RemoteCheckpoints | None = None
    """Where workers keep their trials' folders; None: in the store itself."""
    draining: Event = field(default_factory=Event)
    """Set by Ctrl-C: trials end after their epoch, none is started, all can be continued."""
    _study: StudyRecord | None = None
    """As it was when a trial last started or ended."""

    def folder(self, trial: TrialRecord) -> Path:
        """Where a trial's checkpoint and results lie."""
        return self.store.trial_folder(self.session.name, trial.number, trial.config.seed)

    def next_trial(self, beside: TrialRecord | None = None) -> TrialRecord | None:
        """Return a trial to run; None when the budget is used, or when draining."""
        while not self.draining.is_set():
            trial = self.session.ask(self.budget)
            if trial is None:
                return None
            self.tracker.start_trial(self.session.name, trial, self.tags)
            if trial.verdict is None:
                if self.remote:
                    self.remote.upload(self.folder(trial))
                self._study = self.study().knowing(trial)
                write_log(self.folder(trial), f"handed to a worker; seed {trial.config.seed}")
                self.progress.on_start(self._moment(trial))
                return trial
            self._end(trial)  # was decided by a driver that was killed before it told anyone
        return None

    def on_trial_result(self, trial: TrialRecord, event: TrialEvent) -> bool:
        """Record what a worker says.

        Returns:
            Whether the trial should go on now.
        Raises:
            ErpeError: the machine is broken, or another driver took over; the study can be continued.
        """
        write_log(self.folder(trial), event)
        if event.broken:
            raise event.broken
        if event.warning:
            self.progress.on_warning(event.warning)
        known = set(trial.epochs)
        try:
            for epoch in event.epochs:
                step = int(epoch["epoch"])
                value = self.spec.value(epoch)
                prune = self.session.report(trial.number, step, value)
                self.tracker.epoch(self.session.name, trial, epoch)
                trial.epochs.setdefault(step, value)
                if prune:
                    return self._decide(trial, "PRUNED")
            if event.epochs:
                last = int(event.epochs[-1]["epoch"])
                if last not in known or len(event.epochs) == 1:  # else a trial that goes on says where it was
                    self.progress.on_epoch(self._moment(trial)._replace(epoch=last, value=trial.epochs[last]))
        except TrialError as error:
            return self._decide(trial, "FAIL", reason=str(error))
        if event.outcome is not None:
            return self._decide(trial, "COMPLETE", event.outcome)
        if event.failure is not None:
            return self._decide(trial, "FAIL", reason=event.failure)
        return not self.draining.is_set()

    def on_trial_error(self, trial: TrialRecord, reason: str) -> bool:
        """Record that a worker died, or raised an unexpected exception.

        Returns:
            Whether to run the trial again.
        """
        write_log(self.folder(trial), f"crashed: {reason}")
        if self.draining.is_set():
            return False  # no fault of the trial: SIGTERM may have been sent to the workers, too
        if self.session.record_crash(trial.number, reason):
            return not self.draining.is_set()
        return self._end(trial)

    def study(self) -> StudyRecord:
        """As it was when a trial last started or ended here."""
        if self._study is None:
            self._study = self.session.read()
        return self._study

    def _decide(
        self, trial: TrialRecord, state: Any, metrics: dict[str, float] | None = None, reason: str | None = None
    ) -> bool:
        if state != "COMPLETE":
            write_log(self.folder(trial), f"failed: {reason}" if reason else state.lower())
        if self.remote and state != "FAIL":
            self.remote.collect(self.folder(trial), finished=state == "COMPLETE")
        self.session.decide(trial.number, state, metrics or {}, reason)
        return self._end(trial)

    def _end(self, trial: TrialRecord) -> bool:
        decided = self.session.trial(trial.number)
        if decided.verdict:
            self.session.tell(trial.number)
            self.tracker.end_trial(self.session.name, trial)
            self._study = self.session.read()
            if self.remote:
                self.remote.remove(name_of(self.folder(trial)))
            self.progress.on_end(self._moment(decided._replace(state=decided.verdict.state)))
        return False

    def _moment(self, trial: TrialRecord) -> TrialProgress:
        best = self._study.best if self._study else None
        return TrialProgress(
            arm=self.arm,
            phase=self.spec.phase,
            number=trial.number,
            state=trial.state,
            epoch=max(trial.epochs, default=0),
            epochs=trial.config.train.epochs,
            value=trial.value,
            reason=trial.verdict.reason if trial.verdict else None,
            config=trial.config,
            counts=dict(self._study.counts) if self._study else {},
            budget=self.budget,
            best=best.value if best else None,
            lag=self.tracker.lag(),
            folder=None if self.remote else self.folder(trial),
        )
