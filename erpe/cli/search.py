"""The commands that search: parse, call, print. Whatever is heavy is imported inside its command."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from erpe.cli.complete import runs, studies
from erpe.cli.options import (
    STORE,
    AsJson,
    AtMost,
    DataDir,
    DatasetOption,
    Device,
    Epochs,
    New,
    Notify,
    ObjectiveOption,
    Pack,
    Plugins,
    Resize,
    Seed,
    Settings,
    StoreOption,
    VariantOption,
    dataset_of,
    existing,
    limits_of,
    one_of,
    parse_settings,
)
from erpe.errors import INTERRUPTED, UNSENT

if TYPE_CHECKING:
    from erpe.results import Tuned

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
    trials: Annotated[int | None, typer.Option(help="Earlier ones included; default: 6 for digits, else 20.")] = None,
    epochs: Epochs = None,
    space: Annotated[Path | None, typer.Option(help="TOML file whose [space] is laid over the default space.")] = None,
    enqueue: Annotated[
        Path | None, typer.Option(help="TOML file with [[points]], tables of settings that the first trials have.")
    ] = None,
    warm_start: Annotated[
        str | None, typer.Option(help="A study whose best trial comes first.", autocompletion=studies)
    ] = None,
    settings: Settings = None,
    objective: ObjectiveOption = None,
    at_most: AtMost = None,
    sampler: Annotated[str, typer.Option(help="tpe, gp, nsgaii or random.")] = "tpe",
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
    notify: Notify = None,
    as_json: AsJson = False,
) -> None:
    """Search the best settings of a variant; test the best model once. The same command continues."""
    from erpe import api

    with showing(as_json, store) as show:
        show(api.tune(
            variant, dataset_of(dataset, resize, store, data_dir), trials=trials, store=store, name=name, new=new,
            epochs=epochs, settings=parse_settings(settings), space=space, enqueue=enqueue, warm_start=warm_start,
            objective=objective or "accuracy", at_most=limits_of(at_most), sampler=cast(Any, sampler),
            pruner=cast(Any, pruner), seed=seed, notify=notify, data_dir=data_dir, concurrency=concurrency,
            cpus_per_trial=cpus_per_trial, gpus_per_trial=gpus_per_trial, pack=pack, device=device,
            ray_address=ray_address, executor=cast(Any, executor),
        ))  # fmt: skip


def train(
    variant: VariantOption = "",
    dataset: DatasetOption = "",
    like: Annotated[
        str | None,
        typer.Option(
            help="A recorded run, as STUDY/3, whose variant, data set, settings and seed this one has but for what is "
            "given.",
            autocompletion=runs,
        ),
    ] = None,
    resize: Resize = None,
    plugin: Plugins = None,
    epochs: Epochs = None,
    settings: Settings = None,
    seed: Seed = 0,
    data_dir: DataDir = None,
    store: StoreOption = STORE,
    new: New = False,
    device: Device = "auto",
    notify: Notify = None,
    as_json: AsJson = False,
) -> None:
    """Train one configuration, or that of a recorded run, and test it: a study of one trial, in this process."""
    from erpe import api

    with showing(as_json, store) as show:
        show(api.train(
            variant, dataset and dataset_of(dataset, resize, store, data_dir), like=like, store=store, new=new,
            epochs=epochs, settings=parse_settings(settings), seed=seed, notify=notify, data_dir=data_dir,
            device=device,
        ))  # fmt: skip


@contextlib.contextmanager
def showing(as_json: bool, store: Path) -> Iterator[Callable[[Any], None]]:
    """Show what is found as a table or a JSON object; after Ctrl-C, say how to continue."""
    from erpe.cli.tables import continuation, result_json, result_table

    def show(found: Tuned) -> None:
        print(json.dumps(result_json(found.result))) if as_json else result_table(found.result, found.spec, store)
        if found.result.interrupted:
            raise KeyboardInterrupt
        _ = found.best  # raises, and says why, where no trial was completed
        if found.result.lag:
            raise typer.Exit(UNSENT)

    try:
        yield show
    except KeyboardInterrupt:
        print(continuation(sys.argv), file=sys.stderr)
        raise typer.Exit(INTERRUPTED) from None


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


def changes_of(
    settings: list[str] | None, budget: str | None, objective: str | None = None, at_most: list[str] | None = None
) -> list[str]:
    """Lines of the study file that the command line changes.

    Raises:
        ConfigError: two of them contradict each other.
    """
    from erpe.study.entries import check_agreement

    if budget:
        one_of("budget", budget, ("trials", "epochs", "flops"))
    changes = [*(settings or []), *([f"search.budget={budget}"] if budget else [])]
    changes += [f"search.objective={json.dumps(objective)}"] if objective else []
    changes += [f"search.at_most.{name}={json.dumps(most)}" for name, most in limits_of(at_most).items()]
    check_agreement(changes)
    return changes


@study_app.command("run")
def study_run(
    file: StudyFile,
    budget: BudgetOption = None,
    objective: ObjectiveOption = None,
    at_most: AtMost = None,
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
    notify: Notify = None,
    as_json: AsJson = False,
) -> None:
    """Search, confirm and test every variant of a study file. The same command continues."""
    from erpe import api
    from erpe.cli.status import result_lines
    from erpe.report.terminal import ending

    with showing(as_json, store):
        study = api.run_study(
            file, changes=changes_of(settings, budget, objective, at_most), store=store, offline=offline,
            replaces=replace, notify=notify, data_dir=data_dir, device=device, concurrency=concurrency,
            cpus_per_trial=cpus_per_trial, gpus_per_trial=gpus_per_trial, pack=pack,
            ray_address=ray_address, executor=cast(Any, executor),
        )  # fmt: skip
        result = study.result
        assert result
        if result.interrupted:
            raise KeyboardInterrupt
    if as_json:
        finished = result.finished.astimezone().isoformat(timespec="seconds") if result.finished else None
        told = {"openings": result.openings._asdict(), "report": result.page and str(result.page), "finished": finished}
        print(json.dumps({name: value for name, value in asdict(result).items() if name != "page"} | told))
    else:
        print("\n".join(result_lines(result, store)), end=f"\n\n{ending(study.comparison())}")
    if result.lag:
        raise typer.Exit(UNSENT)


@study_app.command("show")
def study_show(
    file: StudyFile,
    budget: BudgetOption = None,
    objective: ObjectiveOption = None,
    at_most: AtMost = None,
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
    from erpe.cli.plan import counted_note, detectable, plan_notes, plan_rows, plan_table, time_notes
    from erpe.study.plan import load_plan

    plan = load_plan(file, changes_of(settings, budget, objective, at_most))
    rows, probed = plan_rows(plan), None
    found = detectable(plan, sd)
    if probe:
        from erpe.bench.probe import probe as measure

        probed = measure(plan, device=device, threads=cpus_per_trial, concurrency=concurrency)
    if as_json:
        told = {"study": plan.resolved().model_dump(mode="json"), "arms": rows, "sd_points": sd}
        told |= {"detectable_points": found, "probe": probed and probed._asdict()}
        print(json.dumps(told))
        return
    notes = plan_notes(plan, rows, sd) + counted_note(plan)
    plan_table(plan, rows, notes + (time_notes(probed) if probed else []))


@study_app.command("status")
def study_status(
    study: Annotated[str | None, typer.Argument(help="Its name; default: all.")] = None,
    store: StoreOption = STORE,
    live: Annotated[bool, typer.Option("--live", help="Show it again and again until it is done.")] = False,
    plugin: Plugins = None,
    as_json: AsJson = False,
) -> None:
    """Show each variant: trials by state, best, confirmed runs, seconds left."""
    from erpe.cli.status import status_tables, statuses, watch
    from erpe.cli.tables import print_tables

    if live:
        watch(existing(store), study)
        return
    found = statuses(existing(store), study)
    if as_json:
        parts = [{"openings": each.openings._asdict(), "arms": [arm._asdict() for arm in each.arms]} for each in found]
        print(json.dumps([each._asdict() | part for each, part in zip(found, parts, strict=True)]))
    else:
        print_tables(status_tables(found), "no study to show; `erpe study run FILE` makes one")


@study_app.command("schema")
def study_schema() -> None:
    """Print the JSON Schema of a study file, for editors."""
    from erpe.study.plan import schema

    print(schema(), end="")
