"""The commands of study files: parse, call, print. Whatever is heavy is imported inside its command."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated, Any, cast

import typer

from erpe.cli import options
from erpe.cli.complete import plans
from erpe.cli.options import STORE, limits_of, one_of
from erpe.cli.search import showing
from erpe.errors import UNSENT
from erpe.store import Store

study_app = typer.Typer(
    help="Compare variants fairly: search each one, confirm the best with fresh seeds, test once.", no_args_is_help=True
)
StudyFile = Annotated[
    str,
    typer.Argument(
        help="A study file, as studies/digits_nine.toml; or the name of a study in the store.", autocompletion=plans
    ),
]
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
    objective: options.ObjectiveOption = None,
    at_most: options.AtMost = None,
    settings: Changes = None,
    plugin: options.Plugins = None,
    data_dir: options.DataDir = None,
    store: options.StoreOption = STORE,
    concurrency: options.Concurrency = None,
    cpus_per_trial: options.CpusPerTrial = 1,
    gpus_per_trial: options.GpusPerTrial = None,
    pack: options.Pack = 1,
    device: options.Device = "auto",
    ray_address: options.RayAddress = None,
    executor: options.Executor = "ray",
    offline: Annotated[bool, typer.Option("--offline", help="Without MLflow; `erpe sync` sends it later.")] = False,
    replace: Annotated[
        bool, typer.Option("--replace", help="Replace test results that a changed file makes old.")
    ] = False,
    notify: options.Notify = None,
    as_json: options.AsJson = False,
) -> None:
    """Search, confirm and test every variant of a study file. The same command, or `erpe study run NAME`, continues."""
    with showing(as_json, store):
        from erpe import api
        from erpe.cli.status import result_lines

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
        from erpe.report.terminal import ending  # brings pandas

        print("\n".join(result_lines(result, store)), end=f"\n\n{ending(study.comparison())}")
    if result.lag:
        raise typer.Exit(UNSENT)


@study_app.command("show")
def study_show(
    file: StudyFile,
    budget: BudgetOption = None,
    objective: options.ObjectiveOption = None,
    at_most: options.AtMost = None,
    settings: Changes = None,
    plugin: options.Plugins = None,
    store: options.StoreOption = STORE,
    sd: Annotated[
        float, typer.Option("--sd", help="Of paired differences, in points, to say what can be found.")
    ] = 0.7,
    probe: Annotated[
        bool, typer.Option("--probe", help="Train each arm for seconds, to say how long it takes.")
    ] = False,
    concurrency: options.Concurrency = None,
    cpus_per_trial: options.CpusPerTrial = 1,
    device: options.Device = "auto",
    as_json: options.AsJson = False,
) -> None:
    """Print the resolved file: every default, every arm, its cost, and what the seeds can find.

    What it prints is a study file again; with --probe it tells how long the study takes here.
    """
    from erpe.cli.plan import counted_note, detectable, plan_notes, plan_rows, plan_table, time_notes
    from erpe.study.plan_file import find_plan

    plan = find_plan(file, changes_of(settings, budget, objective, at_most), Store(store))
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
    store: options.StoreOption = STORE,
    live: Annotated[bool, typer.Option("--live", help="Show it again and again until it is done.")] = False,
    plugin: options.Plugins = None,
    as_json: options.AsJson = False,
) -> None:
    """Show each variant: trials by state, best, confirmed runs, seconds left."""
    from erpe.cli.status import status_tables, statuses, watch
    from erpe.cli.tables import print_tables

    if live:
        watch(Store.existing(store), study)
        return
    found = statuses(Store.existing(store), study)
    if as_json:
        parts = [{"openings": each.openings._asdict(), "arms": [arm._asdict() for arm in each.arms]} for each in found]
        print(json.dumps([each._asdict() | part for each, part in zip(found, parts, strict=True)]))
    else:
        print_tables(status_tables(found), "no study to show; `erpe study run FILE` makes one")


@study_app.command("schema")
def study_schema() -> None:
    """Print the JSON Schema of a study file, for editors."""
    from erpe.study.plan_file import schema

    print(schema(), end="")
