"""Where trials run: on Ray, here or on a cluster; or in this process, on a machine without Ray."""

from __future__ import annotations

import math
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from erpe.checkpoints import RemoteCheckpoints
from erpe.errors import ConfigError, StudyError
from erpe.execution.fair_share import TrialController
from erpe.execution.inline import run_inline
from erpe.execution.ray_tune.cluster import check_reachable, start, watch_head
from erpe.execution.trial_loop import TrialFactory
from erpe.surroundings import cores, short_folder
from erpe.text import first_line


class ResourceRequest(NamedTuple):
    """What the user asks of the machine; none of it is part of a study's identity."""

    concurrency: int | None = None
    """Trials at a time; default: the number of GPUs, or what the CPUs allow."""
    cpus: int = 1
    """CPUs, and threads, of a trial."""
    gpus: float | None = None
    """GPUs of a trial, or a part of one; default: what Ray sees, shared evenly."""
    address: str | None = None
    """Of a Ray cluster; default: Ray is started here."""
    pack: int = 1
    """Trials of one shape that share a worker, and train as one program."""

    def check(self, device: str = "auto") -> None:
        """Refuse what can be refused before anything is started.

        Raises:
            ConfigError: a number that makes no sense, a GPU where there is none, or a cluster that is not there.
        """
        if self.address:
            check_reachable(self.address)
        if self.concurrency is not None and self.concurrency < 1:
            raise ConfigError(f"concurrency: {self.concurrency} given; use 1 or more instead")
        if self.pack < 1:
            raise ConfigError(f"pack: {self.pack} given; use 1 or more instead")
        if self.cpus < 1:
            raise ConfigError(f"cpus per trial: {self.cpus} given; use 1 or more instead")
        if self.address is None:
            self._check_here(device)
        if self.gpus is None:
            return
        if not 0 <= self.gpus < math.inf or (self.gpus > 1 and self.gpus % 1):
            raise ConfigError(f"gpus per trial: {self.gpus:g} given; use a whole number or a part of 1 instead")
        if self.gpus and self.address is None:
            import torch

            if not torch.cuda.is_available():
                raise ConfigError(f"gpus per trial: {self.gpus:g} given, and torch sees no GPU here; use 0 instead")

    def _check_here(self, device: str) -> None:
        if self.cpus > cores():
            raise ConfigError(f"cpus per trial: {self.cpus} given, and this machine has {cores()}")
        if device != "auto":
            from erpe.training.loop import pick_device

            pick_device(device)


class Allocation(NamedTuple):
    """How the machine is shared out."""

    concurrency: int | None
    """Trials at a time; None: what fits on a cluster that may grow."""
    cpus: float
    gpus: float


def allocate(asked: ResourceRequest, trials: int, cpus: float, gpus: float) -> Allocation:
    """Share out what Ray sees.

    Raises:
        ConfigError: a trial would wait for ever for what is not there.
    """
    if asked.gpus and asked.gpus > gpus:
        raise ConfigError(f"gpus per trial: {asked.gpus:g} given, and Ray sees {gpus:g}; use --gpus-per-trial 0")
    if asked.cpus > cpus:
        raise ConfigError(f"cpus per trial: {asked.cpus} given, and Ray sees {cpus:g}")
    wanted = asked.concurrency or (int(gpus) if gpus and asked.gpus is None else int(cpus // asked.cpus))
    wanted = max(1, min(wanted, trials))
    # Parts that divide 1, so that every GPU is used up.
    part = asked.gpus if asked.gpus is not None else (1 / math.ceil(wanted / gpus) if gpus else 0.0)
    grows = asked.address is not None and asked.concurrency is None
    return Allocation(None if grows else wanted, asked.cpus, part)


class Workers(Protocol):
    """Something that runs trials."""

    @property
    def device(self) -> str:
        """What trials take if the choice is left to them: `cuda`, `mps` or `cpu`."""

    def search(self, controller: TrialController, start: TrialFactory) -> None:
        """Run trials until the controller has no more."""

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call a function where a trial would run."""


class InProcess:
    """One pack of trials after the other, here."""

    def __init__(self, pack: int) -> None:
        self._pack = pack

    @property
    def device(self) -> str:
        """See `pick_device`."""
        from erpe.training.loop import pick_device

        return pick_device().type

    def search(self, controller: TrialController, start: TrialFactory) -> None:
        """See `run_inline`."""
        run_inline(controller, start, self._pack)

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """Just call it."""
        return function(*args)


class OnRay:
    """Trials on Ray's workers."""

    def __init__(self, shares: Allocation, scratch: Path, pack: int) -> None:
        self._shares, self._scratch, self._pack = shares, scratch, pack

    @property
    def device(self) -> str:
        """Ray shows a worker the GPUs of its share, and no others."""
        return "cuda" if self._shares.gpus else "cpu"

    def search(self, controller: TrialController, start: TrialFactory) -> None:
        """See `run_ray`."""
        from erpe.execution.ray_tune.scheduler import run_ray

        run_ray(controller, start, **self._shares._asdict(), scratch=self._scratch, pack=self._pack)

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call it in a task with a trial's resources; what it raises is raised here."""
        import ray

        def task() -> Any:
            return function(*args)

        remote = ray.remote(num_cpus=self._shares.cpus, num_gpus=self._shares.gpus)(task)
        try:
            return ray.get(remote.remote())
        except ray.exceptions.RayTaskError as error:
            raise error.cause from error
        except ray.exceptions.RayError as error:
            said = first_line(error)
            raise StudyError(f"ray: {said}; trials stay as they are, the same command continues") from error


@contextmanager
def on_ray(
    asked: ResourceRequest, trials: int, scratch: Path, place: RemoteCheckpoints | None = None
) -> Iterator[Workers]:
    """Start Ray, or join it, for as long as the block runs.

    Args:
        place: where a cluster's nodes keep checkpoints, which is tried on each of them.
    Raises:
        ConfigError: the cluster does not respond, or lacks what is asked for.
        StoreError: a node cannot write where checkpoints go, or does not see what others wrote.
    """
    with ExitStack() as opened:
        ours = "ray" not in sys.modules or not sys.modules["ray"].is_initialized()
        if ours:  # Ray is imported only after its environment is set
            folder = opened.enter_context(short_folder())
            start(asked.address, asked.cpus * (asked.concurrency or max(1, min(trials, cores() // asked.cpus))), folder)
        import ray

        from erpe.execution.ray_tune.storage_check import require_shared

        if ours:
            opened.callback(ray.shutdown)
        shutil.rmtree(scratch, ignore_errors=True)
        opened.callback(_remove, scratch)
        if asked.address and place:
            require_shared(place)
        found = ray.cluster_resources()
        with watch_head(asked.address):
            yield OnRay(allocate(asked, trials, found.get("CPU", 0), found.get("GPU", 0)), scratch, asked.pack)


def _remove(scratch: Path) -> None:
    with suppress(OSError):
        shutil.rmtree(scratch)
        scratch.parent.rmdir()  # unless another study of this store is running


@contextmanager
def in_process(asked: ResourceRequest) -> Iterator[Workers]:
    """Yield an executor that runs trials in this process."""
    yield InProcess(asked.pack)
