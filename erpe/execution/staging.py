"""The worker's side of a remote: trials train in a scratch folder of their host, and are safe elsewhere each epoch."""

from __future__ import annotations

import shutil
import tempfile
import time
import weakref
from collections.abc import Callable
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any

from erpe.checkpoints import RemoteCheckpoints, name_of
from erpe.config import TrialConfig
from erpe.execution.objective import Objective
from erpe.execution.trial_loop import Training, TrialFactory
from erpe.store import OUTCOME
from erpe.training.outcome import read_outcome

PREFIX = "erpe-trial-"
"""Of scratch folders."""

KEPT_SECONDS = 7 * 24 * 3600
"""When the scratch folder of a process that was killed goes; one in use changes with every epoch."""


class Displaced(RuntimeError):
    """Another attempt at this trial counts now."""


class StagedTraining:
    """A training on a host that shares nothing with the driver but the remote.

    An epoch is told when its checkpoint is in the remote. The folder is the driver's, of which only the name is used.
    """

    def __init__(self, remote: RemoteCheckpoints, start: TrialFactory, config: TrialConfig, folder: Path) -> None:
        self.config, self._remote, self._trial = config, remote, name_of(folder)
        self.scratch = Path(tempfile.mkdtemp(prefix=PREFIX))
        weakref.finalize(self, shutil.rmtree, self.scratch, True)
        _sweep(self.scratch.parent)
        remote.download(self.scratch, self._trial)
        self._finished = read_outcome(config, self.scratch)
        if self._finished is None:
            (self.scratch / OUTCOME).unlink(missing_ok=True)  # of another configuration
            self._training: Training = start(config, self.scratch)
            self._attempt = remote.new_attempt(self.scratch, self._trial)

    @property
    def history(self) -> list[dict[str, float]]:
        """See `Training`."""
        return self._finished["history"] if self._finished else self._training.history

    @property
    def warning(self) -> str | None:
        """See `Training`."""
        return None if self._finished else self._training.warning

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
        self.settle()
        self._save()
        return measured

    def settle(self) -> None:
        """See `Training`."""
        if not self._finished:
            self._training.settle()

    def finish(self) -> dict[str, float]:
        """Write the results, here and in the remote."""
        if self._finished:
            measured: dict[str, float] = self._finished["metrics"]
            return measured
        found = self._training.finish()
        self._save()
        return found

    def _save(self) -> None:
        if not self._remote.save(self.scratch, self._trial, self._attempt):
            raise Displaced(f"{self._trial}: another attempt at this trial counts now")


def _sweep(place: Path) -> None:
    for folder in place.glob(f"{PREFIX}*"):
        with suppress(OSError):
            if time.time() - folder.stat().st_mtime > KEPT_SECONDS:
                shutil.rmtree(folder)


def staged(work: Objective, remote: RemoteCheckpoints | None) -> Objective:
    """Return the same work, on hosts that share only the remote with the driver; None: they share the store."""
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
    with tempfile.TemporaryDirectory(prefix=PREFIX) as scratch:
        remote.download(Path(scratch), name_of(folder))
        found = evaluate(Path(scratch))
        remote.new_attempt(Path(scratch), name_of(folder))
    return found


def _time(
    remote: RemoteCheckpoints, clock: Callable[[list[Path]], list[dict[str, float]]], folders: list[Path]
) -> list[dict[str, float]]:
    with ExitStack() as opened:
        found = [Path(opened.enter_context(tempfile.TemporaryDirectory(prefix=PREFIX))) for _ in folders]
        for scratch, folder in zip(found, folders, strict=True):
            remote.download(scratch, name_of(folder))
        return clock(found)
