"""In which precision a trial trains. What is evaluated is always evaluated in float32."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch

from erpe.config import TrialConfig, defaults
from erpe.datasets import DATASETS
from erpe.errors import StoreError

Precision = Literal["float32", "bfloat16", "float16"]

LEAST = 2**17
"""Numbers in the tokens of a batch, B N C, from which bfloat16 pays on a CPU.

Measured as processor time of one thread of an Intel Xeon with AMX that was not idle (torch 2.13, depth 2 or 4, all
twelve or four of them, n = 3 to 5): images a second in bfloat16 over those in float32.

    B N C                                           ratio
    16,384     digits, width 16, batch 32           0.66 to 0.95
    32,768     digits, width 32, batch 64           0.86 to 0.96
    65,536     digits, width 64, batch 64           0.91 to 1.37, half of them below 1.07
    401,408    MNIST, width 64, batch 128           1.01 to 1.58, median 1.3
    524,288    CIFAR-10, patch 4, width 64          1.06 to 1.46, median 1.3
"""

TENSOR_CORES = 7, 0
"""Capability from which GPUs are quicker in float16; some before it are many times slower."""


def pick_precision(config: TrialConfig, device: torch.device) -> Precision:
    """Return what `train.precision` comes to: `auto` is bfloat16 on GPUs that compute in it, and on such CPUs from
    `LEAST` on, and float16 on older GPUs with tensor cores.

    The hardware and the configuration decide, no clock: the same machine decides the same again.
    """
    if config.train.precision != "auto":
        return config.train.precision
    if device.type == "cuda":
        return _of_gpu(device)
    size = config.train.batch * math.prod(config.model.grid) * config.model.width
    return "bfloat16" if bfloat16_unit(device) is not None and size >= LEAST else "float32"


def _of_gpu(device: torch.device) -> Precision:
    if bfloat16_unit(device):
        return "bfloat16"
    return "float16" if torch.cuda.get_device_capability(device) >= TENSOR_CORES else "float32"


def explain_auto(device: torch.device) -> str:
    """Return what `train.precision=auto` comes to on a device, and why."""
    if device.type == "cuda":
        lacks = "this GPU has no bfloat16"
        return {
            "bfloat16": "bfloat16: this GPU computes in it",
            "float16": f"float16, with a scaled loss: {lacks}",
            "float32": f"float32: {lacks}, and no tensor cores",
        }[_of_gpu(device)]
    unit = bfloat16_unit(device)
    if unit is None:
        lacks = "this CPU has neither AMX nor AVX-512 for bfloat16"
        return f"float32: {lacks if device.type == 'cpu' else f'bfloat16 is not taken on {device.type}'}"
    large = [name for name in DATASETS if pick_precision(defaults("softmax", name), device) == "bfloat16"]
    where = f"where batch * tokens * width is {LEAST:,} or more, so by default for {', '.join(large)}"
    return f"bfloat16, by {unit}, {where}; float32 below, where it does not pay"


def bfloat16_unit(device: torch.device) -> str | None:
    """Return what multiplies in bfloat16 fastest on a device: `AMX` or `AVX-512` of a CPU, `GPU`, or none."""
    if device.type == "cuda":
        return "GPU" if torch.cuda.is_bf16_supported(including_emulation=False) else None
    has = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    for flag, name in {"amx_bf16": "AMX", "avx512_bf16": "AVX-512"}.items():
        if has.get(flag, False):
            return name
    return None


def recorded_precision(facts: Any, path: Path, default: Precision) -> Precision:
    """Return the precision that a file of a trial records; `default` where it is older than such records.

    Raises:
        StoreError: there is no such precision.
    """
    found: Any = facts.get("precision", default) if isinstance(facts, dict) else None
    if found not in get_args(Precision):
        raise StoreError(f"{path}: its precision is unknown")
    return cast(Precision, found)


def autocast(precision: Precision, device: torch.device) -> AbstractContextManager[None]:
    """Return the context of a forward pass: half precision where torch does as well in it; weights stay float32."""
    half = torch.float16 if precision == "float16" else torch.bfloat16
    return torch.autocast(device.type, dtype=half, enabled=precision != "float32")
