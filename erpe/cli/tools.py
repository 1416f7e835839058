"""Small tools on what a store holds: parse, call, print. What is heavy is imported inside its command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from erpe.cli.complete import figures, runs, studies
from erpe.cli.options import STORE, AsJson, Plugins, StoreOption, one_of
from erpe.errors import ConfigError, StudyError
from erpe.store import Store

Run = Annotated[
    str,
    typer.Argument(
        help="STUDY, STUDY/ARM, STUDY/NUMBER, STUDY/ARM/NUMBER or STUDY/ARM/seed-NUMBER.", autocompletion=runs
    ),
]


def diff(first: Run, second: Run, store: StoreOption = STORE, as_json: AsJson = False) -> None:
    """Show in which settings, versions and measures two trials, runs or studies differ."""
    from rich.box import SIMPLE
    from rich.table import Table

    from erpe.report.diff import differ
    from erpe.text import Terminal

    rows = differ(Store.existing(store), first, second)
    if as_json:
        print(json.dumps([row._asdict() for row in rows], default=str))
        return
    table = Table(box=SIMPLE)
    for name in ("", "name", first, second):
        table.add_column(name, overflow="fold")
    for number, row in enumerate(rows):
        again = number and rows[number - 1].part == row.part
        table.add_row("" if again else row.part, row.name, _shown(row.first), _shown(row.second))
    if rows:
        Terminal().print_table(table)
    else:
        print("no difference")


def _shown(value: Any) -> str:
    return "-" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)


def logs(run: Run, store: StoreOption = STORE) -> None:
    """Print the log of a trial: when it began and ended, its epochs, and what it printed and warned of."""
    from erpe.execution.trial_log import read_log
    from erpe.study.lookup import any_trial
    from erpe.study.reading import read_studies

    opened = Store.existing(store)
    part, trial = any_trial(read_studies(opened), run)
    try:
        print(read_log(opened.trial_folder(part.name, trial.number, trial.config.seed)), end="")
    except OSError:
        raise StudyError(f"{run}: no log; an older erpe trained it, or `erpe gc` removed it") from None


def plot(
    study: Annotated[str, typer.Argument(help="A study.", autocompletion=studies)],
    what: Annotated[
        str,
        typer.Argument(
            help="A figure of the page, as accuracy; of a study of `erpe tune`: history, importances or "
            "parallel_coordinates.",
            autocompletion=figures,
        ),
    ],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="A .pdf, .svg or .png; default: STUDY-WHAT.png.")
    ] = None,
    store: StoreOption = STORE,
    plugin: Plugins = None,
) -> None:
    """Draw one figure of a study."""
    from erpe.cli.report import written
    from erpe.report.charts import write
    from erpe.results import load_study
    from erpe.study.lookup import parts_of
    from erpe.study.reading import read_studies
    from erpe.text import printable
    from erpe.tuned import plot_search

    opened, path = Store.existing(store), output or Path(f"{study}-{what}.png")
    if path.suffix not in (".pdf", ".svg", ".png"):
        raise ConfigError(f"--output {path}: use a name that ends in .pdf, .svg or .png instead")
    (found, *_) = parts_of(read_studies(opened), study)
    figure = load_study(study, opened.root).plot(what) if found.part_of else plot_search(found.name, opened, what)
    written(path, lambda: write(figure, path))
    print(f"{printable(str(path))}: written")


def export(
    run: Run,
    style: Annotated[str, typer.Option("--format", help="onnx, or torch: a .pt2 of torch.export.")] = "onnx",
    output: Annotated[Path | None, typer.Option("--output", "-o", help="The file; default: STUDY-....onnx.")] = None,
    plugin: Plugins = None,
    store: StoreOption = STORE,
) -> None:
    """Write a trained model as one file that needs no erpe: uint8 pictures in, probabilities out; it is compared."""
    from erpe.cli.report import written
    from erpe.export import export as write
    from erpe.inference import find_folder
    from erpe.text import printable
    from erpe.training.checkpoint import load_model

    suffix = {"onnx": ".onnx", "torch": ".pt2"}[one_of("format", style, ("onnx", "torch"))]
    path = output or Path(run.replace("/", "-") + suffix)
    if path.suffix != suffix:
        raise ConfigError(f"--output {path}: use a name that ends in {suffix} instead")
    model = load_model(find_folder(run, Store.existing(store)))[0]
    worst: list[float] = []
    written(path, lambda: worst.append(write(model, path, style)))
    print(f"{printable(str(path))}: written; probabilities differ by {worst[0]:.1g} at most")
