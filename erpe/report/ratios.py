"""Times as ratios to softmax: what a machine makes of one number, it makes of both."""

from __future__ import annotations

import numpy as np
import pandas as pd

from erpe.report.outcomes import TIMED, Outcomes
from erpe.report.pairing import KEY, by_arm, named, partner, sound_runs
from erpe.report.statistics import mean_interval

TIMES = {TIMED: "inference", "time/train_seconds_per_epoch": "training"}
"""Measures that are shown as ratios, and what of."""


def time_ratios(outcomes: Outcomes) -> pd.DataFrame:
    """Return each arm's times over those of softmax with the same switches, paired by seed.

    Geometric mean of the ratios; its 95 % interval is Student's of their logarithms, and so never reaches 0.

    Returns:
        A row an arm and measure: `study`, `dataset`, `arm`, `against`, `measure`, `ratio`, `low`, `high` (NaN where
        there is no interval, as of softmax itself, whose ratio is 1), `n` (common seeds).
    """
    runs, arms, rows = by_arm(sound_runs(outcomes)), named(outcomes.arms), []
    for arm in outcomes.arms.itertuples(index=False):
        here, other = (arm.study, arm.dataset), partner(arms, arm, "softmax")
        keys = [(*here, arm.arm), (*here, other)]
        if other is None or any(key not in runs for key in keys):
            continue
        for measure in TIMES:
            pair = [runs[key][measure] for key in keys if measure in runs[key]]
            if len(pair) < 2:
                continue
            both = pd.concat(pair, axis=1, join="inner").dropna().to_numpy(float).T  # (2, seeds)
            if both.size and (both > 0).all():
                found = mean_interval(np.log(both[0] / both[1]))
                ends = (float(np.exp(value)) for value in (found.mean, found.low, found.high))
                rows.append((*here, arm.arm, other, measure, *ends, found.n))
    return pd.DataFrame(rows, columns=[*KEY, "against", "measure", "ratio", "low", "high", "n"])
