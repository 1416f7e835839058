"""Which device trains, and what it is called."""

from __future__ import annotations

from textwrap import shorten

import torch

from erpe.errors import ConfigError, either

DEVICES = ("cpu", "cuda", "mps")
"""Kinds of devices; a number may follow, as in cuda:1."""


def pick_device(wanted: str = "auto") -> torch.device:
    """`auto`: CUDA, else MPS, else the CPU.

    Raises:
        ConfigError: this machine has no such device.
    """
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if wanted.partition(":")[0] not in DEVICES:
        raise ConfigError(f"device: {wanted[:100]!r} given; use {either(['auto', *DEVICES])} instead")
    try:
        device = torch.device(wanted)
        torch.zeros(1, dtype=torch.float32, device=device).item()  # torch knows devices that hold no values
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = shorten(str(error), 120, placeholder=" ...")
        raise ConfigError(f"device {wanted!r}: this machine has none ({reason}); use cpu instead") from None
    return device


def device_name(device: torch.device) -> str:
    """`cpu`, `mps`, or the name of the GPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
