"""Did the search search? What more trials bring, and what each arm spent; `Outcomes.arms` tells where defaults won.

expected_best_curves(outcomes)    # a row an arm and a number of trials
compute(outcomes)                 # a row an arm: epochs and FLOPs of search and confirmation
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd

from erpe.config import ModelConfig, defaults
from erpe.datasets import DATASETS, Dataset
from erpe.report.outcomes import Outcomes
from erpe.report.pairing import KEY, arm_keys


def expected_best(values: np.ndarray) -> np.ndarray:
    """Return expected best validation value after 1, 2, ..., N trials.

        E[max of n] = sum_i v_i ((i / N)^n - ((i - 1) / N)^n),      v_1 <= ... <= v_N

    The mean over n draws with replacement from the N values: a little too low near n = N. It takes trials for
    independent draws, as those of random search are; of a sampler that learns it is a description.

    Args:
        values: (N,), in any order; NaN are not counted.
    Returns:
        (N,), for n = 1 to N.
    Source: Dodge et al. 2019 (EMNLP), "Show Your Work", equation 5.
    """
    found = np.sort(values[~np.isnan(values)])  # (N,)
    n, share = np.arange(1, len(found) + 1), np.arange(len(found) + 1) / max(1, len(found))
    weights = np.diff(share[None, :] ** n[:, None], axis=1)  # (n, N)  chance that v_i is the best of n
    best: np.ndarray = weights @ found
    return best


def expected_best_curves(outcomes: Outcomes) -> pd.DataFrame:
    """`study`, `dataset`, `arm`, `trials` (n) and `value`: `expected_best` of the trials that ended with a value.

    A pruned trial has its last value, which is below what it would have become.
    """
    rows = []
    for study, dataset, arm in arm_keys(outcomes.arms):
        ended = _trials(outcomes, study, arm).loc[lambda own: own["state"].isin(["COMPLETE", "PRUNED"])]
        curve = expected_best(ended["value"].astype(float).to_numpy())
        rows += [(study, dataset, arm, n, value) for n, value in enumerate(curve.tolist(), 1)]
    return pd.DataFrame(rows, columns=[*KEY, "trials", "value"])


def compute(outcomes: Outcomes) -> pd.DataFrame:
    """Return what each arm spent: `search_epochs`, `confirm_epochs`, and for every training image `search_flops` and
    `confirm_flops`, of forward and backward passes by the closed form.

    All arms of a study train on the same images, so FLOPs for an image compare them. Confirmations that were replaced
    are not in it.
    """
    rows = []
    for study, dataset, arm in arm_keys(outcomes.arms):
        trials = _trials(outcomes, study, arm)
        runs = outcomes.runs[(outcomes.runs["study"] == study) & (outcomes.runs["arm"] == arm)]
        confirmed = outcomes.epochs["uid"].value_counts().reindex(runs["uid"], fill_value=0)
        known = outcomes.datasets.get(dataset) or DATASETS.get(dataset)
        flops = [_train_flops(trial, known) * trial["epochs"] for trial in trials.to_dict("records")]
        once = runs["flops/train_step"].to_numpy() if "flops/train_step" in runs else np.zeros(len(runs))
        spent = (int(trials["epochs"].sum()), float(sum(flops)), int(confirmed.sum()))
        rows.append((study, dataset, arm, *spent, float(np.sum(once * confirmed.to_numpy()))))
    return pd.DataFrame(rows, columns=[*KEY, "search_epochs", "search_flops", "confirm_epochs", "confirm_flops"])


def _trials(outcomes: Outcomes, study: str, arm: str) -> pd.DataFrame:
    trials = outcomes.trials
    return trials[(trials["study"] == study) & (trials["arm"] == arm)]


def _train_flops(trial: dict[Any, Any], dataset: Dataset | None) -> float:
    """FLOPs of a training step, an image, of a trial's model; of settings that are not in its row the defaults.

    NaN where nothing is known of the images.
    """
    if dataset is None:
        return math.nan
    from erpe.model.flops import train_step_flops

    base = defaults(trial["variant"], dataset)
    settings = {f"model.{name}" for name in ModelConfig.model_fields} & trial.keys()
    return train_step_flops(base.replace({name: _plain(trial[name]) for name in settings}).model)


def _plain(value: Any) -> Any:
    """Undo what a table did, which has NaN for None, and 64.0 for a 64 of a column that has both."""
    if isinstance(value, float | np.floating):
        return None if math.isnan(value) else int(value) if float(value).is_integer() else float(value)
    return value.item() if isinstance(value, np.generic) else value
