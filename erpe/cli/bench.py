"""The commands of `erpe bench`: parse, call, print. Whatever is heavy is imported inside its command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from erpe.cli.options import STORE, AsJson, DatasetOption, Device, Settings, StoreOption, one_of, parse_settings

bench_app = typer.Typer(no_args_is_help=True, help="Time layers, models, training and overhead, in interleaved rounds.")
BenchVariants = Annotated[list[str] | None, typer.Option("--variant", "-v", help="May be repeated; default: all.")]
Rounds = Annotated[int, typer.Option(min=2, help="Interleaved rounds that count.")]
Threads = Annotated[int, typer.Option(min=1, help="CPU threads.")]


@bench_app.command("layer")
def bench_layer(
    variant: BenchVariants = None,
    tokens: Annotated[list[int] | None, typer.Option(help="N; may be repeated; default: 64, 256, 1024, 4096.")] = None,
    batch_tokens: Annotated[int, typer.Option(min=1, help="Batch size times N.")] = 4096,
    batch: Annotated[
        int | None, typer.Option(min=1, help="Batch size at every N; default: see --batch-tokens.")
    ] = None,
    heads: Annotated[int, typer.Option(min=1, help="H.")] = 4,
    head_dim: Annotated[int, typer.Option(min=1, help="D.")] = 32,
    features: Annotated[int | None, typer.Option(min=1, help="Random features m of favor.")] = 32,
    method: Annotated[str, typer.Option(help="Of linear attention: auto, torch, dense or fft.")] = "auto",
    rounds: Rounds = 9,
    threads: Threads = 1,
    device: Device = "auto",
    precision: Annotated[str, typer.Option(help="float32, bfloat16 or float64, of q, k and v.")] = "float32",
    figure: Annotated[Path | None, typer.Option(help="Draw time and memory against N: an SVG, PNG or PDF.")] = None,
    as_json: AsJson = False,
) -> None:
    """Time attention layers against torch's scaled_dot_product_attention, forward and as a training step."""
    one_of("method", method, ("auto", "torch", "dense", "fft"))
    one_of("precision", precision, ("float32", "bfloat16", "float64"))
    if figure:
        one_of("kind of figure", figure.suffix, (".svg", ".png", ".pdf"))
    variants = _begun(variant, threads)
    import torch

    from erpe.bench import layers, tables
    from erpe.training.devices import pick_device

    shape = layers.LayerShape(heads, head_dim, features, batch_tokens, batch)
    found = layers.bench_layers(
        variants, tokens or [64, 256, 1024, 4096], shape, rounds=rounds, device=pick_device(device),
        dtype=getattr(torch, precision), method=method,
    )  # fmt: skip
    _show(found, tables.layers_table, as_json)
    if figure:
        from erpe.bench.plot import costs_of_layers
        from erpe.cli.report import written
        from erpe.report.charts import write

        written(figure, lambda: write(costs_of_layers(found), figure))


@bench_app.command("series")
def bench_series(
    variant: BenchVariants = None,
    tokens: Annotated[list[int] | None, typer.Option(help="N; may be repeated; default: 1024, 4096.")] = None,
    rank: Annotated[list[int] | None, typer.Option(help="Terms; may be repeated; default: 1, 3, 5, 9, 17, 33.")] = None,
    batch_tokens: Annotated[int, typer.Option(min=1, help="Batch size times N.")] = 4096,
    rounds: Rounds = 5,
    threads: Threads = 1,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Time the general encoding as a truncated series (model.rank), and tell how far it is from the exact layer."""
    _begun(variant, threads)
    from erpe.bench import layers, series, tables
    from erpe.training.devices import pick_device

    found = series.bench_series(
        variant or list(series.VARIANTS), tokens or [1024, 4096], rank or [1, 3, 5, 9, 17, 33],
        layers.LayerShape(batch_tokens=batch_tokens), rounds=rounds, device=pick_device(device),
    )  # fmt: skip
    _show(found, tables.series_table, as_json)


@bench_app.command("model")
def bench_model(
    variant: BenchVariants = None,
    dataset: DatasetOption = "cifar10",
    rounds: Rounds = 7,
    threads: Threads = 1,
    settings: Settings = None,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Time whole Vision Transformers against the one with softmax attention: images a second. --set gives the size."""
    variants = _begun(variant, threads)
    from erpe.bench import models, tables

    found = models.bench_models(variants, dataset, rounds=rounds, settings=parse_settings(settings), device=device)
    _show(found, tables.models_table, as_json)


@bench_app.command("train")
def bench_train(
    variant: BenchVariants = None,
    dataset: DatasetOption = "mnist",
    rounds: Rounds = 7,
    threads: Threads = 1,
    settings: Settings = None,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Time a training step against a bare loop over torch's nn.TransformerEncoder."""
    variants = _begun(variant, threads)
    from erpe.bench import tables, train

    found = train.bench_training(variants, dataset, rounds=rounds, settings=parse_settings(settings), device=device)
    _show(found, tables.training_table, as_json)


@bench_app.command("precision")
def bench_precision(
    variant: BenchVariants = None,
    dataset: Annotated[
        list[str] | None, typer.Option("--dataset", "-d", help="May be repeated; default: cifar10, mnist.")
    ] = None,
    rounds: Rounds = 7,
    threads: Threads = 1,
    settings: Settings = None,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Time training in float32 and in bfloat16: images a second. --set gives the size."""
    variants = _begun(variant, threads)
    from erpe.bench import precision, tables

    found = precision.bench_precision(
        variants, dataset or ["cifar10", "mnist"], rounds=rounds, settings=parse_settings(settings), device=device
    )
    _show(found, tables.precision_table, as_json)


@bench_app.command("pack")
def bench_pack(
    variant: BenchVariants = None,
    dataset: DatasetOption = "digits",
    pack: Annotated[list[int] | None, typer.Option(help="May be repeated; default: 1, 2, 4, 8, 16.")] = None,
    rounds: Rounds = 5,
    threads: Threads = 1,
    settings: Settings = None,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Time a training step of one trial, alone and as its share of a pack; see `tune --pack`."""
    variants = _begun(variant, threads)
    from erpe.bench import packing, tables

    sizes = pack or [1, 2, 4, 8, 16]
    found = packing.bench_packs(
        variants, dataset, sizes, rounds=rounds, settings=parse_settings(settings), device=device
    )
    _show(found, tables.training_table, as_json)


@bench_app.command("device")
def bench_device(
    variant: BenchVariants = None,
    dataset: DatasetOption = "cifar10",
    pack: Annotated[int, typer.Option(min=2, help="Trials of a pack.")] = 4,
    rounds: Rounds = 5,
    threads: Threads = 1,
    settings: Settings = None,
    device: Device = "auto",
    store: StoreOption = STORE,
    as_json: AsJson = False,
) -> None:
    """Choose the fastest way to train on a GPU, CUDA graphs and softmax attention, for this store's trials."""
    variants = _begun(variant, threads)
    from erpe.bench import tables
    from erpe.bench.device import bench_device as run
    from erpe.store import Store

    own = Store.open(store)
    found = run(variants, dataset, pack, rounds=rounds, settings=parse_settings(settings), device=device)
    own.keep_device(found["machine"]["device"], found["chosen"])
    _show(found, tables.device_table, as_json)


@bench_app.command("overhead")
def bench_overhead(rounds: Rounds = 5, as_json: AsJson = False) -> None:
    """Time trials and epochs that train nothing: what Optuna, the tracker, MLflow and Ray add to a bare loop."""
    from erpe.bench import overhead, tables

    _show(overhead.bench_overhead(rounds=rounds), tables.overhead_table, as_json)


def _show(found: dict[str, Any], table: Any, as_json: bool) -> None:
    print(json.dumps(found)) if as_json else table(found)


def _begun(variants: list[str] | None, threads: int) -> list[str]:
    """Return the variants, by default all twelve, and give torch its threads; unknown ones are refused before."""
    from erpe.variants import VARIANTS, split_variant

    for name in variants or []:
        split_variant(name)
    import torch

    torch.set_num_threads(threads)
    return variants or list(VARIANTS)
