"""Options that several commands have, and how their values are read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from erpe.errors import ConfigError, either

STORE = Path("runs")
"""The folder of results where none is named."""

VariantOption = Annotated[str, typer.Option("--variant", "-v", help="One of the twelve; `erpe variants` lists them.")]
DatasetOption = Annotated[str, typer.Option("--dataset", "-d", help="digits (no download), mnist or cifar10.")]
DataDir = Annotated[
    Path | None,
    typer.Option(help="Folder of the data sets; default: $ERPE_DATA, or ./data. What is missing is downloaded."),
]
StoreOption = Annotated[Path, typer.Option("--store", help="Folder of results, databases and checkpoints.")]
Epochs = Annotated[
    int | None, typer.Option(help="Epochs of a trial; default: 30 for digits, 5 for mnist, 50 for cifar10.")
]
Settings = Annotated[
    list[str] | None, typer.Option("--set", help="A setting for every trial, as train.ema=0.99; may be repeated.")
]
Seed = Annotated[int, typer.Option(help="Decides samples, initial weights, data order and augmentation.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object for scripts.")]
New = Annotated[bool, typer.Option("--new", help="Start afresh, beside what is there.")]
Pack = Annotated[int, typer.Option(help="Trials of one shape that train as one program; on CPUs for small models.")]


def parse_settings(given: list[str] | None) -> dict[str, Any]:
    """`["train.ema=0.99"]` -> `{"train.ema": 0.99}`; values as in TOML, a bare word is text.

    Raises:
        ConfigError: no equals sign, or two values for one name.
    """
    from erpe.study.entries import combine, dotted, read_line

    found: dict[str, Any] = {}
    for line in given or []:
        combine(found, dotted(read_line(line, "train.ema=0.99")), "--set ")
    return found


def one_of(what: str, given: str, allowed: tuple[str, ...]) -> Any:
    """The word, if it is one of these.

    Raises:
        ConfigError: it is not.
    """
    if given not in allowed:
        raise ConfigError(f"{what}: {given!r} given; use {either(allowed)} instead")
    return given


def existing(folder: Path) -> Any:
    """The store in a folder.

    Raises:
        StoreError: see `Store.existing`.
    """
    from erpe.store import Store

    return Store.existing(folder)
