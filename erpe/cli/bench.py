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
    torch = _torch(variant, threads)
    from erpe.bench.layers import LayerShape, bench_layers
    from erpe.bench.tables import layers_table
    from erpe.training.devices import pick_device
    from erpe.variants import VARIANTS

    found = bench_layers(
        variant or list(VARIANTS), tokens or [64, 256, 1024, 4096],
        LayerShape(heads, head_dim, features, batch_tokens, batch), rounds=rounds, device=pick_device(device),
        dtype=getattr(torch, precision), method=method,
    )  # fmt: skip
    _show(found, layers_table, as_json)
    if figure:
        from erpe.bench.plot import draw

        draw(found, figure)


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
    _torch(variant, threads)
    from erpe.bench.layers import LayerShape
    from erpe.bench.series import VARIANTS
    from erpe.bench.series import bench_series as run
    from erpe.bench.tables import series_table
    from erpe.training.devices import pick_device

    found = run(
        variant or list(VARIANTS), tokens or [1024, 4096], rank or [1, 3, 5, 9, 17, 33],
        LayerShape(batch_tokens=batch_tokens), rounds=rounds, device=pick_device(device),
    )  # fmt: skip
    _show(found, series_table, as_json)


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
    _torch(variant, threads)
    from erpe.bench.models import bench_models
    from erpe.bench.tables import models_table
    from erpe.variants import VARIANTS

    found = bench_models(
        variant or list(VARIANTS), dataset, rounds=rounds, settings=parse_settings(settings), device=device
    )
    _show(found, models_table, as_json)


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
    _torch(variant, threads)
    from erpe.bench.tables import training_table
    from erpe.bench.train import bench_training
    from erpe.variants import VARIANTS

    found = bench_training(
        variant or list(VARIANTS), dataset, rounds=rounds, settings=parse_settings(settings), device=device
    )
    _show(found, training_table, as_json)


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
    _torch(variant, threads)
    from erpe.bench.precision import bench_precision as run
    from erpe.bench.tables import precision_table
    from erpe.variants import VARIANTS

    found = run(
        variant or list(VARIANTS), dataset or ["cifar10", "mnist"],
        rounds=rounds, settings=parse_settings(settings), device=device,
    )  # fmt: skip
    _show(found, precision_table, as_json)


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
    _torch(variant, threads)
    from erpe.bench.packing import bench_packs
    from erpe.bench.tables import training_table
    from erpe.variants import VARIANTS

    found = bench_packs(
        variant or list(VARIANTS), dataset, pack or [1, 2, 4, 8, 16],
        rounds=rounds, settings=parse_settings(settings), device=device,
    )  # fmt: skip
    _show(found, training_table, as_json)


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
    _torch(variant, threads)
    from erpe.bench.device import bench_device as run
    from erpe.bench.tables import device_table
    from erpe.store import Store
    from erpe.variants import VARIANTS

    own = Store.open(store)
    found = run(
        variant or list(VARIANTS), dataset, pack, rounds=rounds, settings=parse_settings(settings), device=device
    )
    own.keep_device(found["machine"]["device"], found["chosen"])
    _show(found, device_table, as_json)


@bench_app.command("overhead")
def bench_overhead(rounds: Rounds = 5, as_json: AsJson = False) -> None:
    """Time trials and epochs that train nothing: what Optuna, the tracker, MLflow and Ray add to a bare loop."""
    from erpe.bench.overhead import bench_overhead as run
    from erpe.bench.tables import overhead_table

    _show(run(rounds=rounds), overhead_table, as_json)


def _show(found: dict[str, Any], table: Any, as_json: bool) -> None:
    print(json.dumps(found)) if as_json else table(found)


def _torch(variants: list[str] | None, threads: int) -> Any:
    """torch, with the given number of threads; unknown variants are refused before it is loaded."""
    from erpe.variants import split_variant

    for name in variants or []:
        split_variant(name)
    import torch

    torch.set_num_threads(threads)
    return torch
