"""What studies found, as tidy tables: the one thing that statistics, tables, figures and the report page read."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from erpe.datasets import Dataset
from erpe.errors import StoreError
from erpe.io import read_arrays
from erpe.study.objectives import Goals
from erpe.text import counted

GIVEN = ("model.variant", "model.image", "model.classes")
"""Settings that the variant and the data set decide."""

TIMED = "time/inference_ms_per_image"
"""What a confirmed run has from the timing phase only, in which nothing else runs."""

COLUMNS = {
    "arms": "study dataset arm variant attention encoding budget trials_planned trials seeds_planned seeds finished "
    "openings abandoned own_axes default_won",
    "runs": "study dataset arm variant attention encoding seed uid version device test/accuracy",
    "trials": "study arm variant number uid seed state value epochs seconds",
    "epochs": "study arm variant phase uid seed epoch val/accuracy train/loss",
}
"""Of every table, whatever else is in it."""


@dataclass(frozen=True)
class Outcomes:
    """Tidy tables of one or more studies. Measures have the names of MLflow: `test/accuracy`, `aic`, ...

    An arm is what a study compares: a variant, perhaps with fixed switches (`relu_rope`, `relu_rope-patch2`).
    """

    arms: pd.DataFrame
    """A row an arm: `study`, `dataset`, `arm`, `variant`, `attention`, `encoding`, `budget` (trials, epochs or flops),
    `trials_planned`, `trials` (done), `seeds_planned`, `seeds` (confirmed), `finished` (bool: all seeds are there),
    `openings` (trained models of this arm that ever met the test set) and how many of them were `abandoned` (their
    results were replaced), `own_axes` (what only this variant searches: "model.features, model.rope", or "none"),
    `default_won` (bool: trial 0, the defaults, is the best of the search; missing while none is complete). Where it is
    set, `objective` (`accuracy,flops`) and `at_most` (`params=60000`); see `goals_of`."""
    runs: pd.DataFrame
    """A row a confirmed run: `study`, `dataset`, `arm`, `variant`, `attention`, `encoding`, `seed`, `uid`,
    `version` (of erpe), `device`, and its measures, `time/*` only once they were taken with nothing else running.
    Equal seeds of different arms are a pair."""
    trials: pd.DataFrame
    """A row a trial of the search: `study`, `arm`, `variant`, `number`, `uid`, `seed`, `state`, `value` (the first
    objective, by default the validation accuracy; missing where the model costs more than the study allows), `epochs`,
    `seconds`, its settings under their dotted names, and of several objectives each one under its name, as `flops`."""
    epochs: pd.DataFrame
    """A row an epoch: `study`, `arm`, `variant`, `phase` (search or confirm), `uid`, `seed`, `epoch` (from 1),
    `val/accuracy` (NaN in a confirmation; `val/loss` where that is sought) and `train/loss` (NaN in a search)."""
    predictions: dict[str, np.ndarray] = field(default_factory=dict)
    """uid of a confirmed run -> (test images,) the class it predicts, as whole numbers."""
    datasets: dict[str, Dataset] = field(default_factory=dict)
    """Name of own data -> what is known of it, where that is known."""
    labels: dict[str, np.ndarray] = field(default_factory=dict)
    """Data set -> (test images,) the true classes."""
    folders: dict[str, Path] = field(default_factory=dict)
    """uid of a confirmed run -> its folder, where this machine has it (`attention.npz` and more lie there)."""
    made_with: dict[str, str] = field(default_factory=dict)
    """Study -> hardware, threads, versions and commit, in a line."""
    margins: dict[str, float] = field(default_factory=dict)
    """Study -> points of accuracy that it says are too few to matter."""
    dates: dict[str, str] = field(default_factory=dict)
    """Study -> the day on which its last run ended (UTC), as 2026-11-29."""
    files: dict[str, str] = field(default_factory=dict)
    """Study -> its file, as text, without what is by default."""
    notes: tuple[str, ...] = ()
    """What a reader should know: unfinished arms, runs of another version; a line each."""

    def only(self, study: str, dataset: str) -> Outcomes:
        """Return the tables of one study on one data set."""
        of_both = {"arms": self.arms, "runs": self.runs}
        own = {
            name: table[(table["study"] == study) & (table["dataset"] == dataset)] for name, table in of_both.items()
        }
        for name, table in {"trials": self.trials, "epochs": self.epochs}.items():
            own[name] = table[(table["study"] == study) & table["arm"].isin(set(own["arms"]["arm"]))]
        return dataclasses.replace(self, **own)


def goals_of(arms: pd.DataFrame) -> Goals:
    """Return what the searches of a study seek.

    Args:
        arms: of one study.
    """
    said = arms.iloc[0] if len(arms) else {}
    return Goals.of({name: said[name] for name in ("objective", "at_most") if isinstance(said.get(name), str)})


class Rows:
    """Rows of the tables of `Outcomes`, as they are found."""

    def __init__(self) -> None:
        self.tables: dict[str, list[dict[str, Any]]] = {name: [] for name in COLUMNS}
        self.found = Outcomes(*(pd.DataFrame() for _ in COLUMNS))
        """All but the tables and the notes."""
        self.notes: list[str] = []

    def add_run(self, row: dict[str, Any]) -> None:
        """Add a confirmed run, without times that are not of the timing phase: until then it has the seconds of
        its own training only, which other trials slowed down.
        """
        own = {name: value for name, value in row.items() if TIMED in row or not name.startswith("time/")}
        self.tables["runs"].append(own)

    def add_folder(self, uid: str, dataset: str, folder: Path) -> None:
        """Add what lies in a confirmed run's folder, if it is there."""
        if not folder.is_dir():
            return
        self.found.folders[uid] = folder
        try:
            found = read_arrays(folder / "predictions.npz")
            predicted, labels = (found[name].astype(int) for name in ("predicted", "labels"))
            if predicted.shape != labels.shape or predicted.ndim != 1:
                raise ValueError(f"{predicted.shape} classes for {labels.shape} images")
            self.found.predictions[uid] = predicted
            self.found.labels.setdefault(dataset, labels)
        except (StoreError, KeyError, ValueError, TypeError) as error:
            self.notes.append(f"{uid}: no predictions ({error})")

    def _default_won(self, study: str, arm: str) -> bool | None:
        own = (row for row in self.tables["trials"] if (row["study"], row["arm"]) == (study, arm))
        complete = [row for row in own if row["state"] == "COMPLETE" and row["value"] is not None]
        best = max(complete, key=lambda row: (row["value"], -row["number"]), default=None)
        return None if best is None else best["number"] == 0

    def outcomes(self) -> Outcomes:
        """Return the tables, with all their columns."""
        frames = {}
        for arm in self.tables["arms"]:
            arm["default_won"] = self._default_won(arm["study"], arm["arm"])
        for name, columns in COLUMNS.items():
            frame = pd.DataFrame(self.tables[name])
            frames[name] = frame.reindex(columns=[*columns.split(), *frame.columns.difference(columns.split())])
        return dataclasses.replace(self.found, **frames, notes=(*self.notes, *default_wins(self.tables["arms"])))


def default_wins(arms: list[dict[str, Any]]) -> list[str]:
    """In how many arms of each study the best trial is the first, the default configuration; there a search found
    nothing.

    Args:
        arms: rows of `Outcomes.arms`.
    """
    told = []
    for study in dict.fromkeys(arm["study"] for arm in arms):
        decided = [arm["default_won"] for arm in arms if arm["study"] == study and arm["default_won"] is not None]
        if decided:
            count = f"{sum(decided)} of {counted(len(decided), 'arm')}"
            told.append(f"{study}: the default configuration won the search in {count}")
    return told


def describe(made_with: dict[str, str]) -> str:
    """Hardware, threads, versions and commit, in a line."""
    get = made_with.get
    cores, threads = (f"{get(f'{what}s', '?')} {what}{'s' * (get(f'{what}s') != '1')}" for what in ("core", "thread"))
    parts = [get("device", ""), get("cpu", ""), f"{cores}, {threads} a trial"]
    versions = (name for name in ("python", "torch", "erpe") if f"version.{name}" in made_with)
    parts += [f"{name} {made_with[f'version.{name}']}" for name in versions]
    return "; ".join(filter(None, [*parts, f"commit {get('git_sha', 'unknown')[:10]}"]))
