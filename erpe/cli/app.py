"""The command line: parse, call, print. Whatever is heavy is imported inside its command.

Exit codes: 0 done; 1 a mistake, told in one line; 2 a command line that makes no sense; 3 done, but MLflow has not
got everything yet; 130 interrupted, to be continued by the same command; 141 who read the output has gone.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup
from typer.exceptions import TyperException

from erpe import __version__
from erpe.cli.bench import bench_app
from erpe.cli.jobs import jobs_app, submit
from erpe.cli.options import STORE, AsJson, DataDir, DatasetOption, Plugins, StoreOption, dataset_of, warn, with_store
from erpe.cli.output import close_output
from erpe.cli.report import compare, report
from erpe.cli.restore import restore
from erpe.cli.search import train, tune
from erpe.cli.study import study_app
from erpe.cli.tools import diff, export, logs, plot
from erpe.errors import INTERRUPTED, UNREAD, UNSENT, ConfigError, ErpeError, OutputError
from erpe.store import Store


class Commands(TyperGroup):
    """Say a word where Ctrl-C ends a command that says none itself."""

    def invoke(self, ctx: Any) -> Any:
        """See `TyperGroup`."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            print("erpe: interrupted", file=sys.stderr)
            raise typer.Exit(INTERRUPTED) from None


app = typer.Typer(
    name="erpe",
    cls=Commands,
    help="Tune and compare Vision Transformers with softmax and linear attention, with and without relative positions.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for each in (tune, train, compare, report, restore, diff, logs, plot, export):
    app.command()(each)


@app.command()
def variants(dataset: DatasetOption = "mnist", plugin: Plugins = None, as_json: AsJson = False) -> None:
    """List the twelve variants, and those of plug-ins, with their size and cost at the default configuration."""
    from erpe.cli.tables import variants_rows, variants_table

    found = dataset_of(dataset)
    rows = variants_rows(found)
    print(json.dumps(rows)) if as_json else variants_table(rows, str(found))


@app.command("check-plugin")
def check_plugin(
    file: Annotated[str, typer.Argument(help="A plug-in: a Python file, or the name of an installed one.")],
    as_json: AsJson = False,
) -> None:
    """Check each variant that a plug-in adds: rows, dense twin, gradients, batch, positions, FLOPs, vmap."""
    from erpe.cli.tables import checks_table
    from erpe.plugins import load
    from erpe.training.check import check_variant
    from erpe.variants import own_variants

    found = {variant: check_variant(variant) for variant in own_variants(load(file))}
    wrong = [(variant, each.what) for variant, checks in found.items() for each in checks if each.well is False]
    if as_json:
        print(json.dumps({variant: [check._asdict() for check in checks] for variant, checks in found.items()}))
    else:
        checks_table(found)
    if wrong:
        raise ErpeError(f"{file}: {len(wrong)} checks failed; the first is {wrong[0][0]}: {wrong[0][1]}")


@app.command()
def datasets(data_dir: DataDir = None, store: StoreOption = STORE, as_json: AsJson = False) -> None:
    """List data sets: published ones, where they lie, and own images that the store knows."""
    from erpe.cli.tables import datasets_rows, datasets_table

    rows = datasets_rows(data_dir, store)
    print(json.dumps(rows)) if as_json else datasets_table(rows)


@app.command()
def status(
    study: Annotated[str | None, typer.Argument(help="STUDY, or STUDY/ARM; default: all, a line each.")] = None,
    store: StoreOption = STORE,
    plugin: Plugins = None,
    as_json: AsJson = False,
) -> None:
    """Show studies, finished or running: all, the trials or arms of one, or the trials and seeds of an arm."""
    from erpe.cli import status as arms
    from erpe.cli.tables import print_tables
    from erpe.cli.trials import overview_table, status_rows, status_table

    opened = Store.existing(store)
    rows = status_rows(opened, study)
    if as_json:
        print(json.dumps(rows))
    elif study is None:
        overview_table(rows)
    elif rows[0]["arm"] and "/" not in study:
        print_tables(arms.status_tables(arms.statuses(opened, study)), "")
    else:
        status_table(rows)


@app.command()
def sync(
    source: Annotated[
        str | None, typer.Argument(help="A study; or the folder of a store filled elsewhere; default: all studies.")
    ] = None,
    store: StoreOption = STORE,
    plugin: Plugins = None,
) -> None:
    """Bring MLflow up to date: what waits, and what it has lost. A store filled elsewhere is taken over first."""
    from erpe.cli.sync import is_foreign, is_study, repair, take_over

    if source and "/" in source and not os.path.isdir(source) and not is_study(source.partition("/")[0], store):
        raise ConfigError(f"{source}: no such folder; use one that `erpe study run --store` filled instead")
    if source and is_foreign(source, store):
        opened, studies = take_over(Path(source), store)
    else:
        opened, studies = Store.existing(store), [source]
    if sum(repair(opened, study, print, warn) for study in studies):
        raise typer.Exit(UNSENT)


@app.command()
def gc(
    study: Annotated[
        str | None, typer.Argument(help="STUDY, or STUDY/ARM; default: all that were run from the store.")
    ] = None,
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
    from erpe.cli.gc import sweep_json, sweep_table
    from erpe.retention.gc import gc as collect
    from erpe.retention.policy import Policy

    opened = Store.existing(store)
    found = collect(opened, Policy(keep_best, older_than, failed), study=study, dangling=dangling, dry_run=dry_run)
    print(json.dumps(sweep_json(found, opened, dry_run))) if as_json else sweep_table(found, opened, dry_run)
    if found.lag:
        raise typer.Exit(UNSENT)


@app.command()
def ui(
    study: Annotated[str | None, typer.Argument(help="Whose page the browser opens; default: none.")] = None,
    store: StoreOption = STORE,
    port: Annotated[int, typer.Option(help="On 127.0.0.1.")] = 5000,
) -> None:
    """Open the MLflow UI on the store, or on one study in the browser, on this machine only."""
    from erpe.cli.ui import serve

    serve(Store.existing(store), port, study)


@app.command()
def predict(
    run: Annotated[
        str,
        typer.Argument(
            help="STUDY, STUDY/ARM, STUDY/NUMBER, STUDY/ARM/NUMBER, STUDY/ARM/seed-NUMBER; a folder; an MLflow run."
        ),
    ],
    image: Annotated[
        Path, typer.Argument(help="A picture, or /dev/stdin; a digit is centred and sized as the model knows them.")
    ],
    raw: Annotated[bool, typer.Option("--raw", help="Only scale it: keep place, contrast and polarity.")] = False,
    plugin: Plugins = None,
    store: StoreOption = STORE,
    as_json: AsJson = False,
) -> None:
    """Say what a trained model sees in a picture."""
    from erpe.cli.tables import prediction_table
    from erpe.inference import find_folder
    from erpe.inference import predict as see

    shares = see(find_folder(run, Store.existing(store)), image, raw)
    print(json.dumps(shares)) if as_json else prediction_table(shares)


@app.command()
def doctor(data_dir: DataDir = None, store: StoreOption = STORE, as_json: AsJson = False) -> None:
    """Check versions, devices, data, store and tracking; say what is wrong and how to fix it."""
    from erpe.cli.doctor import examine
    from erpe.cli.tables import doctor_table

    findings = [each._replace(text=with_store(each.text)) for each in examine(data_dir, store)]
    print(json.dumps([finding._asdict() for finding in findings])) if as_json else doctor_table(findings)
    if any(finding.state == "wrong" for finding in findings):
        raise typer.Exit(1)


app.add_typer(study_app, name="study")
app.add_typer(bench_app, name="bench")
app.add_typer(jobs_app, name="jobs")
app.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})(submit)


@app.callback(invoke_without_command=True)
def version(show: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    """Options of all commands."""
    if show:
        print(f"erpe {__version__}")
        raise typer.Exit


EXTRAS = {
    "ray": "ray", "mlflow": "mlflow", "pandas": "report", "matplotlib": "report", "scikit_posthocs": "report",
    "jinja2": "report", "pyarrow": "report", "psycopg": "postgres",
}  # fmt: skip
"""Module -> the extra of pyproject.toml that installs it."""


def _usage(error: TyperException) -> str:
    """Return a line on a command line that makes no sense; or the help, where a command was given nothing."""
    text = error.format_message()
    command = getattr(getattr(error, "ctx", None), "command_path", "erpe")
    return text if "\n" in text else f"{command}: {text.rstrip('.')} (see `{command} --help`)"


def main() -> None:
    """Run the command line; a mistake of the user's is one line on stderr."""
    from erpe.text import first_line, line, out_of_memory

    try:
        try:
            code = app(prog_name="erpe", standalone_mode=False)
        finally:
            sys.stdout.flush()
        sys.exit(code if isinstance(code, int) else 0)
    except TyperException as error:
        print(_usage(error), file=sys.stderr)
        sys.exit(error.exit_code)
    except ErpeError as error:
        if isinstance(error, OutputError):
            close_output()
        if isinstance(error.__cause__, BrokenPipeError):
            sys.exit(UNREAD)
        print(f"erpe: {line(with_store(str(error)))}", file=sys.stderr)
        sys.exit(1)
    except ModuleNotFoundError as error:
        name = (error.name or "").partition(".")[0]
        if name not in EXTRAS:
            raise
        print(f"erpe: {name} is not installed; pip install 'erpe[{EXTRAS[name]}]'", file=sys.stderr)
        sys.exit(1)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        print(f"erpe: no room in memory ({line(first_line(error))}); use smaller sizes instead", file=sys.stderr)
        sys.exit(1)
