"""How long a study will take on this machine: a few steps of a typical model of each arm, extrapolated.

found = probe(plan, seconds=60)
found.total_seconds, found.threads, found.concurrency
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from erpe.bench.timing import machine
from erpe.bench.train import ENDLESS, epochs_of, imagined
from erpe.config import TrialConfig
from erpe.datasets import facts_of
from erpe.errors import ConfigError
from erpe.model import build
from erpe.study.distributions import typical
from erpe.study.plan import Arm, Plan
from erpe.surroundings import cores
from erpe.training.devices import pick_device
from erpe.training.evaluate import wait_for
from erpe.training.loop import Trainer

STEPS = 2
"""Of what is timed at once."""


class Probe(NamedTuple):
    """What was measured, one trial at a time, and what follows for the whole study."""

    machine: dict[str, Any]
    threads: int
    """Of a trial."""
    concurrency: int
    """Trials at a time that the estimate is for."""
    images_per_second: dict[str, float]
    """Arm -> images that a typical model of it trains on in a second."""
    total_seconds: float
    """Of the study, if no trial is pruned and trials do not slow each other down."""


def probe(
    plan: Plan, *, device: str = "auto", threads: int = 1, concurrency: int | None = None, seconds: float = 60
) -> Probe:
    """Train a few steps of each arm on made-up images of the data set's shape.

    Args:
        threads: of a trial on CPUs.
        concurrency: trials at a time; default: as many as the machine has GPUs, or cores for their threads.
        seconds: for all arms together; an arm that is slow takes its few steps anyway.
    Raises:
        ConfigError: numbers that make no sense, or a device that is not there.
    """
    for name, given in (("threads", threads), ("concurrency", concurrency)):
        if given is not None and given < 1:
            raise ConfigError(f"{name}: {given} given; use 1 or more instead")
    where, arms = pick_device(device), plan.arms()
    most = torch.cuda.device_count() if where.type == "cuda" else cores() // threads
    at_once = concurrency or max(1, most)
    speeds, total = {}, 0.0
    with _threads(threads):
        for arm in arms:
            spec = plan.search_spec(arm)
            config = typical(spec.space, spec.base)
            speeds[arm.name] = _images_per_second(config, where, seconds / len(arms))
            total += _images(plan, arm, config) / speeds[arm.name]
        return Probe(machine(where), threads, at_once, speeds, total / at_once)


def _images_per_second(config: TrialConfig, device: torch.device, seconds: float) -> float:
    """Of training, augmentation and optimiser included; the first steps warm up."""
    images = imagined(config, STEPS).to(device)
    epoch = epochs_of(Trainer(config.replace(ENDLESS), build(config.model).to(device), images, device))
    times: list[float] = []
    began = time.perf_counter()
    while len(times) < 2 or time.perf_counter() - began < seconds:
        started = time.perf_counter()
        epoch()
        wait_for(device)
        times.append(time.perf_counter() - started)
    return len(images.labels) / statistics.median(times[1:])


def _images(plan: Plan, arm: Arm, config: TrialConfig) -> float:
    """Images that all trials and confirmed runs of an arm train on; one that is only looked at counts a third."""
    facts, data = facts_of(plan.dataset), config.data
    held_out = facts.train * data.validation
    least = data.train_limit or facts.train
    confirm = plan.confirm_spec(arm, config).epochs
    searched = config.train.epochs * (min(least, facts.train - held_out) + held_out / 3)
    confirmed = confirm * min(least, facts.train) + facts.test / 3
    return plan.search.trials * searched + plan.confirm.seeds * confirmed


@contextlib.contextmanager
def _threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
