"""How often the test set was opened, and what a changed study file would make of what was seen.

openings(members, ["softmax", "relu"])     # Openings(total=9, abandoned=3)
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from erpe.config import defaults
from erpe.datasets import Dataset
from erpe.errors import StudyError
from erpe.study.plan import Plan
from erpe.study.records import StudyRecord, arm_of
from erpe.study.spec import differences
from erpe.text import counted


class Openings(NamedTuple):
    """Trained models that met the test split; each one is an opening of it."""

    total: int
    abandoned: int
    """Of confirmations whose results were replaced, or whose arm left the study; they still count."""

    def told(self) -> str:
        """In words."""
        times = "once" if self.total == 1 else f"{self.total} times"
        gone = f", {self.abandoned} of them for results that were replaced" if self.abandoned else ""
        return f"the test set was opened {times}{gone}"


def openings(members: list[StudyRecord], arms: Iterable[str]) -> Openings:
    """Of the arms of a study as they stand now.

    Args:
        members: searches and confirmations; those of an arm that is not named are abandoned.
    """
    shown = [confirm for _, confirm in (arm_of(members, arm) for arm in arms) if confirm]
    total = sum(len(member.opened) for member in members)
    return Openings(total, total - sum(len(confirm.opened) for confirm in shown))


def check_replacing(plan: Plan, members: list[StudyRecord], replace: bool) -> str | None:
    """Before a study goes on: whether its file changed so that results of the test set would be replaced.

    More seeds replace nothing. What else changes is refused where the study itself is opened.

    Returns:
        What will be replaced, where that is allowed.
    Raises:
        StudyError: results would be replaced without `--replace`.
    """
    changes, runs, now = [], 0, _protocol(plan.model_dump(mode="json"))
    for arm in plan.arms():
        search, confirm = arm_of(members, arm.name)
        if search and search.part_of and confirm and confirm.opened:
            changed = differences(_protocol(search.part_of.plan), now)
            changes += changed
            runs += len(confirm.opened) if changed else 0
    if not changes:
        return None
    told = f"{'; '.join(dict.fromkeys(changes))}: replaces results of {counted(runs, 'run')} that met the test set"
    if not replace:
        raise StudyError(
            f"study {plan.name}: {told}; use --replace to do that, or --set name=ANOTHER for a study beside it"
        )
    return f"{told}; they stay counted"


def _protocol(plan: dict[str, Any]) -> dict[str, Any]:
    """Return what decides which configuration is confirmed, and for how long, with defaults written out."""
    search, confirm, data = plan["search"], plan["confirm"], plan["dataset"]
    usual = search["epochs"] or defaults("softmax", Dataset(**data) if isinstance(data, dict) else data).train.epochs
    return {
        "search": {"trials": search["trials"], "budget": search["budget"]},
        "confirm": {"epochs": confirm["epochs"] or usual},
    }
