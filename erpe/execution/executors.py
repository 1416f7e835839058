"""Where trials run: on Ray, here or on a cluster; or in this process, on a machine without Ray."""

from __future__ import annotations

import math
import os
import shutil
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any, Literal, NamedTuple, TypedDict

from erpe.checkpoints import RemoteCheckpoints
from erpe.errors import ConfigError, StudyError
from erpe.execution.callbacks import Progress
from erpe.execution.fair_share import TrialController
from erpe.execution.ray_tune.cluster import (
    HEAD_SECONDS,
    OWN_SECONDS,
    WORKER_SECONDS,
    check_reachable,
    cluster_info,
    start,
    stop,
    watch_head,
)
from erpe.execution.signals import ending_at_once
from erpe.execution.trial_loop import PackRunner, TrialFactory
from erpe.execution.trial_queue import TrialQueue
from erpe.store import Store
from erpe.surroundings import cores, short_folder
from erpe.text import first_line


class How(TypedDict, total=False):
    """Where trials run; none of it changes a result, or which study is meant. Defaults: see `ResourceRequest`."""

    data_dir: Path | None
    device: str
    concurrency: int | None
    cpus_per_trial: int
    gpus_per_trial: float | None
    pack: int
    ray_address: str | None
    executor: Literal["ray", "inline"]


@dataclass(frozen=True)
class ResourceRequest:
    """What the user asks of the machine; none of it is part of a study's identity."""

    concurrency: int | None = None
    """Trials at a time; default: the number of GPUs, or what the CPUs allow."""
    cpus_per_trial: int = 1
    """CPUs, and threads, of a trial."""
    gpus_per_trial: float | None = None
    """GPUs of a trial, or a part of one; default: what Ray sees, shared evenly."""
    pack: int = 1
    """Trials of one shape that share a worker, and train as one program."""
    ray_address: str | None = None
    """Of a cluster; default: `ERPE_RAY_ADDRESS`, or else Ray is started here."""
    executor: Literal["ray", "inline"] = "ray"
    """inline: one trial, or pack, after the other in this process, without Ray."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""
    data_dir: Path | None = None
    """Folder of published data sets; default: `ERPE_DATA`, or `data`."""

    @property
    def address(self) -> str | None:
        """Of the cluster to join."""
        return self.ray_address or os.environ.get("ERPE_RAY_ADDRESS")

    @contextmanager
    def workers(
        self,
        trials: int,
        store: Store,
        study: str,
        remote: RemoteCheckpoints | None,
        progress: Progress,
        draining: Event,
    ) -> Iterator[Workers]:
        """Yield what runs trials of a study; see `on_ray`.

        Args:
            remote: where they keep their folders; None: in the store.
            draining: set once the user has asked for an end.
        """
        if self.executor == "inline":
            yield InProcess(self)
        else:
            progress.on_phase("workers")
            place = remote or RemoteCheckpoints(str(store.checkpoints))
            with on_ray(self, trials, store.root / "ray" / study, place, draining) as workers:
                yield workers

    def check(self) -> None:
        """Refuse what can be refused before anything is started.

        Raises:
            ConfigError: a number that makes no sense, a GPU where there is none, or a cluster that is not there.
        """
        if self.address:
            check_reachable(self.address)
        least = {"concurrency": self.concurrency, "pack": self.pack, "cpus per trial": self.cpus_per_trial}
        for name, given in least.items():
            if given is not None and given < 1:
                raise ConfigError(f"{name}: {given} given; use 1 or more instead")
        if self.address is None and self.cpus_per_trial > cores():
            raise ConfigError(f"cpus per trial: {self.cpus_per_trial} given, and this machine has {cores()}; use fewer")
        if self.address is None and self.device != "auto":
            from erpe.training.devices import pick_device

            pick_device(self.device)
        gpus = self.gpus_per_trial
        if gpus is None:
            return
        if not 0 <= gpus < math.inf or (gpus > 1 and gpus % 1):
            raise ConfigError(f"gpus per trial: {gpus:g} given; use a whole number or a part of 1 instead")
        if gpus and self.address is None:
            import torch

            if not torch.cuda.is_available():
                raise ConfigError(f"gpus per trial: {gpus:g} given, and torch sees no GPU here; use 0 instead")


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
    own, share = asked.cpus_per_trial, asked.gpus_per_trial
    if share and share > gpus:
        raise ConfigError(f"gpus per trial: {share:g} given, and Ray sees {gpus:g}; use --gpus-per-trial 0")
    if own > cpus:
        raise ConfigError(f"cpus per trial: {own} given, and Ray sees {cpus:g}; use fewer")
    wanted = asked.concurrency or (int(gpus) if gpus and share is None else int(cpus // own))
    wanted = max(1, min(wanted, trials))
    # Parts that divide 1, so that every GPU is used up.
    part = share if share is not None else (1 / math.ceil(wanted / gpus) if gpus else 0.0)
    grows = asked.address is not None and asked.concurrency is None
    return Allocation(None if grows else wanted, own, part)


class InProcess:
    """One pack of trials after the other, here."""

    def __init__(self, asked: ResourceRequest) -> None:
        self._asked = asked

    @property
    def device(self) -> str:
        """What trials train on: `cuda`, `mps` or `cpu`."""
        from erpe.training.devices import pick_device

        return pick_device().type if self._asked.device == "auto" else self._asked.device

    def search(self, controller: TrialController, start: TrialFactory) -> None:
        """Run trials until the controller has no more: the next pack, an epoch of it, a report.

        Raises:
            ErpeError: see `StudyController.on_trial_result`.
        """
        queue, runner = TrialQueue(controller, self._asked.pack), PackRunner(start)
        while pack := queue.next_pack():
            runner.hold({trial.uid: (trial.config, controller.folder(trial)) for trial in pack})
            try:
                events = runner.round()
            except Exception:
                runner.hold({})
                queue.on_crash(pack, traceback.format_exc())
                continue
            for trial in pack:
                if trial.uid in events:
                    queue.on_event(trial, events[trial.uid])
            queue.release(pack)

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call a function where a trial would run."""
        return function(*args)


class OnRay:
    """Trials on Ray's workers."""

    def __init__(self, shares: Allocation, scratch: Path, asked: ResourceRequest) -> None:
        self._shares, self._scratch, self._asked = shares, scratch, asked

    @property
    def device(self) -> str:
        """See `InProcess`. Ray shows a worker the GPUs of its share, and no others."""
        return ("cuda" if self._shares.gpus else "cpu") if self._asked.device == "auto" else self._asked.device

    def search(self, controller: TrialController, start: TrialFactory) -> None:
        """See `run_ray`."""
        from erpe.execution.ray_tune.scheduler import run_ray

        run_ray(controller, start, **self._shares._asdict(), scratch=self._scratch, pack=self._asked.pack)

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


Workers = InProcess | OnRay
"""Something that runs trials."""


@contextmanager
def on_ray(
    asked: ResourceRequest,
    trials: int,
    scratch: Path,
    place: RemoteCheckpoints | None = None,
    draining: Event | None = None,
) -> Iterator[Workers]:
    """Start Ray, or join it, for as long as the block runs.

    Args:
        place: where a cluster's nodes keep checkpoints, which is tried on each of them.
        draining: set once the user has asked for an end.
    Raises:
        ConfigError: the cluster does not respond, or lacks what is asked for.
        StoreError: a node cannot write where checkpoints go, or does not see what others wrote.
        StudyError, KeyboardInterrupt: see `watch_head`.
    """
    with ExitStack() as opened:
        ours = "ray" not in sys.modules or not sys.modules["ray"].is_initialized()
        if ours:  # Ray is imported only after its environment is set
            folder = opened.enter_context(short_folder())
            own = asked.cpus_per_trial
            with ending_at_once():  # its import takes seconds, too
                start(asked.address, own * (asked.concurrency or max(1, min(trials, cores() // own))), folder)
        import ray

        from erpe.execution.ray_tune.storage_check import require_shared

        if ours:
            opened.callback(stop)
        with ending_at_once():
            found = cluster_info(asked.address or "local", WORKER_SECONDS if asked.address else 0)
        shutil.rmtree(scratch, ignore_errors=True)
        opened.callback(_remove, scratch)
        if asked.address and place:
            require_shared(place)
        head = asked.address or ray.get_runtime_context().gcs_address
        with watch_head(head, HEAD_SECONDS if asked.address else OWN_SECONDS, draining):
            yield OnRay(allocate(asked, trials, found.cpus, found.gpus), scratch, asked)


def _remove(scratch: Path) -> None:
    with suppress(OSError):
        shutil.rmtree(scratch)
        scratch.parent.rmdir()  # unless another study of this store is running
