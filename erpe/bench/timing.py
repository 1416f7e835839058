"""Interleaved rounds: every contender once a round, so that a slow minute of the machine is everybody's."""

from __future__ import annotations

import math
import os
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import torch

import erpe
from erpe.surroundings import cores
from erpe.tracking.provenance import cpu_name
from erpe.training.evaluate import wait_for
from erpe.training.malloc import keep_heap

LEAST_SECONDS = 0.01
"""A contender is called as often a round as this takes: shorter times are noise."""


def compete(calls: dict[str, Callable[[], None]], rounds: int, device: torch.device) -> list[dict[str, Any]]:
    """Time calls against the first of them.

    Args:
        calls: name -> what to time; it waits for the device itself or leaves that to us.
        rounds: that count; one more warms up.
    Returns:
        A row a call: `name`, `ms` (median), `low`, `high`, `ratio` (of medians, to the first), `n` rounds.
    """
    keep_heap()
    for call in calls.values():
        call()  # the first builds what later ones find
    repeats = {name: max(1, math.ceil(LEAST_SECONDS / _seconds(call, 1, device))) for name, call in calls.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds + 1):
        for name, call in calls.items():
            times[name].append(1000 * _seconds(call, repeats[name], device))
    medians = {name: statistics.median(found[1:]) for name, found in times.items()}
    reference = next(iter(medians.values()))
    return [
        {
            "name": name, "ms": median, "low": min(times[name][1:]), "high": max(times[name][1:]),
            "ratio": median / reference, "n": rounds,
        }
        for name, median in medians.items()
    ]  # fmt: skip


def _seconds(call: Callable[[], None], repeats: int, device: torch.device) -> float:
    """Of one call."""
    wait_for(device)
    started = time.perf_counter()
    for _ in range(repeats):
        call()
    wait_for(device)
    return (time.perf_counter() - started) / repeats


def machine(device: torch.device) -> dict[str, Any]:
    """Return what a number depends on: hardware, threads, versions."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    return {
        "device": name, "cores": cores(), "threads": torch.get_num_threads(),
        "torch": version("torch"), "python": platform.python_version(), "erpe": erpe.__version__,
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", "default"),
    }  # fmt: skip
