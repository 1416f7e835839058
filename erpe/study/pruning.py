"""When a trial is pruned: Optuna's pruners, with every setting written down, and ours for several objectives.

`StudySession.report` asks after each epoch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from optuna.pruners import BasePruner, HyperbandPruner, MedianPruner, NopPruner, SuccessiveHalvingPruner

from erpe.study.records import TrialRecord
from erpe.study.spec import Pruner, StudySpec

FEWEST_FOR_PRUNING = 16
"""Trials of a search; of fewer a rung compares too few, and prunes what would have won."""


def chosen_pruner(spec: StudySpec, trials: int | None) -> Pruner:
    """Return the pruner that is used; `auto` is asha, or none for fewer than `FEWEST_FOR_PRUNING` trials."""
    if spec.pruner != "auto":
        return spec.pruner
    return "none" if trials is not None and trials < FEWEST_FOR_PRUNING else "asha"


def pruner_settings(pruner: Pruner, epochs: int) -> dict[str, Any]:
    """Return its keywords. Before a third of the epochs warm-up hides how good a trial is."""
    first = max(1, math.ceil(epochs / 3))
    match pruner:
        case "asha":
            return {"min_resource": first, "reduction_factor": 2}
        case "hyperband":
            return {"min_resource": first, "max_resource": epochs, "reduction_factor": 2}
        case "median":
            return {"n_startup_trials": 4, "n_warmup_steps": first}
        case _:
            return {}


def make_pruner(spec: StudySpec, trials: int | None) -> BasePruner:
    """Return the study's pruner; rungs are epochs. Optuna has none for several objectives: see `falls_behind`.

    Args:
        trials: of the whole search.
    """
    pruner = "none" if spec.goals.several else chosen_pruner(spec, trials)
    classes = {
        "asha": SuccessiveHalvingPruner, "hyperband": HyperbandPruner, "median": MedianPruner, "none": NopPruner,
    }  # fmt: skip
    make: Callable[..., BasePruner] = classes[pruner]
    return make(**pruner_settings(pruner, spec.epochs))


def falls_behind(spec: StudySpec, trials: int | None, trial: TrialRecord, others: list[TrialRecord]) -> bool:
    """Whether a trial of a study of several objectives is to be pruned after its last epoch; see `Goals.falls_behind`.

    Args:
        trials: of the whole search.
        others: all trials so far.
    """
    epoch, how = max(trial.epochs), pruner_settings(chosen_pruner(spec, trials), spec.epochs)
    if not how:
        return False
    first, factor = how["min_resource"], how["reduction_factor"]
    rungs = (first * factor**rung for rung in range(epoch.bit_length() + 1))
    return epoch in rungs and spec.goals.falls_behind(trial, others, epoch, factor)
