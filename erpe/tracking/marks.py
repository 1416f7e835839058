"""How far a study and its trials are: what tells whether MLflow lacks anything, without a look at it."""

from __future__ import annotations

from typing import NamedTuple

from erpe.study.records import StudyRecord, TrialRecord, arm_of

RUNNING, INTERRUPTED, GONE = "RUNNING", "INTERRUPTED", "REMOVED"
"""States beside COMPLETE, PRUNED and FAIL. GONE: the run must not be in MLflow."""


class Mark(NamedTuple):
    """How far a run is: enough to know whether anything changed."""

    steps: int
    """Epochs of a trial, and whether it was measured later; of a study, see `study_mark`."""
    state: str


def trial_mark(member: StudyRecord, trial: TrialRecord) -> Mark:
    """How far a trial is."""
    if trial.removed:
        return Mark(0, GONE)
    return Mark(len(trial.epochs) + (member.phase == "confirm" and trial.number in member.finals), state_of(trial))


def study_mark(member: StudyRecord, members: list[StudyRecord], running: bool) -> Mark:
    """How far a study is: with the trials that ended, those that were measured later, and those that were removed."""
    steps = sum((trial.ended is not None) + trial.removed for trial in member.trials) + len(member.finals)
    if not _is_over(member, members) or (running and not member.part_of):
        return Mark(steps, RUNNING if running else INTERRUPTED)
    return Mark(steps, "COMPLETE" if best_of(member) else "FAIL")


def state_of(trial: TrialRecord) -> str:
    """Return what was decided of a trial, else what the database says."""
    return trial.verdict.state if trial.verdict else trial.state


def _is_over(member: StudyRecord, members: list[StudyRecord]) -> bool:
    """Whether a study did all that was last requested. A search of `tune` ends with a test."""
    if member.counts["RUNNING"] or not member.trials:
        return False
    if member.part_of is None:
        return member.best is None or member.best.number in member.finals
    plan = member.part_of.plan
    if member.phase == "confirm":
        return len(member.trials) >= int(plan["confirm"]["seeds"])
    if plan["search"]["budget"] == "trials":
        return len(member.trials) >= int(plan["search"]["trials"])
    return arm_of(members, member.part_of.arm)[1] is not None


def best_of(member: StudyRecord) -> TrialRecord | None:
    """Return the trial that stands for a study: of a confirmation the first seed, as no test score chooses it."""
    if member.phase != "confirm":
        return member.best
    return next((trial for trial in member.trials if trial.state == "COMPLETE"), None)
