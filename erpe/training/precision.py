"""In which precision a trial trains. What is evaluated is always evaluated in float32."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from typing import Literal

import torch

from erpe.config import TrialConfig

Precision = Literal["float32", "bfloat16"]

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


def pick_precision(config: TrialConfig, device: torch.device) -> Precision:
    """What `train.precision` comes to: `auto` is bfloat16 on GPUs that compute in it, and on such CPUs from `LEAST` on.

    The hardware and the configuration decide, no clock: the same machine decides the same again.
    """
    if config.train.precision != "auto":
        return config.train.precision
    if device.type == "cuda":
        gains = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        size = config.train.batch * math.prod(config.model.grid) * config.model.width
        gains = device.type == "cpu" and bfloat16_unit() is not None and size >= LEAST
    return "bfloat16" if gains else "float32"


def bfloat16_unit() -> str | None:
    """The part of this CPU that multiplies in bfloat16, the fastest there is: `AMX`, `AVX-512`, or none."""
    has = torch.cpu.get_capabilities()
    for flag, name in {"amx_bf16": "AMX", "avx512_bf16": "AVX-512"}.items():
        if has.get(flag, False):
            return name
    return None


def autocast(precision: Precision, device: torch.device) -> AbstractContextManager[None]:
    """The context of a forward pass: in bfloat16 whatever torch does as well in it; weights stay float32."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bfloat16")
