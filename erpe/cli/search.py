"""The commands that search: parse, call, print. Whatever is heavy is imported inside its command."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from erpe.cli import options
from erpe.cli.complete import runs, studies
from erpe.cli.options import STORE, dataset_of, limits_of, parse_settings
from erpe.errors import INTERRUPTED, UNSENT

if TYPE_CHECKING:
    from erpe.tuned import Tuned


def tune(
    variant: options.VariantOption,
    dataset: options.DatasetOption,
    resize: options.Resize = None,
    plugin: options.Plugins = None,
    trials: Annotated[int | None, typer.Option(help="Earlier ones included; default: 6 for digits, else 20.")] = None,
    epochs: options.Epochs = None,
    space: Annotated[Path | None, typer.Option(help="TOML file whose [space] is laid over the default space.")] = None,
    enqueue: Annotated[
        Path | None, typer.Option(help="TOML file with [[points]], tables of settings that the first trials have.")
    ] = None,
    warm_start: Annotated[
        str | None, typer.Option(help="A study whose best trial comes first.", autocompletion=studies)
    ] = None,
    settings: options.Settings = None,
    objective: options.ObjectiveOption = None,
    at_most: options.AtMost = None,
    sampler: Annotated[str, typer.Option(help="tpe, gp, nsgaii or random.")] = "tpe",
    pruner: Annotated[str, typer.Option(help="auto, asha, hyperband, median or none.")] = "auto",
    seed: options.Seed = 0,
    data_dir: options.DataDir = None,
    store: options.StoreOption = STORE,
    name: Annotated[str | None, typer.Option(help="Of the study; default: DATASET-VARIANT.")] = None,
    new: options.New = False,
    concurrency: options.Concurrency = None,
    cpus_per_trial: options.CpusPerTrial = 1,
    gpus_per_trial: options.GpusPerTrial = None,
    pack: options.Pack = 1,
    device: options.Device = "auto",
    ray_address: options.RayAddress = None,
    executor: options.Executor = "ray",
    notify: options.Notify = None,
    as_json: options.AsJson = False,
) -> None:
    """Search the best settings of a variant; test the best model once. The same command continues."""
    with showing(as_json, store) as show:
        from erpe import api

        show(api.tune(
            variant, dataset_of(dataset, resize, store), trials=trials, store=store, name=name, new=new,
            epochs=epochs, settings=parse_settings(settings), space=space, enqueue=enqueue, warm_start=warm_start,
            objective=objective or "accuracy", at_most=limits_of(at_most), sampler=cast(Any, sampler),
            pruner=cast(Any, pruner), seed=seed, notify=notify, data_dir=data_dir, concurrency=concurrency,
            cpus_per_trial=cpus_per_trial, gpus_per_trial=gpus_per_trial, pack=pack, device=device,
            ray_address=ray_address, executor=cast(Any, executor),
        ))  # fmt: skip


def train(
    variant: options.VariantOption = "",
    dataset: options.DatasetOption = "",
    like: Annotated[
        str | None,
        typer.Option(
            help="A recorded run, as STUDY/3, whose variant, data set, settings and seed this one has but for what is "
            "given.",
            autocompletion=runs,
        ),
    ] = None,
    resize: options.Resize = None,
    plugin: options.Plugins = None,
    epochs: options.Epochs = None,
    settings: options.Settings = None,
    seed: options.Seed = 0,
    data_dir: options.DataDir = None,
    store: options.StoreOption = STORE,
    new: options.New = False,
    device: options.Device = "auto",
    notify: options.Notify = None,
    as_json: options.AsJson = False,
) -> None:
    """Train one configuration, or that of a recorded run, and test it: a study of one trial, in this process."""
    with showing(as_json, store) as show:
        from erpe import api

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
