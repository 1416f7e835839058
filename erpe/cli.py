"""The command line: parse, call, print. Whatever is heavy is imported inside its command.

Exit codes: 0 done; 1 a mistake, told in one line; 2 a command line that makes no sense; 3 done, but MLflow has not
got everything yet; 130 interrupted, to be continued by the same command.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from erpe import __version__
from erpe.cli_bench import bench_app
from erpe.cli_jobs import jobs_app, submit
from erpe.errors import ConfigError, ErpeError
from erpe.options import (
    AsJson,
    DataDir,
    DatasetOption,
    Device,
    Epochs,
    New,
    Pack,
    Seed,
    Settings,
    StoreOption,
    VariantOption,
    one_of,
    parse_settings,
)

UNSENT, INTERRUPTED = 3, 130

app = typer.Typer(
    name="erpe",
    help="Tune and compare Vision Transformers with softmax and linear attention, with and without relative positions.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

STORE = Path("runs")


@app.command()
def tune(
    variant: VariantOption,
    dataset: DatasetOption,
    trials: Annotated[int | None, typer.Option(help="Trials of the study, earlier ones included.")] = None,
    epochs: Epochs = None,
    space: Annotated[Path | None, typer.Option(help="TOML file whose [space] is laid over the default.")] = None,
    settings: Settings = None,
    sampler: Annotated[str, typer.Option(help="tpe, gp, cmaes or random.")] = "tpe",
    pruner: Annotated[str, typer.Option(help="asha, hyperband, median or none.")] = "asha",
    seed: Seed = 0,
    data_dir: DataDir = None,
    store: StoreOption = STORE,
    name: Annotated[str | None, typer.Option(help="Of the study; none: DATASET-VARIANT.")] = None,
    new: New = False,
    concurrency: Annotated[int | None, typer.Option(help="Trials at a time; none: what the machine allows.")] = None,
    cpus_per_trial: Annotated[int, typer.Option(help="CPUs, and threads, of a trial.")] = 1,
    gpus_per_trial: Annotated[float | None, typer.Option(help="GPUs of a trial, or a part of one.")] = None,
    pack: Pack = 1,
    device: Device = "auto",
    ray_address: Annotated[str | None, typer.Option(help="Of a Ray cluster; none: $ERPE_RAY_ADDRESS, or here.")] = None,
    executor: Annotated[str, typer.Option(help="ray, or inline: one trial after the other, without Ray.")] = "ray",
    as_json: AsJson = False,
) -> None:
    """Search the best settings of a variant; test the best model once. The same command continues."""
    from erpe.search.space import load_space
    from erpe.search.study import define

    ranges = load_space(space, variant, dataset) if space else None
    spec = define(
        variant, dataset, space=ranges, settings=parse_settings(settings), epochs=epochs,
        sampler=one_of("sampler", sampler, ("tpe", "gp", "cmaes", "random")),
        pruner=one_of("pruner", pruner, ("asha", "hyperband", "median", "none")), seed=seed,
    )  # fmt: skip
    run_study(
        spec, store, as_json, trials=DEFAULT_TRIALS[dataset] if trials is None else trials, data_dir=data_dir,
        name=name, new=new, concurrency=concurrency, cpus_per_trial=cpus_per_trial, gpus_per_trial=gpus_per_trial,
        pack=pack, device=device, ray_address=ray_address, executor=one_of("executor", executor, ("ray", "inline")),
    )  # fmt: skip


@app.command()
def train(
    variant: VariantOption,
    dataset: DatasetOption,
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
    from erpe.search.axes import Space
    from erpe.search.study import define

    spec = define(
        variant, dataset, space=Space(axes={}), settings=parse_settings(settings), epochs=epochs,
        sampler="random", pruner="none", seed=seed,
    )  # fmt: skip
    name = f"train-{spec.name}-{spec.identity[:6]}"
    run_study(
        spec, store, as_json, trials=1, data_dir=data_dir, name=name, new=new, device=device, executor="inline"
    )  # fmt: skip


DEFAULT_TRIALS = {"digits": 6, "mnist": 20, "cifar10": 20}
"""Trials of `erpe tune`, by data set."""


def run_study(spec: Any, store: Path, as_json: bool, **how: Any) -> None:
    """Tune, show it while it goes on, and end with a table or a JSON object."""
    from erpe.search.tune import tune as run
    from erpe.show import LiveProgress, result_json, result_table
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
    from erpe.show import continuation

    try:
        yield
    except KeyboardInterrupt:
        print(continuation(sys.argv), file=sys.stderr)
        raise typer.Exit(INTERRUPTED) from None


def first_reason(reasons: dict[int, str]) -> str:
    """Why the first failed trial failed, in a line."""
    return next((f"trial {n}: {why.strip().splitlines()[-1]}" for n, why in sorted(reasons.items())), "see erpe status")


def check_tracking(store: Any) -> None:
    """Say before a long search that its results will wait in the spool, because the server is down.

    Raises:
        TrackingError: the server refuses us, is not MLflow, or its database is of another version.
    """
    from erpe.errors import TrackingError
    from erpe.telling import line
    from erpe.tracking.server import examine

    health = examine(store.tracking_uri)
    if health.state == "refuses":
        raise TrackingError(health.line)
    if health.state == "down":
        print(f"warning: {line(health.line)}", file=sys.stderr)


study_app = typer.Typer(
    help="Compare variants fairly: search each one, confirm the best with fresh seeds, test once.", no_args_is_help=True
)
app.add_typer(study_app, name="study")
StudyFile = Annotated[Path, typer.Argument(help="A study file, as studies/digits_nine.toml.")]
Changes = Annotated[
    list[str] | None, typer.Option("--set", help="A line of the file, as search.trials=2; may be repeated.")
]


BudgetOption = Annotated[str | None, typer.Option("--budget", help="What is equal for all: trials, epochs or flops.")]


def changes_of(settings: list[str] | None, budget: str | None) -> list[str]:
    """Lines of the study file that the command line changes."""
    return [*(settings or []), *([f"search.budget={budget}"] if budget else [])]


@study_app.command("run")
def study_run(
    file: StudyFile,
    budget: BudgetOption = None,
    settings: Changes = None,
    data_dir: DataDir = None,
    store: StoreOption = STORE,
    concurrency: Annotated[int | None, typer.Option(help="Trials at a time; none: what the machine allows.")] = None,
    cpus_per_trial: Annotated[int, typer.Option(help="CPUs, and threads, of a trial.")] = 1,
    gpus_per_trial: Annotated[float | None, typer.Option(help="GPUs of a trial, or a part of one.")] = None,
    pack: Pack = 1,
    device: Device = "auto",
    ray_address: Annotated[str | None, typer.Option(help="Of a Ray cluster; none: $ERPE_RAY_ADDRESS, or here.")] = None,
    executor: Annotated[str, typer.Option(help="ray, or inline: one trial after the other, without Ray.")] = "ray",
    offline: Annotated[bool, typer.Option("--offline", help="Without MLflow; `erpe sync` sends it later.")] = False,
    as_json: AsJson = False,
) -> None:
    """Search, confirm and test every variant of a study file. The same command continues."""
    from erpe.publish import publish
    from erpe.search.campaign import run
    from erpe.search.plan import load_plan
    from erpe.store import Store
    from erpe.watch import StudyProgress, result_lines

    plan = load_plan(file, changes_of(settings, budget))
    chosen, opened = one_of("executor", executor, ("ray", "inline")), Store.open(store)
    if not offline:
        check_tracking(opened)
    with interruptible_command():
        with StudyProgress(plan, opened) as progress:
            result = run(
                plan, opened, data_dir=data_dir, device=device, concurrency=concurrency, cpus_per_trial=cpus_per_trial,
                gpus_per_trial=gpus_per_trial, pack=pack, ray_address=ray_address, executor=chosen, offline=offline,
                progress=progress,
            )  # fmt: skip
        if result.interrupted:
            raise KeyboardInterrupt
        if not result.confirmed:
            raise ErpeError(f"study {result.study}: no trial was completed; {next(iter(result.failed.values()))}")
        page, lag = (None, 0) if offline else publish(plan, opened)
    lines = result_lines(result, lag, page, store)
    print(json.dumps(asdict(result) | {"report": page and str(page), "lag": lag})) if as_json else print(
        "\n".join(lines)
    )
    if lag:
        raise typer.Exit(UNSENT)


@study_app.command("show")
def study_show(file: StudyFile, budget: BudgetOption = None, settings: Changes = None, as_json: AsJson = False) -> None:
    """Print the resolved file: every default, every arm and its cost. What it prints is a study file again."""
    from erpe.search.plan import load_plan
    from erpe.show import plan_rows, plan_table

    plan = load_plan(file, changes_of(settings, budget))
    print(json.dumps(plan.resolved().model_dump(mode="json"))) if as_json else plan_table(plan, plan_rows(plan))


@study_app.command("status")
def study_status(
    study: Annotated[str | None, typer.Argument(help="Its name; none: all.")] = None,
    store: StoreOption = STORE,
    live: Annotated[bool, typer.Option("--live", help="Show it again and again until it is done.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show each variant: trials by state, best, confirmed runs, seconds left."""
    from erpe.show import print_tables
    from erpe.watch import status_table, statuses, watch

    if live:
        watch(existing(store), study)
        return
    found = statuses(existing(store), study)
    if as_json:
        print(json.dumps([{**each._asdict(), "arms": [arm._asdict() for arm in each.arms]} for each in found]))
    else:
        print_tables([status_table(each) for each in found], "no studies yet; `erpe study run FILE` makes one")


@study_app.command("schema")
def study_schema() -> None:
    """Print the JSON Schema of a study file, for editors."""
    from erpe.search.plan import schema

    print(schema(), end="")


Studies = Annotated[list[str] | None, typer.Argument(help="Names of studies; none: all.")]
Server = Annotated[str | None, typer.Option("--server", help="Read a tracking server, as http://HOST:5000.")]


@app.command()
def compare(
    studies: Studies = None,
    style: Annotated[
        str, typer.Option("--format", help="terminal, markdown, csv, parquet, json or latex.")
    ] = "terminal",
    output: Annotated[Path | None, typer.Option("--output", "-o", help="A file; none: print.")] = None,
    against: Annotated[
        str | None, typer.Option(help="A study whose arms those of the others are compared with.")
    ] = None,
    store: StoreOption = STORE,
    server: Server = None,
) -> None:
    """Compare confirmed runs: every measure with its interval, and which differences are real."""
    from erpe.report.comparison import compare as compared
    from erpe.report.tables import FORMATS, render

    style = one_of("format", style, tuple(FORMATS))
    text = render(compared(outcomes_of(studies, against, store, server), against), style)
    if output is not None:
        write_output(output, text)
    elif isinstance(text, bytes):
        raise ConfigError(f"--format {style}: not for a terminal; --output FILE would do")
    else:
        print(text, end="" if text.endswith("\n") else "\n")


@app.command()
def report(
    studies: Studies = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="The page.")] = Path("report.html"),
    figures: Annotated[Path | None, typer.Option(help="Folder for the figures as PDF and SVG.")] = None,
    against: Annotated[
        str | None, typer.Option(help="A study whose arms those of the others are compared with.")
    ] = None,
    store: StoreOption = STORE,
    server: Server = None,
) -> None:
    """Write the page of a study: tables and figures in one file that opens offline."""
    from erpe.report.charts import save_all
    from erpe.report.comparison import compare as compared
    from erpe.report.page import write_report
    from erpe.telling import printable

    outcomes = outcomes_of(studies, against, store, server)
    comparison = compared(outcomes, against)
    written(output, lambda: write_report(outcomes, comparison, output))
    print(f"{printable(str(output))}: open it in a browser")
    if figures:
        written(figures, lambda: save_all(outcomes, comparison, figures))
        print(f"{printable(str(figures))}: every figure as PDF and SVG")


def outcomes_of(studies: list[str] | None, against: str | None, store: Path, server: str | None) -> Any:
    """What the store, or a tracking server, has of these studies and of the one they are compared with."""
    if studies and against:
        studies = [*studies, against]
    if server:
        from erpe.tracking.reading import read

        return read(server, studies or [])
    from erpe.report.load import load

    return load(existing(store), studies or [])


def write_output(path: Path, content: str | bytes) -> None:
    """Write a file whole, and say so."""
    from erpe.store import write_atomic
    from erpe.telling import printable

    written(path, lambda: write_atomic(path, content))
    print(f"{printable(str(path))}: written")


def written(path: Path, write: Callable[[], object]) -> None:
    """Write; a folder that is not there or a full disk is one line.

    Raises:
        StoreError: it cannot be written.
    """
    from erpe.errors import StoreError

    try:
        write()
    except OSError as error:
        raise StoreError(f"{path}: cannot be written ({error.strerror or error})") from None


@app.command()
def variants(dataset: DatasetOption = "mnist", as_json: AsJson = False) -> None:
    """List the twelve variants with their size and cost at the default configuration."""
    from erpe.show import variants_rows, variants_table

    rows = variants_rows(dataset)
    print(json.dumps(rows)) if as_json else variants_table(rows, dataset)


@app.command()
def status(
    study: Annotated[str | None, typer.Argument(help="Its name; none: all.")] = None,
    store: StoreOption = STORE,
    as_json: AsJson = False,
) -> None:
    """Show studies and their trials, finished or running."""
    from erpe.show import status_rows, status_table

    rows = status_rows(existing(store), study)
    print(json.dumps(rows)) if as_json else status_table(rows)


@app.command()
def sync(
    source: Annotated[
        str | None, typer.Argument(help="A study; or the folder of a store filled elsewhere. None: all studies.")
    ] = None,
    store: StoreOption = STORE,
) -> None:
    """Bring MLflow up to date: what waits, and what it has lost. A store filled elsewhere is taken over first."""
    from erpe.mend import mend

    if source and "/" in source and not Path(source).is_dir():
        raise ConfigError(f"{source}: no such folder; one that `erpe study run --store` filled would do")
    if source and is_foreign(source, store):
        opened, studies = take_over(Path(source), store)
    else:
        opened, studies = existing(store), [source]
    if sum(mend(opened, study, print, lambda text: print(f"warning: {text}", file=sys.stderr)) for study in studies):
        raise typer.Exit(UNSENT)


def is_foreign(source: str, store: Path) -> bool:
    """Whether it is a folder, and not one that happens to be named as a study."""
    return Path(source).is_dir() and (
        Path(source, "erpe.json").exists() or not (store / f"spool/{source}.jsonl").exists()
    )


def take_over(folder: Path, store: Path) -> tuple[Any, list[str | None]]:
    """Bring what a store has into ours; ours and the studies that have a spool.

    Raises:
        StoreError: there is no store in the folder, or see `erpe.search.adopt.adopt`.
    """
    from erpe.errors import StoreError
    from erpe.search.adopt import adopt
    from erpe.store import Store

    if not (folder / "erpe.json").exists():
        raise StoreError(f"{folder}: a folder, but not a store; one that `erpe study run --store` filled would do")
    opened = Store.open(store)
    found = adopt(folder, opened)
    for study, trials, events in found:
        print(f"{study}: {trials} trials and {events} events taken over" if trials or events else f"{study}: no news")
    return opened, [each.study for each in found if (opened.spool / f"{each.study}.jsonl").exists()]


@app.command()
def gc(
    study: Annotated[str | None, typer.Argument(help="Its name; none: all that were run from the store.")] = None,
    keep_best: Annotated[int | None, typer.Option(metavar="K", help="All but the K best trials of a study.")] = None,
    older_than: Annotated[float | None, typer.Option(metavar="DAYS", help="Trials that ended so long ago.")] = None,
    failed: Annotated[bool, typer.Option("--failed", help="Trials that failed.")] = False,
    dangling: Annotated[bool, typer.Option("--dangling", help="What belongs to no trial and no run.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Change nothing; show what would go.")] = False,
    store: StoreOption = STORE,
    as_json: AsJson = False,
) -> None:
    """Remove checkpoints and runs of trials; never the best, a registered, a confirmed or an unfinished one.

    With several conditions a trial goes if all of them name it. What was measured stays in the database.
    """
    from erpe.search.policy import Policy
    from erpe.search.retention import gc as collect
    from erpe.sweep import sweep_json, sweep_table

    opened = existing(store)
    found = collect(opened, Policy(keep_best, older_than, failed), study=study, dangling=dangling, dry_run=dry_run)
    print(json.dumps(sweep_json(found, opened, dry_run))) if as_json else sweep_table(found, opened, dry_run)
    if found.lag:
        raise typer.Exit(UNSENT)


@app.command()
def ui(
    store: StoreOption = STORE,
    port: Annotated[int, typer.Option(help="On 127.0.0.1.")] = 5000,
) -> None:
    """Open the MLflow UI on the store, on this machine only."""
    from erpe.serve import serve

    serve(existing(store), port)


@app.command()
def predict(
    run: Annotated[
        str, typer.Argument(help="A study (its best trial), STUDY/NUMBER, a trial's folder, or an MLflow run.")
    ],
    image: Annotated[Path, typer.Argument(help="A picture; it is scaled to the size the model knows.")],
    store: StoreOption = STORE,
    as_json: AsJson = False,
) -> None:
    """Say what a trained model sees in a picture."""
    from erpe.predict import find_folder
    from erpe.predict import predict as see
    from erpe.show import prediction_table

    shares = see(find_folder(run, existing(store)), image)
    print(json.dumps(shares)) if as_json else prediction_table(shares)


@app.command()
def doctor(data_dir: DataDir = None, store: StoreOption = STORE, as_json: AsJson = False) -> None:
    """Check versions, devices, data, store and tracking; say what is wrong and what would do."""
    from erpe.doctor import examine
    from erpe.show import doctor_table

    findings = examine(data_dir, store)
    print(json.dumps([finding._asdict() for finding in findings])) if as_json else doctor_table(findings)
    if any(finding.state == "wrong" for finding in findings):
        raise typer.Exit(1)


app.add_typer(bench_app, name="bench")
app.add_typer(jobs_app, name="jobs")
app.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})(submit)


@app.callback(invoke_without_command=True)
def version(show: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    """Options of all commands."""
    if show:
        print(f"erpe {__version__}")
        raise typer.Exit


def existing(folder: Path) -> Any:
    """See `Store.existing`."""
    from erpe.store import Store

    return Store.existing(folder)


def main() -> None:
    """Run the command line; a mistake of the user's is one line on stderr."""
    try:
        app(prog_name="erpe")
    except ErpeError as error:
        from erpe.telling import line

        print(f"erpe: {line(str(error))}", file=sys.stderr)
        sys.exit(1)
