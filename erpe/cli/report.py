"""The commands that compare what was confirmed: parse, call, print. What is heavy is imported inside its command."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from erpe.cli.options import STORE, Plugins, StoreOption, one_of
from erpe.errors import ConfigError, StoreError
from erpe.store import Store

Studies = Annotated[list[str] | None, typer.Argument(help="Names of studies; default: all.")]
Against = Annotated[
    str | None,
    typer.Option(help="A study whose arms those of the others are compared with; default: each with its own."),
]
Margin = Annotated[
    float | None,
    typer.Option(help="Points of accuracy that are too few to matter; default: what the study file says, or 0.5."),
]
From = Annotated[
    list[Path] | None,
    typer.Option("--from", help="Read FILE.csv, which `compare --format csv` wrote, instead of a store; repeatable."),
]
Server = Annotated[str | None, typer.Option("--server", help="Read a tracking server, as http://HOST:5000.")]


def compare(
    studies: Studies = None,
    style: Annotated[
        str, typer.Option("--format", help="terminal, markdown, csv, parquet, json or latex.")
    ] = "terminal",
    output: Annotated[Path | None, typer.Option("--output", "-o", help="A file; default: print.")] = None,
    against: Against = None,
    margin: Margin = None,
    store: StoreOption = STORE,
    server: Server = None,
    files: From = None,
    plugin: Plugins = None,
) -> None:
    """Compare confirmed runs: every measure with its interval, and which differences are real."""
    from erpe.report.comparison import compare as compared
    from erpe.report.sources.files import exports
    from erpe.report.tables import FORMATS, render

    style = one_of("format", style, tuple(FORMATS))
    outcomes = outcomes_of(studies, against, store, server, files)
    text = render(compared(outcomes, against, margin), style, outcomes)
    if output is not None:
        write_output(output, text)
        for end, content in exports(outcomes, style) if style in ("csv", "parquet") else ():
            write_output(output.with_name(output.stem + end), content)
    elif isinstance(text, bytes):
        raise ConfigError(f"--format {style}: not for a terminal; use --output FILE instead")
    else:
        print(text, end="" if text.endswith("\n") else "\n")


def report(
    studies: Studies = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="The page.")] = Path("report.html"),
    figures: Annotated[Path | None, typer.Option(help="Folder for the figures as PDF and SVG.")] = None,
    font: Annotated[str, typer.Option(help="Of those figures: sans or serif.")] = "sans",
    against: Against = None,
    margin: Margin = None,
    store: StoreOption = STORE,
    server: Server = None,
    files: From = None,
    plugin: Plugins = None,
) -> None:
    """Write the page of a study: tables and figures in one file that opens offline."""
    from erpe.report.charts import save_all
    from erpe.report.comparison import compare as compared
    from erpe.report.page import write_report
    from erpe.text import printable

    font = one_of("font", font, ("sans", "serif"))
    outcomes = outcomes_of(studies, against, store, server, files)
    comparison = compared(outcomes, against, margin)
    written(output, lambda: write_report(outcomes, comparison, output))
    print(f"{printable(str(output))}: open it in a browser")
    if figures:
        written(figures, lambda: save_all(outcomes, comparison, figures, font=font))
        print(f"{printable(str(figures))}: every figure as PDF and SVG")


def outcomes_of(
    studies: list[str] | None, against: str | None, store: Path, server: str | None, files: list[Path] | None = None
) -> Any:
    """Return what the store, a tracking server or files have of these studies and of the one they are compared with.

    Raises:
        ConfigError: files and a server, or files and names of studies, are given.
    """
    if files:
        if server or studies:
            raise ConfigError("--from: the files say which studies; give neither names of studies nor --server")
        from erpe.report.sources.files import read as read_files

        return read_files(files)
    if studies and against:
        studies = [*studies, against]
    if server:
        from erpe.report.sources.mlflow import read

        return read(server, studies or [])
    from erpe.report.sources.store import load

    return load(Store.existing(store), studies or [])


def write_output(path: Path, content: str | bytes) -> None:
    """Write a file whole, and say so."""
    from erpe.io import write_atomic
    from erpe.text import printable

    written(path, lambda: write_atomic(path, content))
    print(f"{printable(str(path))}: written")


def written(path: Path, write: Callable[[], object]) -> None:
    """Write; a folder that is not there or a full disk is one line.

    Raises:
        StoreError: it cannot be written.
    """
    try:
        write()
    except OSError as error:
        raise StoreError(f"{path}: cannot be written ({error.strerror or error})") from None
