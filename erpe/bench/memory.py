"""What a call needs of memory at its peak, as torch's allocator counts; and a limit that is met by an exception."""

from __future__ import annotations

import contextlib
import os
import resource
import sys
from collections.abc import Callable, Iterator

import torch
from torch.autograd import profiler

PART = 0.8
"""Of the machine's memory: what asks for more gets an exception, where the system would end the process."""


def peak_bytes(call: Callable[[], None], device: torch.device) -> int:
    """Bytes that live at the peak of a call, beyond those that lived before it.

    On a CPU every allocation and release by torch is counted, also those inside operators; not what the libraries
    under it take for themselves. On CUDA torch's own statistics are read.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with _without_chatter(), profiler.profile(use_kineto=False, profile_memory=True) as recorded:
        call()
    assert recorded.kineto_results is not None
    changes = [
        (event.start_ns(), event.nbytes())
        for event in recorded.kineto_results.events()
        if event.name() == profiler.MEMORY_EVENT_NAME
    ]
    live = peak = 0
    for _, change in sorted(changes, key=lambda change: change[0]):  # stable: of one moment, as they came
        live += change
        peak = max(peak, live)
    return peak


@contextlib.contextmanager
def _without_chatter() -> Iterator[None]:
    """Silence what the profiler's C++ writes to stderr."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


@contextlib.contextmanager
def bounded(device: torch.device) -> Iterator[None]:
    """Inside, a tensor that the memory has no room for is an exception on a CPU, too: see `erpe.text.out_of_memory`."""
    before = resource.getrlimit(resource.RLIMIT_DATA)
    if device.type == "cpu":
        most = int(PART * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
        hard = before[1]
        resource.setrlimit(resource.RLIMIT_DATA, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)
