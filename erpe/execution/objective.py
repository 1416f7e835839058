"""What a trial does. A worker imports this, and so neither Optuna nor the driver."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from erpe.config import TrialConfig
from erpe.datasets import Dataset
from erpe.execution.callbacks import ProgressNote
from erpe.execution.trial_loop import Training, TrialFactory
from erpe.plugins import WithPlugins, loaded
from erpe.training.download import find_data_dir, prepare
from erpe.training.own import location, read_pack


class Objective(NamedTuple):
    """What a trial is. The default trains and tests Vision Transformers; a stand-in may do less."""

    prepare: Callable[[], None]
    """Checks once, before any trial, that the data are there."""
    start: TrialFactory
    """Called in a worker; importable there."""
    evaluate: Callable[[Path], dict[str, float]]
    """Opens the test split for the trial in this folder."""
    confirm: TrialFactory
    """As `start`, for a confirmed configuration, whose end opens the test split."""
    time: Callable[[list[Path]], list[dict[str, float]]]
    """Times the runs in these folders, one after the other."""


def vision(
    dataset: str | Dataset,
    data_dir: Path | None,
    device: str,
    devices: dict[str, Any] | None = None,
    timed: bool = False,
) -> Objective:
    """Train and test Vision Transformers.

    Args:
        devices: what is the fastest on each, see `Store.devices`.
        timed: whether trials of a search take the time of inference.
    """
    place = location(dataset) if isinstance(dataset, Dataset) else find_data_dir(data_dir)
    data = place.resolve()  # a worker runs in another folder
    plugins = loaded()
    how: Any = {"data_dir": data, "device": device, "devices": devices}
    along: Any = partial(WithPlugins, plugins) if plugins else lambda function: function
    return Objective(
        prepare=partial(_prepare, dataset, data),
        start=along(partial(_start, "Trial", timed=timed, **how)),
        evaluate=along(partial(_evaluate, **how)),
        confirm=along(partial(_start, "Confirmation", **how)),
        time=along(partial(_time, **how)),
    )


def _prepare(dataset: str | Dataset, data: Path) -> None:
    if isinstance(dataset, Dataset):
        read_pack(data, dataset, "train")
    else:
        prepare(dataset, data)


def _start(kind: str, config: TrialConfig, folder: Path, **how: Any) -> Training:
    try:
        from erpe.training.confirmation import Confirmation
        from erpe.training.trial import Trial
    except Exception as error:  # a module in the place of another has what it wants
        raise ImportError(f"{type(error).__name__}: {error}") from error

    made = {"Trial": Trial, "Confirmation": Confirmation}[kind]
    note = ProgressNote(folder)
    training: Training = made(config, folder, on_step=note, **how)
    note.training = training
    return training


def _evaluate(folder: Path, **how: Any) -> dict[str, float]:
    from erpe.training.confirmation import final_evaluation

    return final_evaluation(folder, **how)


def _time(folders: list[Path], **how: Any) -> list[dict[str, float]]:
    from erpe.training.timing import time_runs

    return time_runs(folders, **how)
