"""The gap closed: which part of the way from a Performer to softmax an encoding goes, where there is a way."""

from __future__ import annotations

import numpy as np
import pandas as pd

from erpe.report.decisions import fieller
from erpe.report.outcomes import Outcomes
from erpe.report.pairing import KEY, arm_keys, by_arm, named, partner, sound_runs
from erpe.report.statistics import ACCURACY, differences

NOT_SHOWN = "no gap shown"
"""What stands where a part of a gap would, if a linear attention is not shown to be worse than softmax."""


def gap_closed(outcomes: Outcomes, tests: pd.DataFrame | None = None, measure: str = ACCURACY) -> pd.DataFrame:
    """(variant - its Performer baseline) / (softmax - that baseline): the part of the gap an encoding closes.

    A gap is shown where the verdict on the Performer baseline against softmax is `worse`. Where it is not, a ratio to
    it means nothing: part and interval are NaN, as they are where the seeds of all three leave no finite interval.

    Args:
        tests: of `statistics.differences`, whose test of baseline against softmax is that of the gap; default: made.
    Returns:
        A row an encoded linear attention: `study`, `dataset`, `arm`, `baseline`, `softmax`, `preliminary`, `gap`
        (softmax - baseline) with its simultaneous interval `gap_low`, `gap_high`, its corrected p `gap_p` and its seeds
        `gap_n`, `shown` (bool), `closed` (1: the whole gap) with its 95 % Fieller interval `low`, `high`, `n` (seeds
        that all three have).
    """
    tests = differences(outcomes, [measure]) if tests is None else tests
    of_gaps = tests[(tests["measure"] == measure) & (tests["kind"] == "gap")]
    known = {tuple(test[name] for name in KEY): test for test in of_gaps.to_dict("records")}
    runs, arms, rows = by_arm(sound_runs(outcomes)), named(outcomes.arms), []
    finished = dict(zip(arm_keys(outcomes.arms), outcomes.arms["finished"].astype(bool), strict=True))
    for arm in outcomes.arms.itertuples(index=False):
        here = (arm.study, arm.dataset)
        baseline = partner(arms, arm, arm.attention)
        if arm.attention == "softmax" or arm.encoding == "none" or (*here, baseline) not in known:
            continue
        test = known[(*here, baseline)]
        trio = (arm.arm, baseline, test["against"])
        keys = [(*here, str(name)) for name in trio]
        columns = [runs[key][measure] if key in runs else pd.Series(dtype=float) for key in keys]
        values = pd.concat(columns, axis=1, join="inner").sort_index().dropna().to_numpy().T  # (3, seeds)
        gap = (-test["difference"], -test["all_high"], -test["all_low"], test["p_holm"], test["n"])
        closed = _closed(*values) if test["verdict"] == "worse" else (np.nan, np.nan, np.nan)
        whole = all(finished[key] for key in keys)
        rows.append((*here, *trio, not whole, *gap, not np.isnan(closed[0]), *closed, values.shape[1]))
    names = "preliminary gap gap_low gap_high gap_p gap_n shown closed low high n".split()
    return pd.DataFrame(rows, columns=[*KEY, "baseline", "softmax", *names]).astype({"shown": bool})


def _closed(variant: np.ndarray, baseline: np.ndarray, softmax: np.ndarray) -> tuple[float, float, float]:
    gain, gap = variant - baseline, softmax - baseline
    low, high = (float(end) for end in fieller(gain, gap))
    return (np.nan, low, high) if np.isnan(low) else (float(gain.mean() / gap.mean()), low, high)
