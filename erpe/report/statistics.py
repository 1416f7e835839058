"""What the seeds allow us to say: means with intervals, and paired differences with their verdicts.

Every function takes `Outcomes` and returns a tidy table; none changes what it is given. An arm is known by its study,
its data set and its name. Only runs of one version of erpe are compared, seed by seed, over the seeds both arms have.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import special, stats

from erpe.report.decisions import ALPHA, LEVEL, VERDICTS, Decided, decide
from erpe.report.images import image_intervals
from erpe.report.measures import MEASURES, QUALITY
from erpe.report.outcomes import Outcomes
from erpe.report.pairing import KEY, PAIR, arm_keys, by_arm, common, pairs, reference_version, sound_runs
from erpe.study.plan import Compare

ACCURACY = "test/accuracy"
PARTS = tuple(QUALITY)
"""Measures in [0, 1], which a margin in points is for."""
TESTED = (*PARTS, "test/log_likelihood")
"""Measures whose differences are tested. AIC and BIC are none: these models are no maximum-likelihood fits, and have
more parameters than images."""
_SPREAD = 1e-12  # relative; differences of 0.91 - 0.90 are equal up to rounding


class Interval(NamedTuple):
    """A mean over `n` seeds and its 95 % interval, NaN where there is none."""

    mean: float
    low: float
    high: float
    n: int


class Paired(NamedTuple):
    """Mean of first minus second over `n` pairs, its 95 % interval, and the p-value of the paired t-test."""

    difference: float
    low: float
    high: float
    p: float
    n: int


def mean_interval(values: np.ndarray) -> Interval:
    """Student's t-interval of the mean of (n,) values; NaN values are not counted.

    There is no interval (NaN) of one value, nor of equal ones, which prove nothing; see `paired_test`.
    """
    values = np.asarray(values, float)
    values = values[~np.isnan(values)]
    n = len(values)
    if n < 2:
        return Interval(float(values[0]) if n else np.nan, np.nan, np.nan, n)
    if _flat(values, values):
        return Interval(float(values[0]), np.nan, np.nan, n)
    low, high = stats.t.interval(LEVEL, n - 1, loc=values.mean(), scale=stats.sem(values))
    return Interval(float(values.mean()), float(low), float(high), n)


def paired_test(first: np.ndarray, second: np.ndarray) -> Paired:
    """Two-sided paired t-test of two (n,) arrays; pairs with a NaN are not counted.

    Differences that are the same on every seed leave nothing to test against: p is 1 where all are 0 and else NaN, as
    equal accuracies of two seeds prove nothing; there is no interval. The same as `scipy.stats.ttest_rel`, sooner.
    """
    first, second = np.asarray(first, float), np.asarray(second, float)
    both = ~(np.isnan(first) | np.isnan(second))
    first, second = first[both], second[both]
    difference, n = first - second, len(first)
    mean = float(difference.mean()) if n else np.nan
    if n < 2:
        return Paired(mean, np.nan, np.nan, np.nan, n)
    if _flat(difference, np.concatenate([first, second])):
        return Paired(mean, np.nan, np.nan, np.nan if np.any(first != second) else 1.0, n)
    error = float(difference.std(ddof=1)) / math.sqrt(n)
    half = error * float(special.stdtrit(n - 1, 1 - ALPHA / 2))
    return Paired(mean, mean - half, mean + half, 2 * float(special.stdtr(n - 1, -abs(mean) / error)), n)


def _flat(values: np.ndarray, scale: np.ndarray) -> bool:
    return float(np.ptp(values)) <= _SPREAD * float(np.abs(scale).max())


def summary(outcomes: Outcomes) -> pd.DataFrame:
    """Mean over seeds of every measure.

    An arm that only another version ran is summed up from those runs: shown, though never tested.
    Returns:
        A row an arm and measure: `study`, `dataset`, `arm`, `measure`, `mean`, `low`, `high`, `n`.
    """
    every, sound = outcomes.runs, by_arm(sound_runs(outcomes))
    rows = []
    for key in arm_keys(outcomes.arms):
        runs = sound.get(key)
        if runs is None and len(every):
            others = every[(every[KEY] == list(key)).all(axis=1)].drop_duplicates("seed")
            runs = others[others["version"] == reference_version(others)] if len(others) else None
        for measure in MEASURES:
            if runs is not None and measure in runs:
                rows.append((*key, measure, *mean_interval(runs[measure].to_numpy())))
    return pd.DataFrame(rows, columns=[*KEY, "measure", *Interval._fields])


def differences(
    outcomes: Outcomes, measures: Sequence[str] | None = None, against: str | None = None, margin: float | None = None
) -> pd.DataFrame:
    """Paired comparisons by seed of every pair, decided a family at a time; each measure has its own.

    Args:
        measures: `TESTED` unless others are named.
        against: a study to compare the others with; see `pairs`.
        margin: points of accuracy that are too few to matter; default: what each study says, see `Outcomes.margins`.
    Returns:
        A row a pair and measure: `PAIR`, `measure`, `margin` (in the unit of the measure; NaN where it has none),
        `difference` (arm minus against), `low`, `high` (95 % interval of this one alone), `p`, `n` (common seeds), and
        the family's `p_holm`, `p_equivalent`, `all_low`, `all_high`, `verdict`; see `decisions.Decided`.
        `images_low`, `images_high`: of accuracy, for new images too; see `images.image_intervals`.
    """
    usual = Compare().margin
    runs, rows = by_arm(sound_runs(outcomes)), []
    for pair in pairs(outcomes.arms, against).to_dict("records"):
        first, second = common(runs, pair)
        points = outcomes.margins.get(pair["study"], usual) if margin is None else margin
        for measure in measures or TESTED:
            if measure in outcomes.runs:
                found = paired_test(first.get(measure, np.array([])), second.get(measure, np.array([])))
                close = points / 100 if measure in PARTS else np.nan
                rows.append(pair | {"measure": measure, "margin": close} | found._asdict())
    table = pd.DataFrame(rows, columns=[*PAIR, "measure", "margin", *Paired._fields])
    return decided(table, outcomes)


def decided(table: pd.DataFrame, outcomes: Outcomes) -> pd.DataFrame:
    """Add to pairs, as of `differences`, what their families decide, and the intervals for new images."""
    families = list(table.groupby([*KEY[:2], "family", "measure"], sort=False).indices.values())
    difference, low, high, margin = (table[name].to_numpy(float) for name in ("difference", "low", "high", "margin"))
    freedom = np.maximum(table["n"].to_numpy(float) - 1, 1)
    error = (high - low) / 2 / stats.t.isf(ALPHA / 2, freedom)
    decided = {name: np.full(len(table), np.nan) for name in Decided._fields[:-1]}
    decided["verdict"] = np.full(len(table), VERDICTS[-1], dtype=object)
    for rows in families:
        found = decide(difference[rows], error[rows], freedom[rows], margin[rows[0]])
        for name, values in found._asdict().items():
            decided[name][rows] = values
    same = (table["p"] == 1) & table["low"].isna()  # equal on every seed: p is 1, and there is no interval
    table = table.assign(**decided | {"p_holm": np.where(same, 1.0, decided["p_holm"])})
    of_accuracy = table["measure"] == ACCURACY
    accurate = [table.index[rows] for rows in families if of_accuracy.iloc[rows[0]]]
    return table.join(image_intervals(outcomes, table[of_accuracy], accurate))
