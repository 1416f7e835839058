"""What studies found, as tidy tables: the one thing that statistics, tables, figures and the report page read."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd


@dataclass(frozen=True)
class Outcomes:
    """Tidy tables of one or more studies. Measures have the names of MLflow: `test/accuracy`, `aic`, ...

    An arm is what a study compares: a variant, perhaps with fixed switches (`relu_rope`, `relu_rope-patch2`).
    """

    arms: pd.DataFrame
    """A row an arm: `study`, `dataset`, `arm`, `variant`, `attention`, `encoding`, `budget` (trials, epochs or flops),
    `trials_planned`, `trials` (done), `seeds_planned`, `seeds` (confirmed), `finished` (bool: all seeds are there)."""
    runs: pd.DataFrame
    """A row a confirmed run: `study`, `dataset`, `arm`, `variant`, `attention`, `encoding`, `seed`, `uid`,
    `version` (of erpe), `device`, and its measures. Equal seeds of different arms are a pair."""
    trials: pd.DataFrame
    """A row a trial of the search: `study`, `arm`, `variant`, `number`, `uid`, `seed`, `state`, `value` (validation
    accuracy), `epochs`, `seconds`, and its settings under their dotted names."""
    epochs: pd.DataFrame
    """A row an epoch: `study`, `arm`, `variant`, `phase` (search or confirm), `uid`, `seed`, `epoch` (from 1),
    `val/accuracy` (NaN in a confirmation) and `train/loss` (NaN in a search)."""
    predictions: dict[str, np.ndarray] = field(default_factory=dict)
    """uid of a confirmed run -> (test images,) the class it predicts, as whole numbers."""
    labels: dict[str, np.ndarray] = field(default_factory=dict)
    """Data set -> (test images,) the true classes."""
    folders: dict[str, Path] = field(default_factory=dict)
    """uid of a confirmed run -> its folder, where this machine has it (`attention.npz` and more lie there)."""
    notes: tuple[str, ...] = ()
    """What a reader should know: unfinished arms, runs of another version; a line each."""
