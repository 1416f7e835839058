"""What a search needs before its first trial: what a trial is, where trials run, what the driver knows of itself."""

from __future__ import annotations

from typing import NamedTuple

from erpe.checkpoints import RemoteCheckpoints, find_remote
from erpe.datasets import Dataset
from erpe.execution.executors import How, ResourceRequest
from erpe.execution.objective import Objective, vision
from erpe.execution.staging import staged
from erpe.store import Store


class Ready(NamedTuple):
    """What a search begins with."""

    where: ResourceRequest
    work: Objective
    """What a trial is; its checkpoints are brought to the remote place, where there is one."""
    remote: RemoteCheckpoints | None
    tags: dict[str, str]
    """Versions, commit and machine."""


def prepare(command: str, dataset: str | Dataset, store: Store, timed: bool, work: Objective | None, how: How) -> Ready:
    """Check where trials shall run.

    Args:
        command: as MLflow shows it.
        timed: whether a trial's inference time is an objective or a limit.
        work: what a trial is; default: train a Vision Transformer.
    Raises:
        ConfigError: numbers that make no sense, or a GPU that is not there.
    """
    from erpe.tracking.provenance import collect

    where = ResourceRequest(**how)
    where.check()
    remote = find_remote()
    work = work or vision(dataset, where.data_dir, where.device, store.devices, timed)
    return Ready(where, staged(work, remote), remote, collect(command, where.cpus_per_trial))
