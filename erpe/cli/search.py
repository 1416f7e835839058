"""The commands that search: parse, call, print. Whatever is heavy is imported inside its command."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from erpe.cli.complete import runs, studies
from erpe.cli.options import (
    STORE,
    AsJson,
    AtMost,
    Concurrency,
    CpusPerTrial,
    DataDir,
    DatasetOption,
    Device,
    Epochs,
    Executor,
    GpusPerTrial,
    New,
    Notify,
    ObjectiveOption,
    Pack,
    Plugins,
    RayAddress,
    Resize,
    Seed,
    Settings,
    StoreOption,
    VariantOption,
    dataset_of,
    limits_of,
    parse_settings,
)
from erpe.errors import INTERRUPTED, UNSENT

if TYPE_CHECKING:
    from erpe.tuned import Tuned


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
            variant, dataset_of(dataset, resize, store), trials=trials, store=store, name=name, new=new,
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
            variant, dataset and dataset_of(dataset, resize, store), like=like, store=store, new=new,
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
