"""What a search needs before its first trial: what a trial is, where trials run, what the driver knows of itself."""

from __future__ import annotations

from erpe.checkpoints import RemoteCheckpoints, find_remote
from erpe.datasets import Dataset
from erpe.execution.executors import How, ResourceRequest
from erpe.execution.objective import Objective, vision
from erpe.execution.staging import staged
from erpe.store import Store


def prepare(
    command: str, dataset: str | Dataset, store: Store, timed: bool, work: Objective | None, how: How
) -> tuple[ResourceRequest, Objective, RemoteCheckpoints | None, dict[str, str]]:
    """Check where trials shall run.

    Args:
        command: as MLflow shows it.
        timed: whether a trial's inference time is an objective or a limit.
        work: what a trial is; default: train a Vision Transformer.
    Returns:
        where they run; what a trial is, which brings checkpoints to the remote place; that place, if there is one;
        versions, commit and machine.
    Raises:
        ConfigError: numbers that make no sense, or a GPU that is not there.
    """
    from erpe.tracking.provenance import collect

    where = ResourceRequest(**how)
    where.check()
    remote = find_remote()
    work = work or vision(dataset, where.data_dir, where.device, store.devices, timed)
    return where, staged(work, remote), remote, collect(command, where.cpus_per_trial)
