"""torch.compile for a trial: one graph for a training step's forward pass and one for evaluation, or none and a word.

A process may have many trials, one after the other or at once, and none is compiled worse than the first: each has
versions of its own, and what earlier trials left is dropped when no other is at work. Sizes are static: a batch with
fewer images than the one before is filled up with black ones, whose logits are cut off.
"""

from __future__ import annotations

import gc
import importlib.util
import warnings
from collections.abc import Callable
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from erpe.config import TrainConfig
from erpe.model.kernels.low_rank import series
from erpe.model.rotary import fourier_basis, fourier_sines
from erpe.text import first_line

Warn = Callable[[str], None]
"""Called with what someone should know: a line."""

BACKEND = "inductor"
"""Of torch.compile; tests take another, which needs no compiler of C++ or Triton."""

LIMIT = 64
"""Versions of one function: sizes of batches that had no room, packs of more and fewer trials."""

_at_work: WeakSet[Compiled] = WeakSet()


class Compiled:
    """A function of images through torch.compile, as a whole or not at all.

    Args:
        plain: takes images (B, channels, height, width), and perhaps more, and gives logits (B, classes).
        module: the one whose `training` says which graph is asked for.
        warn: told in one line if the function runs as it is, slower, because it cannot be compiled.
    """

    def __init__(self, plain: Callable[..., Tensor], module: nn.Module, warn: Warn = warnings.warn) -> None:
        self.plain, self.module, self.warn = plain, module, warn
        self.fast: Callable[..., Tensor] | None = _whole(plain)
        self.failed = ""
        """What was told."""
        self.sizes: dict[bool, int] = {}
        _at_work.add(self)

    def __call__(self, images: Tensor, *more: Any) -> Tensor:
        """Logits of the images; with `more`, whose sizes go with theirs, none are filled up."""
        if self.fast is not None:
            try:
                return self.fast(images, *more) if more else self._filled(images)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # torch names none of a compiler's; the model's own comes again below
                self.failed = f"torch.compile: {first_line(error)}; the model runs without it, slower"
                self.warn(self.failed)
                self.fast = None
        return self.plain(images, *more)

    def _filled(self, images: Tensor) -> Tensor:
        assert self.fast is not None
        count, training = len(images), self.module.training
        size = self.sizes[training] = max(count, self.sizes.get(training, 0))
        if count < size:
            images = torch.cat([images, images.new_zeros(size - count, *images.shape[1:])])
        return self.fast(images)[:count]


def _whole(plain: Callable[..., Tensor]) -> Callable[..., Tensor]:
    gc.collect()  # trials that ended hold each other
    if not _at_work:
        torch.compiler.reset()
    for constant in (fourier_basis, fourier_sines, series):  # made once and kept: not to be made in each step
        torch.compiler.assume_constant_result(constant)
    whole: dict[str, Any] = {"fullgraph": True, "dynamic": False, "backend": BACKEND}
    own: dict[str, Any] = {"isolate_recompiles": True, "recompile_limit": LIMIT}  # torch's annotations lack these
    return torch.compile(plain, **whole, **own)


def is_wanted(train: TrainConfig, device: torch.device) -> bool:
    """Tell whether a trial is compiled: where asked for or, left to us, on CUDA with Triton at hand.

    Measured on 2 CPU cores (Xeon-class, float32, 205k and 2.7M parameters): 6 to 19 % faster steps for 18 to 58 s
    of compilation, so `auto` leaves the CPU alone.
    """
    if train.compile == "auto":
        return device.type == "cuda" and importlib.util.find_spec("triton") is not None
    return train.compile == "on"


def compiled(model: nn.Module, train: TrainConfig, device: torch.device, warn: Warn = warnings.warn) -> Any:
    """The model, compiled if it `is_wanted`."""
    return Compiled(model, model, warn) if is_wanted(train, device) else model
