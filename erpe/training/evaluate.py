"""The measures of the study: how good a trained model is, and what it costs."""

from __future__ import annotations

import contextlib
import io
import math
import re
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from erpe.config import TrialConfig
from erpe.datasets import Dataset, facts_of
from erpe.io import write_atomic
from erpe.model import ViT
from erpe.model.flops import forward_flops, train_step_flops
from erpe.training.data import Images, normalise
from erpe.training.malloc import empty_heap

FULL_BATCH = 256
"""Images of a full batch in evaluation and timing."""

GPU_BATCH = 2048
"""Images of a batch in evaluation on a GPU: with four heads 8,192 programs of a kernel, where an H200 runs some 500 at
once. It keeps no more than a training step of 512. Never timed: `infra/gpu-check` times others, too."""


@torch.no_grad()
def logits_of(
    model: ViT,
    images: Images,
    dataset: str | Dataset,
    forward: Callable[[Tensor], Tensor] | None = None,
    batch: int | None = None,
) -> Tensor:
    """(n, classes) float32 on the CPU, in eval mode, clean images, no autocast.

    Args:
        forward: the model as it runs fastest, perhaps compiled; default: as it is.
        batch: images at once; default: what fills the device.
    """
    model.eval()
    batch = batch or (FULL_BATCH if images.pixels.is_cpu else GPU_BATCH)
    parts = [(forward or model)(normalise(pixels, dataset)) for pixels in images.pixels.split(batch)]
    return torch.cat(parts).float().cpu()


def fit(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Measures that are known at once, of predictions (n, classes) and labels (n,) on the CPU.

    Returns:
        `accuracy` in [0, 1], `log_likelihood` (sum of ln p(y given x), nats), `loss` (its mean, negated).
    """
    likelihood = -cross_entropy(logits.double(), labels, reduction="sum").item()
    accuracy = (logits.argmax(dim=1) == labels).double().mean().item()
    return {"accuracy": accuracy, "log_likelihood": likelihood, "loss": -likelihood / len(labels)}


def scores(logits: Tensor, labels: Tensor, split: str) -> dict[str, float]:
    """Measures of predictions.

    Args:
        logits: (n, classes).
        labels: (n,).
        split: prefix of the keys: `val`, `test` or `train`.
    Returns:
        Those of `fit`, and macro `precision`, `recall`, `f1` (scikit-learn).
    """
    from sklearn.metrics import precision_recall_fscore_support  # a second, at a trial's end: not before its first step

    labels, predicted = labels.cpu(), logits.argmax(dim=1)
    precision, recall, f1, _ = precision_recall_fscore_support(labels, predicted, average="macro", zero_division=0)
    found = fit(logits, labels) | {"precision": float(precision), "recall": float(recall), "f1": float(f1)}
    return {f"{split}/{name}": value for name, value in found.items()}


def confusion(logits: Tensor, labels: Tensor, dataset: str | Dataset, split: str) -> dict[str, Any]:
    """`matrix[true][predicted]` counts, for a figure."""
    from sklearn.metrics import confusion_matrix

    names = list(facts_of(dataset).names)
    matrix = confusion_matrix(labels.cpu(), logits.argmax(dim=1), labels=range(len(names)))
    return {"split": split, "classes": names, "matrix": matrix.tolist()}


def per_class(logits: Tensor, labels: Tensor, dataset: str | Dataset) -> dict[str, Any]:
    """Precision, recall, F1 and support of each class (scikit-learn)."""
    from sklearn.metrics import classification_report

    names, predicted = facts_of(dataset).names, logits.argmax(dim=1)
    how: Any = {"labels": range(len(names)), "target_names": names, "output_dict": True, "zero_division": 0}
    return classification_report(labels.cpu(), predicted, **how)


def information_criteria(log_likelihood: float, k: int, n: int) -> dict[str, float]:
    """AIC = 2k - 2 lnL and BIC = k ln n - 2 lnL, with lnL on the n training images and k trainable parameters.

    Source: Akaike 1974; Schwarz 1978. For networks of more parameters than images the penalty dwarfs the fit.
    """
    return {"aic": 2 * k - 2 * log_likelihood, "bic": k * math.log(n) - 2 * log_likelihood, "train/images": n}


def inference_time(
    model: ViT,
    images: Images,
    dataset: str | Dataset,
    repeats: int = 30,
    fastest: Callable[[ViT], Callable[[Tensor], Tensor]] = lambda model: model,
) -> dict[str, float]:
    """Milliseconds an image: median and 95th percentile over repeats after warm-up, the device synchronised.

    `_ms_per_image` is of a full batch of `time/inference_batch` images, `_ms_batch1` of one image alone. The images
    lie normalised on the device before the clock starts.

    Args:
        fastest: gives the model as it is run, perhaps compiled, anew for each size of a batch; default: as it is.
    """
    model.eval()
    ready = normalise(images.pixels[:FULL_BATCH], dataset)
    found: dict[str, float] = {"time/inference_batch": len(ready)}
    for name, batch in (("ms_per_image", ready), ("ms_batch1", ready[:1])):
        times = _repeat(fastest(model), batch, repeats)
        found[f"time/inference_{name}"] = statistics.median(times)
        found[f"time/inference_{name}_p95"] = float(np.percentile(times, 95))
    return found


@torch.no_grad()
def _repeat(model: Callable[[Tensor], Tensor], batch: Tensor, repeats: int) -> list[float]:
    times = []
    for turn in range(repeats + 3):
        wait_for(batch.device)
        started = time.perf_counter()
        model(batch)
        wait_for(batch.device)
        if turn >= 3:
            times.append((time.perf_counter() - started) * 1000 / len(batch))
    return times


def wait_for(device: torch.device) -> None:
    """Until the device has done all it was asked."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


@torch.no_grad()
def save_attention_example(path: Path, model: ViT, images: Images, dataset: str | Dataset) -> None:
    """Write what the first image's tokens attend to, as an `.npz` without pickles.

    `image` (channels, height, width) in [0, 1], `maps` (depth, H, N, N), `grid` (h, w). For more than 256 tokens the
    heads are averaged, to keep the file small.
    """
    model.eval()
    pixels = images.pixels[:1]
    maps = model.attention_maps(normalise(pixels, dataset))[0]
    if maps.shape[-1] > 256:
        maps = maps.mean(dim=1, keepdim=True)
    image = (pixels[0].float() / 255).cpu().numpy()
    file = io.BytesIO()
    np.savez_compressed(file, image=image, maps=maps.half().cpu().numpy(), grid=np.array(model.config.grid))
    write_atomic(path, file.getvalue())


def save_predictions(path: Path, logits: Tensor, labels: Tensor) -> None:
    """Write the `predicted` and the true class of each image, (n,) uint8 each, as an `.npz` without pickles."""
    file = io.BytesIO()
    np.savez_compressed(file, predicted=logits.argmax(dim=1).byte().numpy(), labels=labels.cpu().byte().numpy())
    write_atomic(path, file.getvalue())


def reset_peak_memory(device: torch.device) -> None:
    """Forget the peak of whatever this process did before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    empty_heap()  # what an earlier trial left there
    with contextlib.suppress(OSError):  # not Linux, or not allowed: the peak is of the whole process
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory_mib(device: torch.device) -> float:
    """Peak device memory (CUDA) or resident set of this process (elsewhere), in MiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    except OSError:
        peak = None
    return int(peak[1]) / 1024 if peak else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def cost(config: TrialConfig) -> dict[str, float]:
    """FLOPs an image, multiply and add counted as two, by the closed form."""
    return {
        "flops/forward": float(forward_flops(config.model)),
        "flops/train_step": float(train_step_flops(config.model)),
    }


def seconds_per_epoch(history: list[dict[str, float]]) -> float:
    """Median over epochs, the first left out if there are others; evaluation is not in it."""
    times = [epoch["time/epoch_seconds"] for epoch in history]
    return statistics.median(times[1:] or times)
