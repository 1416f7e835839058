"""What a study and its trials are, once read from the database (`reading.py`), and the names they have there."""

from __future__ import annotations

from collections import Counter
from datetime import datetime
from typing import Any, NamedTuple

from erpe.config import TrialConfig
from erpe.errors import StudyError, nearest
from erpe.study.naming import part_name
from erpe.study.objectives import Goals
from erpe.study.spec import confirmed_epochs

UNFINISHED, CONFIRMED, BEST, REGISTERED, OTHER = "unfinished", "confirmed", "best", "registered", "not asked for"
"""Why a trial stays; OTHER: the policy does not ask for it. No policy removes the first four."""

STUDY, GROUP, CONFIG, END, FINAL = "erpe.study", "erpe.group", "erpe.config", "erpe.end", "erpe.final"
"""Attributes of a study and of its trials. A trial with CONFIG counts; one with END is decided."""

EPOCH = "erpe.epoch"
"""Of a study: how many drivers it has had; the last one may write."""

VALUE, COSTS, REFUSED = "erpe.value", "erpe.costs", "erpe.refused"
"""Of a trial: `erpe.value.EPOCH` where Optuna, which has several objectives, takes no intermediate values; what is
known of its costs before it begins; why it never began, as it would have cost too much. Such a one does not count."""

TAGS = "erpe.tags"
"""Of a study: what the driver that had it last knows of itself: versions, commit, machine."""

REMOVED = "erpe.removed"
"""Of a study: the numbers of the trials that `erpe gc` gave up. Their rows stay: they count, and samplers learn."""


class TrialOutcome(NamedTuple):
    """How a trial ends; written before it is told to anyone."""

    state: str
    """COMPLETE, PRUNED or FAIL."""
    metrics: dict[str, float]
    """Final measures; empty unless COMPLETE."""
    reason: str | None
    """Why it failed, with a traceback where there is one."""


class TrialRecord(NamedTuple):
    """One trial that counts."""

    number: int
    uid: str
    state: str
    """RUNNING, COMPLETE, PRUNED or FAIL."""
    config: TrialConfig
    epochs: dict[int, float]
    """Epoch, from 1 -> its value."""
    verdict: TrialOutcome | None
    started: datetime | None
    ended: datetime | None
    removed: bool = False
    """Whether its folder and its run were given up."""
    costs: dict[str, float] = {}  # noqa: RUF012  never changed
    """In closed form, where the study asks for them: `{"flops": 1.2e6}`."""

    @property
    def value(self) -> float | None:
        """The value of the last epoch."""
        return self.epochs[max(self.epochs)] if self.epochs else None


class StudyInfo(NamedTuple):
    """What a study is."""

    uid: str
    spec: dict[str, Any]
    """`StudySpec.model_dump`, perhaps of another version of erpe."""
    settings: dict[str, Any]
    """Every setting of sampler and pruner."""
    asked: str | None = None
    """The name that the user gave; `--new` makes `a-2` where `a` was. None: 0.1.0 did not write it."""
    made_with: dict[str, str] = {}  # noqa: RUF012  never changed
    """Hardware, threads, versions, commit, when it began."""


class ExperimentRef(NamedTuple):
    """The study of a study file whose arm this one searches or confirms; its name is that of the MLflow experiment."""

    study: str
    """Its name."""
    arm: str
    """Which arm of it this one searches or confirms."""
    phase: str
    """`search` or `confirm`."""
    plan: dict[str, Any]
    """`Plan.model_dump` of it."""
    made_with: dict[str, str] = {}  # noqa: RUF012  never changed
    """Hardware, threads, versions, commit."""
    trial: int | None = None
    """Number of the search's trial whose configuration a confirmation repeats; None: an older erpe made it."""


class StudyRecord(NamedTuple):
    """A study and its trials."""

    name: str
    about: StudyInfo
    trials: list[TrialRecord]
    finals: dict[int, dict[str, float]]
    """Number of a trial -> what was measured after its end: on the test split in a search, times in a confirmation."""
    part_of: ExperimentRef | None
    refused: int = 0
    """Draws that would have cost more than a limit in closed form allows, and so were not trained."""
    tags: dict[str, str] = {}  # noqa: RUF012  never changed
    """Of the driver that had it last; empty: 0.1.0 did not write them."""

    @property
    def goals(self) -> Goals:
        """What it seeks."""
        return Goals.of(self.about.spec)

    @property
    def front(self) -> dict[int, dict[str, float]]:
        """Number of a trial that no other one dominates -> its objectives, the best first; none of one objective."""
        return self.goals.front(self.trials)

    @property
    def reasons(self) -> dict[int, str]:
        """Number of a trial -> why it failed, or is above a limit."""
        failed = {t.number: t.verdict.reason for t in self.trials if t.verdict and t.verdict.reason}
        over = {t.number: self.goals.over(self.goals.spent(t)) for t in self.trials if t.state == "COMPLETE"}
        return failed | {number: why for number, why in over.items() if why}

    @property
    def experiment(self) -> str:
        """The MLflow experiment: named after the study file's study, or after this one."""
        return self.part_of.study if self.part_of else self.name

    @property
    def arm(self) -> str:
        """Which arm of a study file's study it searches or confirms; none: it is a study of its own."""
        return self.part_of.arm if self.part_of else ""

    @property
    def shown(self) -> str:
        """As users know it: STUDY, STUDY/ARM or STUDY/ARM/seeds."""
        return part_name(self.experiment, self.arm, self.phase)

    @property
    def phase(self) -> str:
        """`search` or `confirm`."""
        return self.part_of.phase if self.part_of else "search"

    @property
    def made_with(self) -> dict[str, str]:
        """Hardware, threads, versions and commit; empty: an older erpe did not write them."""
        return self.part_of.made_with if self.part_of else self.about.made_with

    @property
    def counts(self) -> Counter[str]:
        """Trials by state."""
        return Counter(trial.state for trial in self.trials)

    @property
    def ended(self) -> datetime | None:
        """When its last trial ended."""
        return max((trial.ended for trial in self.trials if trial.ended), default=None)

    @property
    def opened(self) -> list[int]:
        """Numbers of the trials whose model met the test split."""
        found = [(trial.number, trial.verdict.metrics) for trial in self.trials if trial.verdict]
        found += self.finals.items()
        return sorted({number for number, metrics in found if any(name.startswith("test/") for name in metrics)})

    @property
    def best(self) -> TrialRecord | None:
        """The complete trial of the highest value, of those within the limits; of equals the first."""
        return next(iter(self.goals.eligible(self.trials)), None)

    def knowing(self, trial: TrialRecord) -> StudyRecord:
        """Return the study with a trial as of now."""
        others = (each for each in self.trials if each.number != trial.number)
        return self._replace(trials=sorted([*others, trial], key=lambda each: each.number))


def grouped(studies: list[StudyRecord], name: str | None = None) -> list[tuple[dict[str, Any], list[StudyRecord]]]:
    """Studies of study files, or the one of that name: its plan as it was last run, and its members.

    Raises:
        StudyError: there is none of that name.
    """
    found: dict[str, tuple[dict[str, Any], list[StudyRecord]]] = {}
    for study in studies:
        if study.part_of:
            found.setdefault(study.part_of.study, (study.part_of.plan, []))[1].append(study)
    if name is not None and name not in found:
        known = nearest(name, list(found)) if found else "there is none; `erpe study run FILE` makes one"
        raise StudyError(f"study {name}: not one of `erpe study run`; {known}")
    return [found[name]] if name is not None else list(found.values())


def arm_of(members: list[StudyRecord], arm: str) -> tuple[StudyRecord | None, StudyRecord | None]:
    """Search and confirmation of an arm; the confirmation is that of the best configuration as of now."""
    own = [member for member in members if member.part_of and member.arm == arm]
    search = next((member for member in own if member.phase == "search"), None)
    if search is None or search.part_of is None or search.best is None:
        return search, None
    how, own_epochs = search.part_of.plan["search"], search.best.config.train.epochs
    epochs = confirmed_epochs(search.part_of.plan["confirm"]["epochs"], own_epochs, how["epochs"], how["budget"])
    wanted = search.best.config.replace({"seed": 0, "data.validation": 0.0, "train.epochs": epochs})
    confirmed = (m for m in own if m.phase == "confirm" and m.trials)
    return search, next((m for m in confirmed if m.trials[0].config.replace({"seed": 0}) == wanted), None)


def irreplaceable(study: StudyRecord, keep_best: int = 1) -> dict[int, str]:
    """Return the trials that stay whatever is asked, as the database alone knows: number -> why."""
    if study.phase == "confirm":
        return {trial.number: CONFIRMED for trial in study.trials}
    best = {trial.number: BEST for trial in study.goals.eligible(study.trials)[:keep_best]}
    best |= dict.fromkeys(study.front, BEST)
    return best | {trial.number: UNFINISHED for trial in study.trials if trial.state == "RUNNING"}
