"""The C library's heap, told to keep what big tensors give back."""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_MOST = 2**31 - 1


def keep_heap() -> None:
    """Let malloc reuse memory instead of returning it to the kernel, which clears and maps it page by page each time.

    glibc takes tensors from 32 MiB on, and often smaller ones, from the kernel and gives them back at once. Measured
    on one thread of an AMD EPYC: a training step of relu_general with 1,024 tokens took about a third of the time
    (the machine was not idle). Other C libraries, and devices with an allocator of their own, are left alone.
    """
    for option in (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD):
        _tell("mallopt", option, _MOST)


def empty_heap() -> None:
    """Give memory that is kept and not in use back to the system."""
    _tell("malloc_trim", 0)


def _tell(function: str, *arguments: int) -> None:
    if sys.platform.startswith("linux"):
        known = getattr(ctypes.CDLL(None), function, None)
        if known is not None:
            known(*arguments)
