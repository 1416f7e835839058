"""The gap closed: which part of the way from a Performer to softmax an encoding goes, and whether there is a way."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from erpe.report.outcomes import Outcomes
from erpe.report.pairing import KEY, arm_keys, by_arm, partner, sound_runs
from erpe.report.statistics import ALPHA, differences

STATES = ("real", "noise", "reversed", "untested")
"""Of a gap, by the paired test of softmax against the Performer baseline, its p corrected like that of every pair.
Real: softmax is above. Noise: not told apart from 0. Reversed: the baseline is above. Untested: nothing to test."""
RESAMPLES = 9999
FEWEST_RESAMPLED = 3
"""Seeds from which on resampling them says anything."""
COVERAGE = {3: 75, 4: 88, 5: 91, 6: 94, 7: 94, 8: 94, 9: 94}
"""Seeds -> how often (%) the 95 % bootstrap interval holds the truth, in 4,000 simulated studies each; 95 from ten on.
Normal accuracies of 0.925, 0.90 and 0.95 with a standard deviation of 0.004, independent of each other."""


def gap_closed(outcomes: Outcomes, tests: pd.DataFrame | None = None, measure: str = "test/accuracy") -> pd.DataFrame:
    """(variant - its Performer baseline) / (softmax - that baseline): the part of the gap an encoding closes.

    Args:
        tests: of `statistics.differences`, whose test of baseline against softmax is that of the gap; none: made here.
    Returns:
        A row an encoded linear attention: `study`, `dataset`, `arm`, `baseline`, `softmax`, `preliminary`, `gap`
        (softmax - baseline) with its t-interval `gap_low`, `gap_high`, its corrected p `gap_p` and its seeds `gap_n`,
        `gap_is` (one of `STATES`; unless it is real, the part of it means little), `closed` (1: the whole gap) with its
        bootstrap interval `low`, `high`, `n` (seeds all three have).
    """
    tests = differences(outcomes, [measure]) if tests is None else tests
    of_softmax = tests[(tests["measure"] == measure) & (tests["kind"] == "softmax")]
    known = {tuple(test[name] for name in KEY): test for test in of_softmax.to_dict("records")}
    runs, rows = by_arm(sound_runs(outcomes)), []
    finished = dict(zip(arm_keys(outcomes.arms), outcomes.arms["finished"].astype(bool), strict=True))
    for arm in outcomes.arms.itertuples(index=False):
        here = (arm.study, arm.dataset)
        baseline = partner(outcomes.arms, arm, arm.attention)
        if arm.attention == "softmax" or arm.encoding == "none" or (*here, baseline) not in known:
            continue
        test = known[(*here, baseline)]
        trio = (arm.arm, baseline, test["against"])
        keys = [(*here, str(name)) for name in trio]
        columns = [runs[key][measure] if key in runs else pd.Series(dtype=float) for key in keys]
        values = pd.concat(columns, axis=1, join="inner").sort_index().dropna().to_numpy().T  # (3, seeds)
        whole = all(finished[key] for key in keys)
        rows.append((*here, *trio, not whole, *_gap(test), *_closed(*values)))
    names = "preliminary gap gap_low gap_high gap_p gap_n gap_is closed low high n".split()
    return pd.DataFrame(rows, columns=[*KEY, "baseline", "softmax", *names])


def _gap(test: dict[Any, Any]) -> tuple[float | str, ...]:
    """Of the test of a baseline against softmax: the same the other way round."""
    p, n = test["p_holm"], test["n"]
    above = "real" if test["difference"] < 0 else "reversed"
    state = "untested" if np.isnan(p) else above if p < ALPHA else "noise"
    return -test["difference"], -test["high"], -test["low"], p, n, state


def _closed(variant: np.ndarray, baseline: np.ndarray, softmax: np.ndarray) -> tuple[float, ...]:
    n = len(variant)
    closed = float(_ratio(variant, baseline, softmax)) if n else np.nan
    return closed, *bootstrap_interval(variant, baseline, softmax), n


def _ratio(variant: np.ndarray, baseline: np.ndarray, softmax: np.ndarray, axis: int = -1) -> np.ndarray:
    gain, gap = (variant - baseline).mean(axis), (softmax - baseline).mean(axis)
    return np.divide(gain, gap, out=np.full(np.shape(gap), np.nan), where=gap != 0)


def bootstrap_interval(variant: np.ndarray, baseline: np.ndarray, softmax: np.ndarray) -> tuple[float, float]:
    """95 % bootstrap interval of the gap closed; whole seeds are drawn anew, always in the same way.

    A percentile interval of n values is too narrow by about sqrt((n - 1) / n) z / t(n - 1), and five seeds are few: its
    percentiles are moved outwards to make good for both, which of very few seeds does not suffice: `COVERAGE` tells how
    often the truth then lies inside. Below three seeds it is NaN.

    Source: Hesterberg 2015, The American Statistician 69(4), the expanded percentile interval.
    """
    n = len(variant)
    if n < FEWEST_RESAMPLED:
        return np.nan, np.nan
    tail = stats.norm.cdf(np.sqrt(n / (n - 1)) * stats.t.ppf(ALPHA / 2, n - 1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)  # a resampled gap of exactly 0: NaN, too
        found = stats.bootstrap(
            (variant, baseline, softmax), _ratio, paired=True, vectorized=True, method="percentile",
            n_resamples=RESAMPLES, confidence_level=1 - 2 * tail, rng=np.random.default_rng(0),
        )  # fmt: skip
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def coverage_told(seeds: Iterable[int]) -> str:
    """How far the bootstrap intervals of so many seeds are from 95 %, in a sentence; empty where they are not."""
    each = [f"{COVERAGE[n]} % (n = {n})" for n in sorted(set(seeds)) if n in COVERAGE]
    if not each:
        return ""
    return f"in simulation such a bootstrap interval holds the truth in {' or '.join(each)} of studies, not in 95 %"
