"""Did the search search? What more trials bring; `Outcomes.arms` tells where defaults won."""

from __future__ import annotations

import numpy as np
import pandas as pd

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


def _trials(outcomes: Outcomes, study: str, arm: str) -> pd.DataFrame:
    trials = outcomes.trials
    return trials[(trials["study"] == study) & (trials["arm"] == arm)]
