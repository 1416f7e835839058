"""The worker's side of a remote: trials train in a scratch folder of their host, and are safe elsewhere each epoch."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import weakref
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from erpe.checkpoints.remote import OUTCOME, RemoteCheckpoints, name_of
from erpe.config import TrialConfig
from erpe.execution.objective import Objective
from erpe.execution.trial_loop import Training, TrialFactory
from erpe.io import open_plain
from erpe.training.outcome import read_outcome

PREFIX, LOCK = "erpe-trial-", "held"
"""Of scratch folders, and the file in each that its process has locked."""


class Displaced(RuntimeError):
    """Another attempt at this trial counts now."""


class StagedTraining:
    """A training on a host that shares nothing with the driver but the remote.

    An epoch is told when its checkpoint is in the remote. The folder is the driver's, of which only the name is used.
    """

    def __init__(self, remote: RemoteCheckpoints, start: TrialFactory, config: TrialConfig, folder: Path) -> None:
        self.config, self._remote, self._trial = config, remote, name_of(folder)
        self._scratch = Scratch()
        remote.download(self._scratch.folder, self._trial)
        finished = read_outcome(config, self._scratch.folder)
        if finished:
            self._training: Training = Finished(config, finished)
            return
        (self._scratch.folder / OUTCOME).unlink(missing_ok=True)  # of another configuration
        self._training = start(config, self._scratch.folder)
        self._attempt = remote.new_attempt(self._scratch.folder, self._trial)

    @property
    def history(self) -> list[dict[str, float]]:
        """See `Training`."""
        return self._training.history

    @property
    def warning(self) -> str | None:
        """See `Training`."""
        return self._training.warning

    @staticmethod
    def ahead(trainings: list[StagedTraining]) -> None:
        """See `Training`."""
        inner: list[Any] = [each._training for each in trainings]
        inner[0].ahead(inner)

    def epoch(self) -> dict[str, float]:
        """Train an epoch and bring its checkpoint to the remote.

        Raises:
            StoreError: the remote stayed away.
            Displaced: another attempt counts now; it has lost nothing by this one.
        """
        measured = self._training.epoch()
        self._save()
        return measured

    def finish(self) -> dict[str, float]:
        """Write the results, here and in the remote."""
        found = self._training.finish()
        if not isinstance(self._training, Finished):
            self._save()
        return found

    def _save(self) -> None:
        if not self._remote.save(self._scratch.folder, self._trial, self._attempt):
            raise Displaced(f"{self._trial}: another attempt at this trial counts now")


class Finished:
    """The training of a trial whose results were there already."""

    warning: str | None = None

    def __init__(self, config: TrialConfig, found: dict[str, Any]) -> None:
        self.config, self.history = config, found["history"]
        self._metrics: dict[str, float] = found["metrics"]

    @staticmethod
    def ahead(trainings: list[Any]) -> None:
        """Nothing is left to train."""

    def epoch(self) -> dict[str, float]:
        """Its history is whole."""
        raise AssertionError("a finished trial has no next epoch")

    def finish(self) -> dict[str, float]:
        """Return what was measured."""
        return self._metrics


class Scratch:
    """A temporary folder that goes with this object; those that killed processes left go when one is made."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix=PREFIX))
        held = _lock(self.folder / "making")
        (self.folder / "making").rename(self.folder / LOCK)  # it is visible only once it is locked
        _sweep(self.folder.parent)
        weakref.finalize(self, _remove, self.folder, held)


def _lock(path: Path) -> int:
    """Return a file's descriptor, locked for as long as it is open; the kernel releases it however the process ends.

    Raises:
        OSError: another process has it, or it is not ours.
    """
    handle = open_plain(path, os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        raise
    return handle


def _remove(folder: Path, held: int) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    os.close(held)


def _sweep(place: Path) -> None:
    for lock in place.glob(f"{PREFIX}*/{LOCK}"):
        with suppress(OSError):
            _remove(lock.parent, _lock(lock))


def abroad(work: Objective, remote: RemoteCheckpoints | None) -> Objective:
    """Return the same work, on hosts that share only the remote with the driver.

    None: they share the store's folder.
    """
    if remote is None:
        return work
    return work._replace(
        start=partial(StagedTraining, remote, work.start),
        confirm=partial(StagedTraining, remote, work.confirm),
        evaluate=partial(_evaluate, remote, work.evaluate),
        time=partial(_time, remote, work.time),
    )


def _evaluate(
    remote: RemoteCheckpoints, evaluate: Callable[[Path], dict[str, float]], folder: Path
) -> dict[str, float]:
    scratch = _received(remote, folder)
    found = evaluate(scratch.folder)
    remote.new_attempt(scratch.folder, name_of(folder))
    return found


def _time(
    remote: RemoteCheckpoints, clock: Callable[[list[Path]], list[dict[str, float]]], folders: list[Path]
) -> list[dict[str, float]]:
    found = [_received(remote, folder) for folder in folders]
    return clock([each.folder for each in found])


def _received(remote: RemoteCheckpoints, folder: Path) -> Scratch:
    scratch = Scratch()
    remote.download(scratch.folder, name_of(folder))
    return scratch
