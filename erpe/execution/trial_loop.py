"""The worker's side: a trial played as a series of events. Nothing of Ray or Optuna in here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from erpe.config import TrialConfig
from erpe.errors import ErpeError, StoreError, StudyError, TrialError
from erpe.execution.trial_log import captured
from erpe.store import let_go
from erpe.training.outcome import read_outcome

MOST_PRINTED = 20_000
"""Characters of what is printed in an epoch that are kept."""


class Training(Protocol):
    """A trial in training, as `erpe.training.trial.Trial` is: made on its folder, it goes on where it stopped."""

    @property
    def config(self) -> TrialConfig:
        """What is trained."""

    @property
    def history(self) -> list[dict[str, float]]:
        """Its epochs so far."""

    @property
    def warning(self) -> str | None:
        """What someone should know."""

    def epoch(self) -> dict[str, float]:
        """Train one epoch, save, and measure."""

    def settle(self) -> None:
        """Wait until the last epoch's checkpoint is written."""

    def finish(self) -> dict[str, float]:
        """Write the results and measure them."""

    @staticmethod
    def ahead(trainings: list[Any]) -> None:
        """Train the next epoch of several of one shape as one program; `epoch` of each then goes on from there."""


TrialFactory = Callable[[TrialConfig, Path], Training]
"""Makes the training of a trial on its folder."""


class TrialEvent(NamedTuple):
    """What a worker has to say about its trial."""

    epochs: tuple[dict[str, float], ...] = ()
    """Finished epochs, each with `epoch` (from 1) and its measures; after a restart all of them again."""
    outcome: dict[str, float] | None = None
    """Final measures: the trial is complete."""
    failure: str | None = None
    """The configuration does not work: the trial fails, the search goes on."""
    warning: str | None = None
    """What someone should know, though the trial goes on."""
    broken: ErpeError | None = None
    """The machine does not work (a full disk, missing data): the search stops, the trial does not change."""
    printed: str = ""
    """What its process printed meanwhile; what a pack trained as one program is told with each of its trials."""


def play(config: TrialConfig, folder: Path, start: TrialFactory) -> Iterator[TrialEvent]:
    """Run a trial, or what is left of it; one event an epoch, then its outcome."""
    yield TrialEvent()  # a worker has it, and has built nothing yet: now it costs nothing to be stopped
    try:
        finished = read_outcome(config, folder)
        if finished:
            let_go(folder)
            yield TrialEvent(epochs=tuple(finished["history"]), outcome=finished["metrics"])
            return
        training = start(config, folder)
        yield TrialEvent(epochs=tuple(training.history), warning=training.warning)
        told = training.warning
        while len(training.history) < config.train.epochs:
            epoch = training.epoch()
            yield TrialEvent(epochs=(epoch,), warning=training.warning if training.warning != told else None)
            told = training.warning
        yield TrialEvent(outcome=training.finish())
    except TrialError as error:
        yield TrialEvent(failure=str(error))
    except ErpeError as error:
        yield TrialEvent(broken=error)
    except ImportError as error:
        yield TrialEvent(broken=StudyError(f"this Python cannot import what trials need ({error}); nothing is lost"))
    except OSError as error:
        yield TrialEvent(broken=StoreError(f"{error.filename or folder}: {error.strerror or error}; nothing is lost"))


class PackRunner:
    """Trials played side by side; all train their next epochs as one program."""

    def __init__(self, start: TrialFactory) -> None:
        self._start = start
        self._plays: dict[str, Iterator[TrialEvent]] = {}
        self._trainings: dict[str, Training] = {}

    def hold(self, trials: dict[str, tuple[TrialConfig, Path]]) -> None:
        """Play these trials from now on, each with its folder: those that are played go on, others are dropped."""
        for uid in self._plays.keys() - trials.keys():
            del self._plays[uid]
            if training := self._trainings.pop(uid, None):
                with suppress(Exception):  # a checkpoint that fails now is one that nobody waits for
                    training.settle()
        for uid, (config, folder) in trials.items():
            if uid not in self._plays:
                self._plays[uid] = play(config, folder, partial(self._build, uid))

    def _build(self, uid: str, config: TrialConfig, folder: Path) -> Training:
        self._trainings[uid] = self._start(config, folder)
        return self._trainings[uid]

    def round(self) -> dict[str, TrialEvent]:
        """Return the next event of those that are not built yet, if there are any, or else of each.

        So no trial trains while others are being built. A trial that ends is not held in the next round.
        """
        printed = ""
        building = [uid for uid in self._plays if uid not in self._trainings]
        training = [each for each in self._trainings.values() if len(each.history) < each.config.train.epochs]
        if not building and len(training) > 1:
            with captured() as kept:
                training[0].ahead(training)
            printed = kept.getvalue()
        events = {}
        for uid in building or list(self._plays):
            with captured() as kept:
                event = next(self._plays[uid])
            events[uid] = event._replace(printed=(printed + kept.getvalue())[-MOST_PRINTED:])
        return events
