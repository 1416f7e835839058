"""The Optuna database as the only truth about a study's trials. Nothing of Ray in here.

    with StudySession.open(store, spec) as session:              # leased: one driver a study
        trial = session.ask(budget=20)                    # or None; after a crash the orphans come first
        prune = session.report(trial.number, epoch=1, value=0.8)
        session.decide(trial.number, "COMPLETE", metrics)  # written ahead ...
        session.tell(trial.number)                         # ... and frozen

Every call may be repeated, by this process or by the next one: nothing is counted twice. A trial counts
towards the budget from the moment its configuration is written.
"""

from __future__ import annotations

import contextlib
import math
import uuid
from typing import Any, Literal, Self

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import TrialState

from erpe.errors import StudyError, TrialError
from erpe.store import Store
from erpe.study import lookup, pruning, reading, records, samplers, storage
from erpe.study.lock import Lease, acquire, fenced
from erpe.study.naming import shown
from erpe.study.records import CONFIG, ExperimentRef, StudyRecord, TrialOutcome, TrialRecord
from erpe.study.spec import StudySpec, check_name
from erpe.study.starting_points import NOTHING, START, Start, begin, queue
from erpe.text import redact

MAX_ATTEMPTS = 3
"""Crashes of a trial without a finished epoch between them, after which it is FAIL."""

_ATTEMPTS = "erpe.attempts"
State = Literal["COMPLETE", "PRUNED", "FAIL"]


class StudySession:
    """One study, leased by this process. Raises `StudyError` when another process took over."""

    def __init__(
        self, database: storage.Database, lease: Lease, study: optuna.Study, spec: StudySpec, trials: int | None
    ) -> None:
        self._lease, self._study, self._spec, self._database, self._trials = lease, study, spec, database, trials
        self._opened = contextlib.ExitStack()
        self._handed_out: set[int] = set()
        self._live: dict[int, optuna.Trial] = {}
        """Running trials; this driver is the only one that may write them."""
        self._running: dict[int, TrialRecord] = {}
        """The same as this driver left them: to read one again takes milliseconds."""
        self._ended: dict[int, TrialRecord] = {}
        """To read all again of every trial that ever ended would make each trial slower than the one before."""
        self.uid = reading.read_about(study.study_name, study.user_attrs).uid
        study.pruner = pruning.make_pruner(spec, trials)
        self._epoch = int(study.user_attrs.get(records.EPOCH, 0)) + 1
        study.set_user_attr(records.EPOCH, self._epoch)

    @property
    def name(self) -> str:
        """The study's name."""
        return self._study.study_name

    @classmethod
    def open(
        cls,
        store: Store,
        spec: StudySpec,
        *,
        trials: int | None = None,
        name: str | None = None,
        new: bool = False,
        part_of: ExperimentRef | None = None,
        made_with: dict[str, str] | None = None,
        start: Start = NOTHING,
    ) -> StudySession:
        """Continue the newest study of this name, or make one.

        Args:
            trials: of the whole search, which decide about start-up and pruning; default: a long search.
            name: default: `spec.name`.
            new: start another study beside those of this name: NAME-2, NAME-3, ...
            part_of: the study file's study, of which this is an arm's phase.
            start: what a new search begins with.
            made_with: hardware, versions and commit, kept of the first call.
        Raises:
            StudyError: the study has other settings (the text says which), or someone is running it.
            StoreError: the database cannot be used.
        """
        wanted = check_name(spec.name if name is None else name)
        with contextlib.ExitStack() as opened:
            database = storage.Database(store.storage_url)
            opened.callback(database.close)
            chosen = (lookup.beside if new else lookup.newest)(database, wanted)
            lease = acquire(database.url, chosen)
            opened.callback(lease.release)
            settings, uid = samplers.settings(spec, trials), uuid.uuid4().hex[:12]
            about = records.StudyInfo(uid, spec.model_dump(mode="json"), settings, wanted, made_with or {})
            study = begin(database, chosen, spec, about, start, "--set name=ANOTHER" if part_of else "--new")
            session = storage.retry_while_unavailable(cls)(database, lease, study, spec, trials)
            if part_of:
                storage.retry_while_unavailable(session._study.set_user_attr)(records.GROUP, part_of._asdict())
            session._opened = opened.pop_all()
            return session

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()

    def guard(self) -> None:
        """Refuse to write if a later driver took over: it has raised the epoch.

        Raises:
            StudyError: it has.
        """
        self._lease.check()
        if self._study.user_attrs.get(records.EPOCH) != self._epoch:
            raise StudyError(f"study {shown(self.name)}: another erpe took over; this one stops, nothing is lost")

    def _record(self, number: int) -> TrialRecord:
        """Return a trial as this driver knows it, without asking the database where it runs."""
        record = self._running.get(number) or self._reread(number)
        if record.state == "RUNNING":
            self._running[number] = record
        return record

    def _place(self, number: int) -> int:
        """Return the id of a trial in the database."""
        backend = self._database.backend
        return backend.get_trial_id_from_study_id_trial_number(backend.get_study_id_from_name(self.name), number)

    def _reread(self, number: int) -> TrialRecord:
        return reading.read_trial(self.uid, self._database.backend.get_trial(self._place(number)))

    def _trial(self, number: int) -> optuna.Trial:
        """Return a trial to write to."""
        if number not in self._live:
            self._live[number] = optuna.Trial(self._study, self._place(number))
        return self._live[number]

    @fenced
    def ask(self, budget: int) -> TrialRecord | None:
        """Return the next trial to run: one that a killed driver left, or a new one until `budget` have a
        configuration.

        Raises:
            StudyError: another driver took over.
        """
        trials = self._study.get_trials(deepcopy=False)
        for trial in trials:
            if trial.state != TrialState.RUNNING or trial.number in self._handed_out:
                continue
            if CONFIG in trial.user_attrs:
                return self._hand_out(trial.number)
            self._study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)  # of an `ask` cut short
        written = [trial for trial in trials if CONFIG in trial.user_attrs]
        if len(written) >= budget:
            return None
        if not written:
            queue(self._study, trials, self._spec)
        asked, config = samplers.draw(self._study, self._spec, self._trials)
        self._live[asked.number] = asked
        asked.set_user_attr(CONFIG, config.model_dump(mode="json"))
        return self._hand_out(asked.number)

    @property
    def points(self) -> list[dict[str, Any]]:
        """Return the starting points that this study was begun with."""
        return list(self._study.user_attrs.get(START, {}).get("points", []))

    def _hand_out(self, number: int) -> TrialRecord:
        record = self._record(number)
        self._handed_out.add(number)
        return record

    @fenced
    def report(self, number: int, epoch: int, value: float) -> bool:
        """Record the value of an epoch, counted from 1; the first word on an epoch counts.

        Returns:
            Whether the trial should be pruned; never after its last epoch, when nothing is left to save.
        Raises:
            TrialError: the value is not finite.
            StudyError: another driver took over.
        """
        if not math.isfinite(value):
            raise TrialError(f"epoch {epoch}: the value is {value}")
        record = self._record(number)
        if record.state != "RUNNING":
            return record.state == "PRUNED"
        if epoch < max(record.epochs, default=0):
            return False  # was decided when it was new
        trial = self._trial(number)
        if epoch not in record.epochs:
            try:
                if self._spec.goals.several:
                    trial.set_user_attr(f"{records.VALUE}.{epoch}", value)
                else:
                    trial.report(value, epoch)
            except UpdateFinishedTrialError:  # by another hand: Optuna's dashboard has a button
                self.guard()
                return self._reread(number).state == "PRUNED"
            self._running[number] = record._replace(epochs=record.epochs | {epoch: value})
            if trial.user_attrs.get(_ATTEMPTS):
                self._trial(number).set_user_attr(_ATTEMPTS, 0)
        return epoch < self._spec.epochs and self._is_pruned(number)

    def _is_pruned(self, number: int) -> bool:
        if not self._spec.goals.several:
            return self._trial(number).should_prune()
        others = reading.read_study(self._study, self._ended).trials
        return pruning.falls_behind(self._spec, self._trials, self._record(number), others)

    @fenced
    def record_crash(self, number: int, reason: str) -> bool:
        """Record that a worker died or raised an unexpected exception.

        Returns:
            Whether to try again; if not, the trial is decided to be FAIL with this reason.
        """
        record = self._reread(number)
        if record.state != "RUNNING" or record.verdict:
            return False
        attempts = int(self._trial(number).user_attrs.get(_ATTEMPTS, 0)) + 1
        self._trial(number).set_user_attr(_ATTEMPTS, attempts)
        if attempts < MAX_ATTEMPTS:
            return True
        since = f"after epoch {max(record.epochs)}" if record.epochs else "without finishing an epoch"
        self.decide(number, "FAIL", {}, f"{reason.rstrip()} (crashed {attempts} times {since})")
        return False

    @fenced
    def decide(self, number: int, state: State, metrics: dict[str, float], reason: str | None = None) -> TrialOutcome:
        """Write ahead how a trial ends, before anyone else is told; the first decision counts.

        A trial cannot be COMPLETE without its objectives, and measures that are limited: then it is FAIL.
        """
        record = self._record(number)
        if record.verdict:
            return record.verdict
        if state == "COMPLETE" and not record.epochs:
            state, reason = "FAIL", "no epoch was reported"
        verdict, goals = TrialOutcome(state, metrics, redact(reason) if reason else None), self._spec.goals
        if state == "COMPLETE":
            measured = record._replace(verdict=verdict)
            if lacks := goals.lacks(measured):
                verdict = TrialOutcome("FAIL", {}, f"{lacks} was not measured, or is no number; the study asks for it")
            self._constrain(number, goals.excess(goals.spent(measured)))
        self._trial(number).set_user_attr(records.END, verdict._asdict())
        if number in self._running:
            self._running[number] = record._replace(verdict=verdict)
        return verdict

    def _constrain(self, number: int, parts: dict[str, float]) -> None:
        known = {trial.number: trial for trial in self._study.get_trials(deepcopy=False)}[number] if parts else None
        for name, part in parts.items():
            if known and name not in known.constraints:  # a driver that was killed here may have set it
                self._trial(number).set_constraint(name, part)

    @fenced
    def tell(self, number: int) -> None:
        """Freeze a decided trial. Telling again changes nothing."""
        record = self._record(number)
        assert record.verdict
        for known in (self._running, self._live):
            known.pop(number, None)
        state = TrialState[record.verdict.state]
        value = list(self._spec.goals.values(record).values()) if state == TrialState.COMPLETE else None
        with contextlib.suppress(UpdateFinishedTrialError):  # a first attempt arrived, its answer did not
            self._study.tell(number, value, state=state, skip_if_finished=True)

    @storage.retry_while_unavailable
    def trial(self, number: int) -> TrialRecord:
        """One trial as it stands."""
        return self._record(number)

    @fenced
    def record_final(self, number: int, metrics: dict[str, float]) -> dict[str, float]:
        """Keep what was measured of a trial after its end; measures of the test split stay, since it is opened once."""
        key = f"{records.FINAL}.{number}"
        found = self._study.user_attrs.get(key)
        tested = {name: value for name, value in (found or {}).items() if name.startswith("test/")}
        kept: dict[str, float] = (found or {}) | metrics | tested
        if kept != found:
            self._study.set_user_attr(key, kept)
        return kept

    @fenced
    def record_tags(self, tags: dict[str, str]) -> None:
        """Keep what this driver knows of itself: versions, commit, machine."""
        self._study.set_user_attr(records.TAGS, tags)

    @storage.retry_while_unavailable
    def read(self) -> StudyRecord:
        """Return the study as it stands."""
        return reading.read_study(self._study, self._ended)
