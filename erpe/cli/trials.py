"""Studies and their trials, as `erpe status` shows them: a line a study, or the trials of one."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

from rich.box import SIMPLE
from rich.table import Table

from erpe.cli.options import with_store
from erpe.cli.tables import refusals, state_word, tally
from erpe.live import STYLES
from erpe.store import Store
from erpe.study.lookup import parts_of
from erpe.study.naming import part_name
from erpe.study.objectives import Goals, shown
from erpe.study.reading import read_studies
from erpe.study.records import StudyRecord
from erpe.text import Terminal, changes_wait, clock, last_line, percent
from erpe.tracking.waiting import Waiting, waiting


def overview_table(rows: list[dict[str, Any]]) -> None:
    """Print all studies, a line each.

    Args:
        rows: of `status_rows`.
    """
    studies: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        studies.setdefault(row["study"], []).append(row)
    if not studies:
        print(with_store("no studies yet; `erpe tune` makes one"))
        return
    table = Table(box=SIMPLE)
    table.add_column("study", overflow="fold")
    for name in ("arms", "trials", "seeds", "best val", "waiting", "started"):
        table.add_column(name, justify="right", no_wrap=True)
    for study, parts in studies.items():
        table.add_row(study, *_overview(parts))
    Terminal().print_table(table)
    print(with_store("`erpe status STUDY` shows its trials or its arms, `erpe status STUDY/ARM` the trials of an arm"))
    if lag := sum(row["lag"] for row in rows):
        print(lag_words(lag, max(row["lag_seconds"] or 0 for row in rows)).removeprefix(" · "))


def _overview(parts: list[dict[str, Any]]) -> list[str]:
    searches = [part for part in parts if part["phase"] == "search"]
    seeds = [trial for part in parts if part["phase"] == "confirm" for trial in part["trials"]]
    tried = [trial for part in searches for trial in part["trials"]]
    best = max((part["value"] for part in searches if part["value"] is not None), default=None)
    sought = next((part["objective"].partition(",")[0] for part in searches), "accuracy")
    started = min((trial["started"] for part in parts for trial in part["trials"] if trial["started"]), default="")
    arms = len({part["arm"] for part in parts if part["arm"]})
    waits = sum(part["lag"] for part in parts)
    return [
        str(arms or ""),
        _done(tried),
        _done(seeds) if seeds else "",
        shown(sought, best),
        str(waits or ""),
        (started[:16] + started[19:]).replace("T", " "),  # to the minute, with its zone
    ]


def _done(trials: list[dict[str, Any]]) -> str:
    """`6`, or `4, 2 unfinished`."""
    counts = Counter(trial["state"] for trial in trials)
    left = counts.pop("RUNNING", 0)
    return str(counts.total()) + (f", {left} unfinished" if left else "")


def status_table(rows: list[dict[str, Any]]) -> None:
    """Print the trials of a study, or of an arm and its seeds, for people."""
    console = Terminal()
    for row in rows:
        name = part_name(row["study"], row["arm"], row["phase"])
        if not row["trials"]:  # as a command leaves it that had no data
            console.print(f"{name}: no trial yet; the command that made it goes on")
            continue
        searched, test = row["phase"] == "search", (row["test"] or {}).get("test/accuracy")
        goals = Goals.of(row)
        sought, *others = goals.objectives if searched else ("accuracy",)
        title = f"{name}: {tally(row['counts'])}{refusals(row['refused'], goals)}"
        title += f" · best {shown(sought, row['value'])}" if searched else ""
        title += ("" if test is None else f" · test {percent(test)}") + lag_words(row["lag"], row["lag_seconds"])
        table = Table(box=SIMPLE, title=title, title_justify="left")
        accuracy, front = sought if searched else "test accuracy", ["front"] if others else []
        what = "trial" if searched else "seed"
        for column in (what, "state", "epoch", accuracy, *others, *front, "started", "why"):
            table.add_column(column, justify="left" if column in ("state", "front", "started", "why") else "right")
        for trial in row["trials"]:
            style = "bold" if trial["number"] == row["best"] else STYLES[trial["state"]]
            epochs = f"{trial['epochs']}/{trial['of']}"
            state = state_word(trial["state"]) + (", removed" if trial["removed"] else "")
            cells = [str(trial["number"]), state, epochs, shown(sought, trial["value"])]
            cells += [shown(each, trial["objectives"].get(each)) for each in others]
            cells += ["yes" if trial["number"] in row["front"] else "" for _ in front]
            table.add_row(
                *cells, (trial["started"] or "").replace("T", " "), last_line(trial["reason"] or ""), style=style
            )
        console.print_table(table)


def status_rows(store: Store, study: str | None = None) -> list[dict[str, Any]]:
    """Each part of a study with its trials, as the database has them.

    Args:
        study: STUDY, or STUDY/ARM; default: all.
    Raises:
        StudyError: there is none of that name.
        StoreError: the database cannot be read.
    """
    waits, records = waiting(store), read_studies(store)
    return [_status_row(found, waits) for found in (records if study is None else parts_of(records, study))]


def _status_row(found: StudyRecord, waits: dict[str, Waiting]) -> dict[str, Any]:
    """Of a search: validation accuracies and the best one's test. Of a confirmation: test accuracies; none is best."""
    searched, best, goals, reasons = found.phase == "search", found.best, found.goals, found.reasons
    return {
        "study": found.experiment, "arm": found.arm, "phase": found.phase, "counts": dict(found.counts),
        "best": best.number if best and searched else None, "value": best.value if best and searched else None,
        "test": found.finals.get(best.number) if best and searched else None,
        "objective": ",".join(goals.objectives), "at_most": goals.at_most, "front": list(found.front),
        "refused": found.refused, **lag_of(waits.get(found.experiment), found),
        "trials": [
            {
                "number": trial.number, "state": trial.state, "epochs": len(trial.epochs),
                "value": trial.value if searched else trial.verdict and trial.verdict.metrics.get("test/accuracy"),
                "of": trial.config.train.epochs, "reason": reasons.get(trial.number),
                "started": trial.started.astimezone().isoformat(timespec="seconds") if trial.started else None,
                "removed": trial.removed, "objectives": goals.values(trial) if searched else {},
            }
            for trial in found.trials
        ],
    }  # fmt: skip


def lag_of(waits: Waiting | None, study: StudyRecord | None = None) -> dict[str, Any]:
    """Return how many changes MLflow does not show yet, and for how many seconds the oldest has waited.

    Args:
        study: an arm's phase, whose own events are counted; default: all.
    """
    if waits is None:
        return {"lag": 0, "lag_seconds": None}
    own = {study.about.uid, *(trial.uid for trial in study.trials)} if study else waits.changes.keys()
    lag = sum(waits.changes[uid] for uid in own)
    return {"lag": lag, "lag_seconds": max(0.0, round(time.time() - waits.since, 1)) if lag and waits.since else None}


def lag_words(lag: int, seconds: float | None) -> str:
    """Return the end of a title: ` · 96 changes wait for MLflow, the oldest for 12 min`."""
    if not lag:
        return ""
    return f" · {changes_wait(lag)} for MLflow, the oldest for {clock(seconds or 0)}"
