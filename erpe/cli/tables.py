"""Print a live table while a study runs, tables of results, and plain lines where there is no terminal."""

from __future__ import annotations

import os
import shlex
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.table import Table
from rich.text import Text

from erpe.cli.options import with_store
from erpe.config import defaults
from erpe.datasets import Dataset
from erpe.plugins import plugin_flags
from erpe.report.measures import MEASURES, PERCENT
from erpe.search.tune import TuneResult
from erpe.store import store_flag
from erpe.study.objectives import MEASURES as OBJECTIVES
from erpe.study.objectives import Goals, shown
from erpe.study.spec import StudySpec
from erpe.text import Terminal, changes_wait, counted, number, percent, printable, redact, repeatable
from erpe.variants import VARIANTS, own_variants, split_variant


def tally(counts: dict[str, int]) -> str:
    """Trials by state: `4 complete, 2 pruned`."""
    told = ", ".join(f"{count} {state_word(state)}" for state, count in sorted(counts.items()) if count)
    return told or "no trials"


def state_word(state: str) -> str:
    """Return a state for people; whether a trial that has not ended is at work now, only its driver knows."""
    return "unfinished" if state == "RUNNING" else state.lower()


def moment(seconds: float | None) -> str:
    """Seconds since 1970 as a date and a time here, with the offset from UTC."""
    return "" if seconds is None else f"{datetime.fromtimestamp(seconds).astimezone():%Y-%m-%d %H:%M:%S%z}"


def result_table(result: TuneResult, spec: StudySpec, store: Path) -> None:
    """Print the end of `erpe tune`: the best trial, its settings and measures, where to look, how to go on."""
    console = Terminal()
    if result.finished:
        print(finished_words(result.study, result.finished, "--new trains afresh"))
    if result.best is not None and result.config is not None:
        ended = sum(count for state, count in result.counts.items() if state != "RUNNING")
        table = Table(
            box=SIMPLE,
            title=f"{result.study}: best of {counted(ended, 'trial')}",
            title_justify="left",
        )
        table.add_column("trial")
        table.add_column(str(result.best), justify="right")
        sought = spec.goals.objectives[0]
        table.add_row(OBJECTIVES[sought].label, shown(sought, result.value), style="bold")
        measures = result.metrics | (result.test or {})
        for name, measure in MEASURES.items():
            if name in measures:
                table.add_row(measure.label, (percent if measure.unit == PERCENT else number)(measures[name]))
        table.add_section()
        flat = result.config.flat()
        for name in sorted(name for name in spec.space.axes if name in spec.space.active(flat)):
            value = flat[name]
            table.add_row(name, f"{value:.3g}" if isinstance(value, float) else str(value))
        console.print_table(table)
    if spec.goals.several:
        console.print_table(front_table(spec.goals, {result.study: result.front}))
    console.print(f"{tally(result.counts)}{refusals(result.refused, spec.goals)}, {result.seconds:.0f} s")
    place = store_flag(store)
    where = place + plugin_flags()
    use = f"    use: erpe predict {result.study} IMAGE{where}" if result.best is not None else ""
    print(f"look: {where_to_look(place)}    status: erpe status{where}{use}")
    if result.lag:
        why = f" ({result.problem})" if result.problem else ""
        print(f"{changes_wait(result.lag)} for MLflow; erpe sync{place} sends them{why}")


def front_table(goals: Goals, fronts: dict[str, dict[int, dict[str, float]]]) -> Table:
    """Return the front of each study or arm, a row a trial with its objectives."""
    within = f"; at most {goals.limits}" if goals.limits else ""
    table = Table(box=SIMPLE, title=f"Pareto front: {', '.join(goals.objectives)}{within}", title_justify="left")
    table.add_column("arm" if len(fronts) > 1 else "study", overflow="fold")
    for name in ("trial", *goals.objectives):
        table.add_column(name, justify="right", no_wrap=True)
    for arm, front in fronts.items():
        for trial, values in front.items():
            table.add_row(arm, str(trial), *(shown(name, values[name]) for name in goals.objectives))
    return table


def refusals(count: int, goals: Goals) -> str:
    """Return how many draws cost too much: `, 7 draws above flops 20,000,000 not trained`; or nothing."""
    return f", {count} draw{'s' * (count != 1)} above {goals.limits} not trained" if count else ""


def finished_words(study: str, ended: datetime, remedy: str) -> str:
    """Return the line about a study that had nothing left to do."""
    return printable(f"{study}: finished on {ended.astimezone():%Y-%m-%d %H:%M%z}, nothing was trained; {remedy}")


def where_to_look(where: str) -> str:
    """Return what to open: $ERPE_LOOK where a browser knows the server by another name; its address; or the own UI."""
    server = os.environ.get("ERPE_LOOK") or os.environ.get("MLFLOW_TRACKING_URI", "")
    return redact(server) if server.startswith(("http://", "https://")) else f"erpe ui{where}"


def continuation(command: list[str]) -> str:
    """How to go on after Ctrl-C."""
    words = shlex.join(repeatable(command[1:]))
    return printable(f"stopped; every finished epoch is saved. To continue: erpe {words}")


def result_json(result: TuneResult) -> dict[str, Any]:
    """`TuneResult` for scripts."""
    config, folder, ended = result.config, result.folder, result.finished
    own = {"config": config.model_dump(mode="json") if config else None, "folder": str(folder) if folder else None}
    own |= {"finished": ended.astimezone().isoformat(timespec="seconds") if ended else None}
    return asdict(result) | own | {"seconds": round(result.seconds, 1)}


def datasets_rows(data_dir: Path | None, store: Path) -> list[dict[str, Any]]:
    """Each data set with its form, and where it lies."""
    from erpe.datasets import DATASETS
    from erpe.training.download import find_data_dir, folder_of, missing_files
    from erpe.training.own import described

    root, found = find_data_dir(data_dir), []
    for facts in DATASETS.values():
        missing = missing_files(facts.name, root)
        where = f"{counted(len(missing), 'file')} not in {root}; downloaded when needed" if missing else ""
        found.append((facts, where or ("scikit-learn" if facts.name == "digits" else str(folder_of(facts.name, root)))))
    found += [(facts, f"own, {path}") for facts, path in described(store / "datasets")]
    return [
        {"name": facts.name, "image": facts.image, "classes": facts.classes, "train": facts.train, "test": facts.test}
        | {"where": where, "fingerprint": facts.fingerprint}
        for facts, where in found
    ]


def datasets_table(rows: list[dict[str, Any]]) -> None:
    """Print the same as a table."""
    table = Table(box=SIMPLE)
    for name in ("name", "image", "classes", "train", "test", "where"):
        table.add_column(
            name, no_wrap=name == "name", justify="right" if name in ("classes", "train", "test") else "left"
        )
    for row in rows:
        image = " x ".join(map(str, row["image"]))
        table.add_row(row["name"], image, str(row["classes"]), f"{row['train']:,}", f"{row['test']:,}", row["where"])
    Terminal().print_table(table)


def variants_rows(dataset: str | Dataset) -> list[dict[str, Any]]:
    """Each variant's parts, parameters and FLOPs at the default configuration of a data set."""
    from erpe.model.flops import is_counted
    from erpe.model.vit import parameter_count
    from erpe.training.evaluate import cost

    rows = []
    for variant in (*VARIANTS, *own_variants()):
        config = defaults(variant, dataset)
        attention, encoding = split_variant(variant)
        params = parameter_count(config.model)
        who = {"variant": variant, "attention": attention, "encoding": encoding, "params": params}
        rows.append(who | cost(config) | ({"counted": True} if is_counted(config.model) else {}))
    return rows


def variants_table(rows: list[dict[str, Any]], dataset: str) -> None:
    """Print the twelve variants."""
    table = Table(box=SIMPLE, title=f"variants, at the defaults of {dataset}", title_justify="left")
    for name in ("variant", "attention", "encoding"):
        table.add_column(name, no_wrap=True)
    for name in ("parameters", "MFLOPs forward", "MFLOPs training step"):
        table.add_column(name, justify="right")
    for row in rows:
        costs = (f"{row[name] / 1e6:.2f}" for name in ("flops/forward", "flops/train_step"))
        table.add_row(row["variant"], row["attention"], row["encoding"], f"{row['params']:,}", *costs)
    Terminal().print_table(table)
    if by_torch := [row["variant"] for row in rows if "counted" in row]:
        print(f"attention counted by torch, not in closed form: {', '.join(by_torch)}")


def checks_table(found: dict[str, list[Any]]) -> None:
    """What `erpe check-plugin` found, a row a variant and check."""
    table = Table(box=SIMPLE)
    for name in ("variant", "check", "", "found"):
        table.add_column(name, no_wrap=name != "found")
    for variant, checks in found.items():
        for check in checks:
            table.add_row(variant, check.what, {True: "well", False: "wrong", None: "-"}[check.well], check.text)
    Terminal().print_table(table)


def prediction_table(shares: dict[str, float]) -> None:
    """Print what the model sees, with bars."""
    for name, share in list(shares.items())[:5]:
        print(f"{name:>10}  {100 * share:5.1f} %  {'█' * round(30 * share)}".rstrip())


def doctor_table(findings: list[Any]) -> None:
    """One line a finding."""
    signs = {"well": Text("ok", "green"), "note": Text("note", "yellow"), "wrong": Text("wrong", "red")}
    table = Table(show_header=False, box=None)
    for finding in findings:
        table.add_row(signs[finding.state], finding.what, redact(finding.text))
    Terminal().print_table(table)


def print_tables(tables: list[Table], otherwise: str) -> None:
    """Tables for people, or a line if there is none."""
    console = Terminal()
    for table in tables:
        console.print_table(table)
    if not tables:
        print(with_store(otherwise))
