"""What `infra/gpu-check` measures, part by part: each yields names, and what measures them."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

import torch

from erpe.bench.backends import bench_backends
from erpe.bench.gpu_errors import LIMITS, layer_errors, running, ways_of_layer
from erpe.bench.layers import LayerShape, bench_layers
from erpe.bench.models import bench_models
from erpe.bench.packing import bench_packs
from erpe.bench.timing import compete
from erpe.bench.train import imagined
from erpe.config import TrialConfig, defaults
from erpe.model import build
from erpe.training.data import Images, load_training
from erpe.training.evaluate import GPU_BATCH, logits_of
from erpe.training.graph import CudaGraphs
from erpe.training.loop import Trainer
from erpe.variants import VARIANTS

IMAGES = 50_000
GRID = {
    "model.patch": 4, "model.width": 128, "model.depth": 6, "model.heads": 4,
    "train.batch": 512, "train.ema": 0.999, "train.epochs": 100, "data.augment": "rand", "data.validation": 0.0,
}  # fmt: skip
"""The trial of the yardstick, on CIFAR-10."""

SMALL = {"model.width": 16, "model.depth": 1, "model.heads": 2, "train.batch": 16, "data.augment": "none"}
PACKED = ("softmax", "relu_general", "favor_rope")

Row = dict[str, Any]
Units = Iterator[tuple[str, Callable[[], Row]]]


def card(device: torch.device, small: bool, data: Path | None) -> Units:
    """Yield what the machine is, and what it reaches: bytes and operations a second."""
    yield "versions", partial(versions, device)
    yield "copy", partial(copied, device, 2**20 if small else 2**31)
    n = 64 if small else 8192
    yield f"bfloat16 product of {n} x {n}", partial(multiplied, device, n, torch.bfloat16)
    yield f"float32 product of {n // 2} x {n // 2}", partial(multiplied, device, n // 2, torch.float32)


def versions(device: torch.device) -> Row:
    """Of the card and of what drives it."""
    found: Row = {"cuda": torch.version.cuda, "triton": None}
    if importlib.util.find_spec("triton"):
        found["triton"] = version("triton")
    if device.type == "cuda":
        facts = torch.cuda.get_device_properties(device)
        found |= {"capability": f"{facts.major}.{facts.minor}", "multiprocessors": facts.multi_processor_count}
        found |= {"memory_gib": facts.total_memory / 2**30, "cudnn": torch.backends.cudnn.version()}
    return found


def copied(device: torch.device, size: int) -> Row:
    """Time a copy of a number of bytes on the device; bytes read and bytes written count."""
    source = torch.randint(0, 256, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return {"gb_per_second": 2 * size / seconds(lambda: target.copy_(source), device) / 1e9}


def multiplied(device: torch.device, n: int, dtype: torch.dtype) -> Row:
    """Time a product of square matrices of noise; zeros would be quicker."""
    a, b = torch.randn(2, n, n, dtype=torch.float32, device=device).to(dtype)
    return {"tflops": 2 * n**3 / seconds(lambda: a @ b, device) / 1e12}


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """Median of a few."""
    return float(compete({"": lambda: (call(), None)[1]}, 5, device)[0]["ms"]) / 1000


def correctness(device: torch.device, small: bool, data: Path | None) -> Units:
    """Every layer's output and gradients on the device, against the same in float64 by torch's operators on the CPU."""
    usual = [((8, 8), 32), ((16, 16), 32), ((32, 33), 32), ((8, 8), 64), ((32, 33), 128)]
    for (grid, d), dtype, variant in product([((3, 4), 32)] if small else usual, LIMITS, VARIANTS):
        for way in ways_of_layer(variant):
            name = f"{variant}, N = {grid[0] * grid[1]}, D = {d}, {str(dtype).removeprefix('torch.')}, {way}"
            yield name, partial(layer_errors, variant, grid, dtype, device, way, d)


def epoch(device: torch.device, small: bool, data: Path | None) -> Units:
    """An epoch of the yardstick's trial, all twelve, in each way of running it."""
    images = pictures(small, data).to(device)
    for way in ("kernels", "graph", "compile", "torch") if device.type == "cuda" else ("torch",):
        for variant in VARIANTS:
            yield f"{variant}, {way}", partial(an_epoch, trial(variant, small), images, device, way)


def trial(variant: str, small: bool) -> TrialConfig:
    """Of the yardstick, or a small one."""
    return defaults(variant, "cifar10").replace(GRID | (SMALL if small else {}))


def pictures(small: bool, data: Path | None) -> Images:
    """CIFAR-10's training images, or noise like them."""
    config = trial("softmax", small)
    images = load_training(config.data, data).train if data else imagined(config, -(-IMAGES // config.train.batch))
    count = 2 * config.train.batch if small else IMAGES
    return Images(images.pixels[:count], images.labels[:count])


def an_epoch(config: TrialConfig, images: Images, device: torch.device, way: str) -> Row:
    """Seconds of the second epoch; the first compiles and warms up.

    Args:
        way: `torch`, torch's operators one after the other; `kernels`, ours where there are some; and on these
            `graph`, a step is one CUDA graph, or `compile`, the model goes through torch.compile.
    """
    config = config.replace({"train.compile": "on" if way == "compile" else "off"})
    trainer = Trainer(config, build(config.model).to(device), images, device)
    if way == "graph":
        trainer.graphs = CudaGraphs()
    started = time.perf_counter()
    with running(way):
        trainer.epoch(0)
        first = time.perf_counter() - started
        took = trainer.epoch(1)["time/epoch_seconds"]
    peak = {"peak_gib": torch.cuda.max_memory_allocated(device) / 2**30} if device.type == "cuda" else {}
    if way == "compile" and not trainer.is_compiled:
        return {"error": "torch.compile failed; the model ran as it is"}
    shown = {"variant": config.model.variant, "images": len(images.labels)}
    return shown | {"epoch_seconds": took, "first_seconds": first} | peak


def packs(device: torch.device, small: bool, data: Path | None) -> Units:
    """Time a training step of one trial, alone and as its share of a pack."""
    sizes = {key: value for key, value in trial("softmax", small).model.model_dump().items() if key in SIZES}
    settings = {f"model.{key}": value for key, value in sizes.items()} | ({"train.batch": 16} if small else {})
    for variant in PACKED[:1] if small else PACKED:
        yield variant, partial(a_pack, variant, [1, 2] if small else [1, 2, 4, 8, 16], settings, device)


SIZES = ("patch", "width", "depth", "heads")


def a_pack(variant: str, sizes: list[int], settings: dict[str, Any], device: torch.device) -> Row:
    """Milliseconds of a trial's step for each size of pack."""
    found = bench_packs([variant], "cifar10", sizes, rounds=2, settings=settings, device=str(device))
    return {f"ms_of_{row['pack']}": row["ms"] for row in found["rows"]} | {"rows": found["rows"]}


def layers(device: torch.device, small: bool, data: Path | None) -> Units:
    """Forward passes and training steps of layers over N, against torch's fused softmax attention."""
    shape = LayerShape(batch_tokens=32 if small else 65_536)
    for n in (16, 64) if small else (64, 256, 1024, 4096, 16_384, 65_536):
        for dtype in (torch.float32,) if small else (torch.bfloat16, torch.float32):
            name = f"N = {n}, {str(dtype).removeprefix('torch.')}"
            yield name, partial(all_layers, n, shape, dtype, device, 2 if small else 5)


def all_layers(n: int, shape: LayerShape, dtype: torch.dtype, device: torch.device, rounds: int) -> Row:
    """Return the fastest of ours in a training step, and the reference; all rows are in the file."""
    rows = bench_layers(list(VARIANTS), [n], shape, rounds=rounds, device=device, dtype=dtype)["rows"]
    steps = [row for row in rows if row["pass"] == "step" and row["ms"] is not None]
    best = min((row for row in steps if row["name"] in VARIANTS), key=lambda row: row["ms"], default=None)
    shown = {} if best is None else {"best": best["name"], "step_ms": best["ms"]}
    return shown | {"sdpa_ms": next((row["ms"] for row in steps), None), "rows": rows}


def evaluation(device: torch.device, small: bool, data: Path | None) -> Units:
    """Images a second in evaluation, for each size of its batches."""
    images = Images(*(x[: 4 * GPU_BATCH] for x in pictures(small, data))).to(device)
    for variant in PACKED[:1] if small else PACKED:
        yield variant, partial(evaluated, trial(variant, small), images, device, (8, 16) if small else BATCHES)


BATCHES = (256, 512, 1024, GPU_BATCH, 2 * GPU_BATCH, 4 * GPU_BATCH)


def evaluated(config: TrialConfig, images: Images, device: torch.device, batches: tuple[int, ...]) -> Row:
    """Images a second for each size, and the best size."""
    model = build(config.model).to(device)

    def way(batch: int) -> Callable[[], None]:
        return lambda: (logits_of(model, images, config.data.dataset, batch=batch), None)[1]

    rows = compete({str(batch): way(batch) for batch in batches}, 2, device)
    found = {row["name"]: 1000 * len(images.labels) / row["ms"] for row in rows}
    best = {"best": int(max(found, key=lambda name: found[name]))}
    return best | {f"images_per_second_of_{name}": value for name, value in found.items()}


def backends(device: torch.device, small: bool, data: Path | None) -> Units:
    """The backends of torch's fused softmax attention, in a training step."""
    shape = LayerShape(batch_tokens=32 if small else 65_536)
    for n in (16,) if small else (64, 256, 1024, 4096, 16_384, 65_536):
        for dtype in (torch.float32,) if small else (torch.bfloat16, torch.float32):
            name = f"SDPA, N = {n}, {str(dtype).removeprefix('torch.')}"
            yield name, partial(all_backends, n, shape, dtype, device)


def all_backends(n: int, shape: LayerShape, dtype: torch.dtype, device: torch.device) -> Row:
    """Milliseconds of each, and the fastest."""
    rows = [row for row in bench_backends(n, shape, rounds=5, device=device, dtype=dtype) if row["ms"] is not None]
    shown = {f"{row['name']}_ms": row["ms"] for row in rows}
    return {"best": min(rows, key=lambda row: row["ms"])["name"]} | shown | {"rows": rows}


def models(device: torch.device, small: bool, data: Path | None) -> Units:
    """Whole models, forward and a training step."""
    config = trial("softmax", small)
    settings = {f"model.{key}": getattr(config.model, key) for key in SIZES} | {"train.batch": config.train.batch}
    settings |= {"train.compile": "off"}
    for variant in VARIANTS[1:2] if small else VARIANTS[1:]:
        yield variant, partial(a_model, variant, settings, device)


def a_model(variant: str, settings: dict[str, Any], device: torch.device) -> Row:
    """Images a second, and their part of what the model with softmax attention does in the same rounds."""
    rows = bench_models([variant], "cifar10", rounds=2, settings=settings, device=str(device))["rows"]
    own = {row["pass"]: row for row in rows if row["name"] == variant}
    shown = {f"{what}_images_per_second": row["images_per_second"] for what, row in own.items()}
    return shown | {"of_softmax": 1 / own["step"]["ratio"], "rows": rows}


Make = Callable[[torch.device, bool, Path | None], Units]
PARTS: dict[str, tuple[Make, float]] = {
    "card": (card, 0.1),
    "correctness": (correctness, 0.3),
    "epoch": (epoch, 0.65),
    "packs": (packs, 0.72),
    "backends": (backends, 0.76),
    "evaluation": (evaluation, 0.79),
    "layers": (layers, 0.94),
    "models": (models, 1.0),
}
"""The most important first, and when each ends, as a part of all the time."""
