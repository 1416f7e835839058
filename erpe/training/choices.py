"""What `erpe bench device` measured to be the fastest on a device: trials take it, and take nothing that it did not."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from erpe.config import ModelConfig, TrialConfig
from erpe.errors import StoreError
from erpe.model.kernels.gpu import flex
from erpe.store import DEVICES
from erpe.training.devices import device_name

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
"""Of torch's fused softmax attention."""

FLEX = "flex"
"""FlexAttention in its place, for log-weights of offsets."""


class Choices(NamedTuple):
    """By what is chosen."""

    step: tuple[str, ...] = ()
    """Variants whose training step is faster as one CUDA graph."""
    pack: tuple[str, ...] = ()
    """Variants whose packs are."""
    backends: Mapping[str, str] = {}
    """Fastest backend of softmax attention for each `size`."""

    def backend(self, config: TrialConfig, precision: str, packed: bool = False) -> str | None:
        """Return the chosen backend for a model's attention, if one was; vmap, and so a pack, cannot map `FLEX`."""
        chosen = self.backends.get(size(config.model, precision))
        return None if packed and chosen == FLEX else chosen

    def sdpa(self, config: TrialConfig, precision: str, packed: bool = False) -> AbstractContextManager[None]:
        """Return a context in which torch takes that backend, or the next that serves where it cannot."""
        chosen = self.backend(config, precision, packed)
        if chosen not in BACKENDS:
            return flex.wanted() if chosen == FLEX else nullcontext()
        order = [BACKENDS[chosen], *(each for each in BACKENDS.values() if each != BACKENDS[chosen])]
        return sdpa_kernel(order, set_priority=True)


NONE = Choices()


def size(model: ModelConfig, precision: str) -> str:
    """Name a size of softmax attention."""
    bias = ", log-weights" if model.encoding == "general" else ""
    return f"N = {model.grid[0] * model.grid[1]}, D = {model.head_dim}, {precision}{bias}"


def choices_of(measured: Mapping[str, Any], device: torch.device) -> Choices:
    """Return what was chosen for a device.

    Args:
        measured: see `erpe.store.Store.devices`.
    Raises:
        StoreError: it is damaged.
    """
    try:
        own = measured.get(device_name(device), {}) if measured else {}
        chosen = Choices(tuple(own.get("step", ())), tuple(own.get("pack", ())), dict(own.get("backends", {})))
        damaged = not set(chosen.backends.values()) <= {*BACKENDS, FLEX}
    except (AttributeError, TypeError, ValueError):
        damaged = True
    if damaged:
        raise StoreError(f"{DEVICES}: damaged; remove it, and measure again: erpe bench device")
    return chosen
