"""The commands that search: parse, call, print. Whatever is heavy is imported inside its command."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from erpe.cli.options import (
    STORE,
    AsJson,
    DataDir,
    DatasetOption,
    Device,
    Epochs,
    New,
    Pack,
    Plugins,
    Resize,
    Seed,
    Settings,
    StoreOption,
    VariantOption,
    dataset_of,
    existing,
    one_of,
    parse_settings,
)
from erpe.errors import INTERRUPTED, UNSENT, ErpeError

Concurrency = Annotated[int | None, typer.Option(help="Trials at a time; default: what the machine allows.")]
CpusPerTrial = Annotated[int, typer.Option(help="CPUs, and threads, of a trial.")]
GpusPerTrial = Annotated[
    float | None, typer.Option(help="GPUs of a trial, or a part of one; default: all there are, shared evenly.")
]
RayAddress = Annotated[str | None, typer.Option(help="Of a Ray cluster; default: $ERPE_RAY_ADDRESS, or here.")]
Executor = Annotated[str, typer.Option(help="ray, or inline: one trial after the other, without Ray.")]


def tune(
    variant: VariantOption,
    dataset: DatasetOption,
    resize: Resize = None,
    plugin: Plugins = None,
    trials: Annotated[
        int | None,
        typer.Option(help="Trials of the study, earlier ones included; default: 6 for digits, 20 for others."),
    ] = None,
    epochs: Epochs = None,
    space: Annotated[Path | None, typer.Option(help="TOML file whose [space] is laid over the default space.")] = None,
    settings: Settings = None,
    sampler: Annotated[str, typer.Option(help="tpe, gp or random.")] = "tpe",
    pruner: Annotated[str, typer.Option(help="auto, asha, hyperband, median or none.")] = "auto",
    seed: Seed = 0,
    data_dir: DataDir = None,
    store: StoreOption = STORE,
    name: Annotated[str | None, typer.Option(help="Of the study; default: DATASET-VARIANT.")] = None,
    new: New = False,
    concurrency: Concurrency = None,
    cpus_per_trial: CpusPerTrial = 1,
    gpus_per_trial: GpusPerTrial = None,
    pack: Pack = 1,
    device: Device = "auto",
    ray_address: RayAddress = None,
    executor: Executor = "ray",
    as_json: AsJson = False,
) -> None:
    """Search the best settings of a variant; test the best model once. The same command continues."""
    from erpe.datasets import facts_of
    from erpe.study.search_space import load_space
    from erpe.study.spec import define

    given, data = parse_settings(settings), dataset_of(dataset, resize, store, data_dir)
    ranges = load_space(space, variant, data, given) if space else None
    spec = define(
        variant, data, space=ranges, settings=given, epochs=epochs,
        sampler=one_of("sampler", sampler, ("tpe", "gp", "random")),
        pruner=one_of("pruner", pruner, ("auto", "asha", "hyperband", "median", "none")), seed=seed,
    )  # fmt: skip
    usual = DEFAULT_TRIALS[facts_of(data).like]
    run_study(
        spec, store, as_json, trials=usual if trials is None else trials, data_dir=data_dir,
        name=name, new=new, concurrency=concurrency, cpus_per_trial=cpus_per_trial, gpus_per_trial=gpus_per_trial,
        pack=pack, device=device, ray_address=ray_address, executor=one_of("executor", executor, ("ray", "inline")),
    )  # fmt: skip


def train(
    variant: VariantOption,
    dataset: DatasetOption,
    resize: Resize = None,
    plugin: Plugins = None,
    epochs: Epochs = None,
    settings: Settings = None,
    seed: Seed = 0,
    data_dir: DataDir = None,
    store: StoreOption = STORE,
    new: New = False,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Train one configuration and test it: a study of one trial, in this process."""
    from erpe.store import Store
    from erpe.study.distributions import Space
    from erpe.study.lookup import identified
    from erpe.study.spec import define

    data = dataset_of(dataset, resize, store, data_dir)
    spec = define(
        variant, data, space=Space(axes={}), settings=parse_settings(settings), epochs=epochs,
        sampler="random", pruner="none", seed=seed,
    )  # fmt: skip
    name = identified(Store.open(store), f"train-{spec.name}", spec)
    run_study(
        spec, store, as_json, trials=1, data_dir=data_dir, name=name, new=new, device=device, executor="inline"
    )  # fmt: skip


DEFAULT_TRIALS = {"digits": 6, "mnist": 20, "cifar10": 20}
"""Trials of `erpe tune`, by the kind of data set."""


def run_study(spec: Any, store: Path, as_json: bool, **how: Any) -> None:
    """Tune, show it while it goes on, and end with a table or a JSON object."""
    from erpe.cli.tables import LiveProgress, result_json, result_table
    from erpe.search.tune import tune as run
    from erpe.store import Store

    opened = Store.open(store)
    check_tracking(opened)
    with interruptible_command():
        with LiveProgress(spec) as progress:
            result = run(spec, opened, progress=progress, **how)
        print(json.dumps(result_json(result))) if as_json else result_table(result, spec, store)
        if result.interrupted:
            raise KeyboardInterrupt
    if result.best is None:
        raise ErpeError(f"study {result.study}: no trial was completed; {first_reason(result.reasons)}")
    if result.lag:
        raise typer.Exit(UNSENT)


@contextlib.contextmanager
def interruptible_command() -> Iterator[None]:
    """After Ctrl-C, say how to continue."""
    from erpe.cli.tables import continuation

    try:
        yield
    except KeyboardInterrupt:
        print(continuation(sys.argv), file=sys.stderr)
        raise typer.Exit(INTERRUPTED) from None


def first_reason(reasons: dict[int, str]) -> str:
    """Why the first failed trial failed, in a line."""
    from erpe.text import last_line

    return next((f"trial {n}: {last_line(why)}" for n, why in sorted(reasons.items())), "see erpe status")


def check_tracking(store: Any) -> None:
    """Say before a long search that its results will wait in the outbox, because the server is down.

    Raises:
        TrackingError: the server refuses us, is not MLflow, or its database is of another version.
    """
    from erpe.errors import TrackingError
    from erpe.text import line
    from erpe.tracking.connection import examine

    health = examine(store.tracking_uri)
    if health.state == "refuses":
        raise TrackingError(health.line)
    if health.state == "down":
        print(f"warning: {line(health.line)}", file=sys.stderr)


study_app = typer.Typer(
    help="Compare variants fairly: search each one, confirm the best with fresh seeds, test once.", no_args_is_help=True
)
StudyFile = Annotated[Path, typer.Argument(help="A study file, as studies/digits_nine.toml.")]
Changes = Annotated[
    list[str] | None, typer.Option("--set", help="A line of the file, as search.trials=2; may be repeated.")
]
BudgetOption = Annotated[
    str | None,
    typer.Option("--budget", help="What is equal for all: trials, epochs or flops; default: as in the file."),
]


def changes_of(settings: list[str] | None, budget: str | None) -> list[str]:
    """Lines of the study file that the command line changes.

    Raises:
        ConfigError: two of them contradict each other.
    """
    from erpe.study.plan import check_agreement

    if budget:
        one_of("budget", budget, ("trials", "epochs", "flops"))
    changes = [*(settings or []), *([f"search.budget={budget}"] if budget else [])]
    check_agreement(changes)
    return changes


@study_app.command("run")
def study_run(
    file: StudyFile,
    budget: BudgetOption = None,
    settings: Changes = None,
    data_dir: DataDir = None,
    store: StoreOption = STORE,
    concurrency: Concurrency = None,
    cpus_per_trial: CpusPerTrial = 1,
    gpus_per_trial: GpusPerTrial = None,
    pack: Pack = 1,
    device: Device = "auto",
    ray_address: RayAddress = None,
    executor: Executor = "ray",
    offline: Annotated[bool, typer.Option("--offline", help="Without MLflow; `erpe sync` sends it later.")] = False,
    replace: Annotated[
        bool, typer.Option("--replace", help="Replace test results that a changed file makes old.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Search, confirm and test every variant of a study file. The same command continues."""
    from erpe.cli.status import StudyProgress, result_lines
    from erpe.report.comparison import compare
    from erpe.report.publish import publish
    from erpe.report.sources.store import load
    from erpe.report.terminal import ending
    from erpe.search.run_study import run
    from erpe.store import Store
    from erpe.study.plan import load_plan

    chosen, opened = one_of("executor", executor, ("ray", "inline")), Store.open(store)
    plan = load_plan(file, changes_of(settings, budget), opened.datasets)
    if not offline:
        check_tracking(opened)
    with interruptible_command():
        with StudyProgress(plan, opened) as progress:
            result = run(
                plan, opened, data_dir=data_dir, device=device, concurrency=concurrency, cpus_per_trial=cpus_per_trial,
                gpus_per_trial=gpus_per_trial, pack=pack, ray_address=ray_address, executor=chosen, offline=offline,
                replace=replace, progress=progress,
            )  # fmt: skip
        if result.interrupted:
            raise KeyboardInterrupt
        if not result.confirmed:
            raise ErpeError(f"study {result.study}: no trial was completed; {next(iter(result.failed.values()))}")
        outcomes = load(opened, [plan.name])
        comparison = compare(outcomes)
        page, lag = (None, 0) if offline else publish(plan, opened, outcomes, comparison)
    if as_json:
        finished = result.finished.astimezone().isoformat(timespec="seconds") if result.finished else None
        told = {"openings": result.openings._asdict(), "report": page and str(page), "lag": lag, "finished": finished}
        print(json.dumps(asdict(result) | told))
    else:
        print("\n".join(result_lines(result, lag, page, store)), end=f"\n\n{ending(comparison)}")
    if lag:
        raise typer.Exit(UNSENT)


@study_app.command("show")
def study_show(
    file: StudyFile,
    budget: BudgetOption = None,
    settings: Changes = None,
    sd: Annotated[
        float, typer.Option("--sd", help="Of paired differences, in points, to say what can be found.")
    ] = 0.7,
    probe: Annotated[
        bool, typer.Option("--probe", help="Train each arm for seconds, to say how long it takes.")
    ] = False,
    concurrency: Concurrency = None,
    cpus_per_trial: CpusPerTrial = 1,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Print the resolved file: every default, every arm, its cost, and what the seeds can find.

    What it prints is a study file again; with --probe it tells how long the study takes here.
    """
    from erpe.cli.plan import counted_note, plan_notes, plan_rows, plan_table, time_notes
    from erpe.study.plan import load_plan

    plan = load_plan(file, changes_of(settings, budget))
    if as_json:
        print(json.dumps(plan.resolved().model_dump(mode="json")))
        return
    rows = plan_rows(plan)
    notes = plan_notes(plan, rows, sd) + counted_note(plan)
    if probe:
        from erpe.bench.probe import probe as measure

        notes += time_notes(measure(plan, device=device, threads=cpus_per_trial, concurrency=concurrency))
    plan_table(plan, rows, notes)


@study_app.command("status")
def study_status(
    study: Annotated[str | None, typer.Argument(help="Its name; default: all.")] = None,
    store: StoreOption = STORE,
    live: Annotated[bool, typer.Option("--live", help="Show it again and again until it is done.")] = False,
    plugin: Plugins = None,
    as_json: AsJson = False,
) -> None:
    """Show each variant: trials by state, best, confirmed runs, seconds left."""
    from erpe.cli.status import status_table, statuses, watch
    from erpe.cli.tables import print_tables

    if live:
        watch(existing(store), study)
        return
    found = statuses(existing(store), study)
    if as_json:
        print(
            json.dumps(
                [
                    {
                        **each._asdict(),
                        "openings": each.openings._asdict(),
                        "arms": [arm._asdict() for arm in each.arms],
                    }
                    for each in found
                ]
            )
        )
    else:
        print_tables([status_table(each) for each in found], "no studies yet; `erpe study run FILE` makes one")


@study_app.command("schema")
def study_schema() -> None:
    """Print the JSON Schema of a study file, for editors."""
    from erpe.study.plan import schema

    print(schema(), end="")
