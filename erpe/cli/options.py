"""Options that several commands have, and how their values are read."""

from __future__ import annotations

import sys
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import typer

from erpe.cli import complete
from erpe.errors import ConfigError, either
from erpe.store import DEFAULT, Store, name_store
from erpe.text import line

STORE = DEFAULT

VariantOption = Annotated[
    str,
    typer.Option(
        "--variant", "-v", autocompletion=complete.variants,
        help="One of the twelve, or of a plug-in; `erpe variants` lists them.",
    ),
]  # fmt: skip
DatasetOption = Annotated[
    str,
    typer.Option(
        "--dataset", "-d", help="digits (no download), mnist, cifar10 and more, or the path of own images: a folder "
        "with train/CLASS/*, or an .npz; `erpe datasets` lists them.", autocompletion=complete.datasets,
    ),
]  # fmt: skip
Resize = Annotated[str | None, typer.Option(help="Height and width that own images get, as 32x32.")]
DataDir = Annotated[
    Path | None,
    typer.Option(help="Folder of the data sets; default: $ERPE_DATA, or ./data. What is missing is downloaded."),
]


def _load_plugins(context: typer.Context, given: list[str] | None) -> list[str] | None:
    """Run the plug-ins as the command line is read, not as it is completed: other options may name their variants."""
    from erpe.plugins import load

    for each in (given or []) if not context.resilient_parsing else []:
        load(each)
    return given


def _folder(given: str | Path) -> Path:
    """Refuse an empty name, as of a variable that is not set: it would be the current folder."""
    if given == "":
        raise typer.BadParameter("'' given; use the name of a folder instead")
    return Path(given)


Plugins = Annotated[
    list[str] | None,
    typer.Option(
        "--plugin", callback=_load_plugins, is_eager=True, autocompletion=complete.plugins,
        help="A Python file with own attentions or encodings, or the name of an installed one; may be repeated.",
    ),
]  # fmt: skip
StoreOption = Annotated[
    Path,
    typer.Option("--store", parser=_folder, metavar="FOLDER", help="Folder of results, databases and checkpoints."),
]
Epochs = Annotated[
    int | None, typer.Option(help="Epochs of a trial; default: 30 for digits, 5 for mnist, 50 for cifar10.")
]
Settings = Annotated[
    list[str] | None, typer.Option("--set", help="A setting for every trial, as train.ema=0.99; may be repeated.")
]
ObjectiveOption = Annotated[
    str | None,
    typer.Option(help="accuracy (default) or log_likelihood; or several: accuracy,flops; also params, inference_ms."),
]  # fmt: skip
AtMost = Annotated[
    list[str] | None,
    typer.Option(help="What a model may cost: flops=20e6, params=500_000 or inference_ms=0.2; may be repeated."),
]  # fmt: skip
Seed = Annotated[int, typer.Option(help="Decides samples, initial weights, data order and augmentation.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object for scripts.")]
New = Annotated[bool, typer.Option("--new", help="Start afresh, beside what is there.")]
Notify = Annotated[
    str | None,
    typer.Option(
        help="Who is told when it ends, fails or stalls: an address of apprise, as mailto://..., or a command; "
        "default: $ERPE_NOTIFY, which no list of processes shows."
    ),
]  # fmt: skip
Pack = Annotated[int, typer.Option(help="Trials of one shape that train as one program; on CPUs for small models.")]

Concurrency = Annotated[int | None, typer.Option(help="Trials at a time; default: what the machine allows.")]
CpusPerTrial = Annotated[int, typer.Option(help="CPUs, and threads, of a trial.")]
GpusPerTrial = Annotated[
    float | None, typer.Option(help="GPUs of a trial, or a part of one; default: all there are, shared evenly.")
]
RayAddress = Annotated[str | None, typer.Option(help="Of a Ray cluster; default: $ERPE_RAY_ADDRESS, or here.")]
Executor = Annotated[str, typer.Option(help="ray, or inline: one trial after the other, without Ray.")]


def parse_settings(given: list[str] | None, option: str = "--set", example: str = "train.ema=0.99") -> dict[str, Any]:
    """`["train.ema=0.99"]` -> `{"train.ema": 0.99}`; values as in TOML, a bare word is text.

    Raises:
        ConfigError: no equals sign, or two values for one name.
    """
    from erpe.study.entries import combine, dotted, read_line

    found: dict[str, Any] = {}
    for each in given or []:
        combine(found, dotted(read_line(each, example, option)), f"{option} ")
    return found


def limits_of(given: list[str] | None) -> dict[str, Any]:
    """`["flops=20e6"]` -> `{"flops": 2e7}`; see `parse_settings`."""
    return parse_settings(given, "--at-most", "flops=20e6")


def dataset_of(given: str, resize: str | None = None, store: Path | None = None) -> Any:
    """Return a published data set's name, or the description of own images, of which a line is told.

    Args:
        store: beside which what is found out of own images is kept.
    Raises:
        ConfigError, DataError: see `erpe.training.own.find_dataset`.
    """
    from erpe.datasets import DATASETS, Dataset, read_grid

    if given in DATASETS and not resize:
        return given
    from erpe.training.own import find_dataset, summary

    found = find_dataset(given, resize=read_grid(resize), cache=Store.open(store).datasets if store else None)
    if isinstance(found, Dataset):
        print(line(summary(found)), file=sys.stderr)
    return found


def one_of(what: str, given: str, allowed: tuple[str, ...]) -> Any:
    """Return the word, if it is one of these.

    Raises:
        ConfigError: it is not.
    """
    if given not in allowed:
        raise ConfigError(f"{what}: {given!r} given; use {either(allowed)} instead")
    return given


def with_store(text: str, words: list[str] | None = None) -> str:
    """Add the --store and --plugin of a command to those that a line names in backticks: they mean the same store.

    Args:
        words: of the command that says it; default: of this process.
    """
    words = sys.argv[1:] if words is None else words
    given = [word.removeprefix("--store=") for word in words if word.startswith("--store=")]
    given += [after for word, after in pairwise(words) if word == "--store"]
    return name_store(text, Path(given[-1] if given else DEFAULT))


def warn(text: str) -> None:
    """Print a warning, one line, whose commands are of this command's store."""
    print(f"warning: {line(with_store(text))}", file=sys.stderr)
