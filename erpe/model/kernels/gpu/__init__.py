"""Triton kernels for GPUs, where Triton is installed: linear.py and masked.py have them, `*launch.py` starts them,
`*ops.py` makes operators of torch of them. They were never run on a GPU: see `tests/test_triton.py` for what is known.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from textwrap import shorten
from typing import Any

import torch
from torch import Tensor

MOST, TABLE = 128, 64 * 128
"""Of D, Dv and m, and of D m where vectors are projected: more do not fit in a program's registers and shared memory.
Of that D = m = 128 without projections takes 144 KiB, D = 64 with m = 128 projections 172 KiB, as GPUs from H100 on
have; D = m = 128 with projections would take about 350 KiB."""

TURN, BASIS = 64, 32
"""Up to these D vectors are turned within the kernels, and go into a rotation's basis. Beyond, torch does it before:
the backward pass of turned vectors spills 332 bytes at D = 128, and that of a basis at 64 spills 96 or, with twice the
warps, takes 144 KiB of shared memory in the place of 92."""

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

AVAILABLE = torch.backends.cuda.is_built() and importlib.util.find_spec("triton") is not None

if AVAILABLE:  # here: torch.compile wants to know operators before it reads a model
    from erpe.model.kernels.gpu import masked_ops, ops  # noqa: F401

WANTED = [True]
"""Whether they are to be used at all: see `torch_only`."""

REFUSED: set[tuple[Any, ...]] = set()
"""Sizes of which they could not be built or started here."""


@contextmanager
def torch_only() -> Iterator[None]:
    """In the block torch's operators do all of it: what the kernels are compared with."""
    before, WANTED[0] = WANTED[0], False
    try:
        yield
    finally:
        WANTED[0] = before


def or_torch(kernels: Callable[[], Any], torchs: Callable[[], Any], *size: Any) -> Any:
    """What the kernels give. If those of a size cannot be built or started here, torch's operators do it, from now on.

    Raises:
        torch.OutOfMemoryError: the device's memory has no room.
    """
    if WANTED[0] and size not in REFUSED:
        try:
            return kernels()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            REFUSED.add(size)
            reason = shorten(" ".join(str(error).split()), 200, placeholder=" ...")
            warnings.warn(f"kernels for GPUs do not run here ({type(error).__name__}: {reason})", stacklevel=2)
    return torchs()


def serves(q: Tensor, k: Tensor, v: Tensor, m: int, projected: bool = False) -> bool:
    """Whether the kernels take these: on CUDA, in float32 or half precision, not too many numbers and features m."""
    if not AVAILABLE or not WANTED[0] or q.device.type != "cuda":
        return False
    fits = max(q.shape[-1], v.shape[-1], m) <= MOST and not (projected and q.shape[-1] * m > TABLE)
    return fits and all(x.dtype in DTYPES for x in (q, k, v))


def wide(n: int) -> int:
    """The power of two, at least 16, that so many numbers fit in: what Triton's products take."""
    return max(16, 1 << (n - 1).bit_length())
