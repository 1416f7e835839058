"""A study of many arms, as the terminal shows it: a live table, or plain lines where there is no terminal.

Both `erpe study run` and `erpe study status` read the database, so that they show the same.
"""

from __future__ import annotations

import statistics
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from rich.box import SIMPLE
from rich.live import Live
from rich.table import Table

from erpe.cli.options import warn
from erpe.cli.tables import finished_words, front_table, refusals, where_to_look
from erpe.cli.trials import lag_of, lag_words
from erpe.errors import ConfigError
from erpe.plugins import plugin_flags
from erpe.search.run_study import CampaignResult
from erpe.store import Store, store_flag
from erpe.study.objectives import Goals, shown
from erpe.study.openings import Openings, openings
from erpe.study.plan import Plan
from erpe.study.plan_file import stored_plan
from erpe.study.reading import read_studies
from erpe.study.records import StudyRecord, TrialRecord, arm_of, grouped
from erpe.text import Terminal, changes_wait, clock, line, percent
from erpe.tracking.waiting import waiting


class ArmStatus(NamedTuple):
    """Where an arm of a study stands."""

    arm: str
    counts: dict[str, int]
    """Trials of the search by state."""
    trials: int
    """Planned."""
    best: float | None
    """Validation accuracy."""
    confirmed: int
    seeds: int
    """Planned."""
    timed: int
    """Confirmed runs whose times were taken, at the end, when nothing else ran."""
    test: float | None
    """Mean test accuracy of the confirmed runs."""
    seconds_left: float | None
    """Of one worker; None while nothing was timed."""
    front: dict[int, dict[str, float]] = {}  # noqa: RUF012  never changed
    """Of several objectives: number of a trial that no other one dominates -> its objectives."""
    refused: int = 0
    """Draws that were not trained, as they would have cost too much."""


class StudyStatus(NamedTuple):
    """Where a study stands."""

    study: str
    arms: list[ArmStatus]
    running: int
    """Trials at work now."""
    openings: Openings
    """How often the test set was opened, ever."""
    goals: Goals = Goals()
    """What is sought."""
    lag: int = 0
    """Changes MLflow does not show yet."""
    lag_seconds: float | None = None
    """For how long the oldest of them has waited."""

    @property
    def seconds_left(self) -> float | None:
        """At as many trials at a time as run now."""
        known = [arm.seconds_left for arm in self.arms]
        return sum(filter(None, known)) / max(1, self.running) if None not in known else None

    @property
    def done(self) -> bool:
        """Whether every arm is confirmed and timed."""
        return all(arm.timed >= arm.seeds for arm in self.arms)

    @property
    def stage(self) -> str:
        """What is done, or left."""
        confirmed = all(arm.confirmed >= arm.seeds for arm in self.arms)
        return "done" if self.done else "all confirmed, times not taken yet" if confirmed else "search and confirmation"


def statuses(store: Store, study: str | None = None) -> list[StudyStatus]:
    """Where the studies that `erpe study run` made stand; or the one of that name.

    One of a plug-in that is not loaded is left out, with a warning.

    Raises:
        StudyError: there is none of that name.
        ConfigError: it is of a plug-in that is not loaded.
        StoreError: the database cannot be read.
    """
    waits = waiting(store)
    found = []
    for plan, members in grouped(read_studies(store), study):
        try:
            found.append(status(stored_plan(plan), members))
        except ConfigError as error:
            if study:
                raise
            warn(str(error))
    return [each._replace(**lag_of(waits.get(each.study))) for each in found]


def status(plan: Plan, members: list[StudyRecord]) -> StudyStatus:
    """Where a study stands, from its searches and confirmations."""
    arms = [_arm(plan, arm.name, *arm_of(members, arm.name)) for arm in plan.arms()]
    running = sum(member.counts["RUNNING"] for member in members)
    return StudyStatus(plan.name, arms, running, openings(members, [arm.arm for arm in arms]), Goals.of(plan.search))


def _arm(plan: Plan, name: str, search: StudyRecord | None, confirm: StudyRecord | None) -> ArmStatus:
    tried, trained = search.trials if search else [], confirm.trials if confirm else []
    complete = [trial for trial in trained if trial.state == "COMPLETE" and trial.verdict]
    measured = [trial.verdict.metrics.get("test/accuracy") for trial in complete if trial.verdict]
    tests = [accuracy for accuracy in measured if accuracy is not None]
    return ArmStatus(
        arm=name,
        counts=dict(search.counts) if search else {},
        trials=plan.search.trials,
        best=search.best.value if search and search.best else None,
        confirmed=len(complete),
        seeds=plan.confirm.seeds,
        timed=len({trial.number for trial in complete} & set(confirm.finals)) if confirm else 0,
        test=statistics.mean(tests) if tests else None,
        seconds_left=_seconds_left(plan, tried, trained),
        front=search.front if search else {},
        refused=search.refused if search else 0,
    )


def _seconds_left(plan: Plan, tried: list[TrialRecord], trained: list[TrialRecord]) -> float | None:
    """Epochs that are left, times what an epoch of this arm took so far."""
    ended = [trial for trial in [*tried, *trained] if trial.started and trial.ended and trial.epochs]
    if not ended:
        return None
    spent = [(t.ended - t.started).total_seconds() / len(t.epochs) for t in ended if t.started and t.ended]
    finished = [len(trial.epochs) for trial in tried if trial.state in ("COMPLETE", "PRUNED")]
    usual = statistics.mean(finished) if finished else tried[0].config.train.epochs
    epochs = plan.confirm.epochs or ended[0].config.train.epochs
    left = max(0, plan.search.trials - len(tried)) * usual + max(0, plan.confirm.seeds - len(trained)) * epochs
    left += sum(
        trial.config.train.epochs - len(trial.epochs) for trial in [*tried, *trained] if trial.state == "RUNNING"
    )
    return left * statistics.median(spent)


def status_table(found: StudyStatus) -> Table:
    """Variant, trials by state, best, confirmed runs, seconds left."""
    left = "" if found.done or found.seconds_left is None else f" · about {clock(found.seconds_left)} left"
    title = f"{found.study}: {found.stage}{left}"
    title += lag_words(found.lag, found.lag_seconds)
    told = found.openings.told() if found.openings.total else None
    table = Table(box=SIMPLE, title=title, title_justify="left", caption=told, caption_justify="left")
    table.add_column("arm", overflow="fold")
    table.add_column("trials")
    for name in ("best val", "seeds", "test", "left"):
        table.add_column(name, justify="right", no_wrap=True)
    for arm in found.arms:
        left = "" if arm.confirmed >= arm.seeds else "?" if arm.seconds_left is None else clock(arm.seconds_left)
        seeds = f"{arm.confirmed}/{arm.seeds}"
        best = shown(found.goals.objectives[0], arm.best)
        trials = _trials(arm) + refusals(arm.refused, found.goals)
        table.add_row(arm.arm, trials, best, seeds, percent(arm.test), left)
    return table


def status_tables(found: list[StudyStatus]) -> list[Table]:
    """The same for each study, with the Pareto fronts of its arms."""
    tables = []
    for each in found:
        tables.append(status_table(each))
        if fronts := {arm.arm: arm.front for arm in each.arms if arm.front}:
            tables.append(front_table(each.goals, fronts))
    return tables


def _trials(arm: ArmStatus) -> str:
    """`3/8: 1 pruned, 1 unfinished`: only its driver knows whether a trial is at work."""
    words = {"RUNNING": "unfinished", "PRUNED": "pruned", "FAIL": "failed"}
    counts = [f"{arm.counts[state]} {word}" for state, word in words.items() if arm.counts.get(state)]
    done = sum(count for state, count in arm.counts.items() if state != "RUNNING")
    return f"{done}/{arm.trials}" + (f": {', '.join(counts)}" if counts else "")


def watch(store: Store, study: str | None) -> None:
    """Show where studies stand again and again, until they are done or Ctrl-C."""
    console = Terminal()
    with Live(console=console, refresh_per_second=1) as live:
        while True:
            found = statuses(store, study)
            table = Table.grid()
            for each in status_tables(found):
                console.fit(each)
                table.add_row(each)
            table.add_row(f"{datetime.now(UTC):%H:%M:%S} UTC", style="dim")
            live.update(table, refresh=True)
            if all(each.done for each in found):
                return
            time.sleep(2)


def result_lines(result: CampaignResult, store: Path) -> list[str]:
    """Return what `erpe study run` tells before the answer: how long it took, and what to look at."""
    place = store_flag(store)
    where = place + plugin_flags()
    lines = [f"{arm}: no trial to confirm; {why}" for arm, why in result.failed.items()]
    if result.finished:
        remedy = "--set name=ANOTHER trains afresh beside it"
        lines.append(f"{finished_words(result.study, result.finished, remedy)}; {result.openings.told()}")
    else:
        lines.append(f"{result.study}: done in {clock(result.seconds)}; {result.openings.told()}")
    later = f"for MLflow: erpe sync{place}    page: erpe report {result.study}{where}"
    lines.append(f"page: {result.page}" if result.page else later)
    lines.append(f"tables: erpe compare {result.study}{where}    look: {where_to_look(place)}")
    if result.lag:
        why = f" ({result.problem})" if result.problem else ""
        lines.append(f"{changes_wait(result.lag)} for MLflow; erpe sync{place} sends them{why}")
    return [line(each) for each in lines]
