"""What the seeds allow us to say: means with intervals, paired differences, McNemar's test, the gap closed.

Every function takes `Outcomes` and returns a tidy table; none changes what it is given. An arm is known by its study,
its data set and its name. Only runs of one version of erpe are compared, seed by seed, over the seeds both arms have.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar as mcnemar_test
from statsmodels.stats.multitest import multipletests

from erpe.report.outcomes import Outcomes
from erpe.report.pairing import KEY, PAIR, arm_keys, by_arm, common, pairs, partner, reference_version, sound_runs

LEVEL = 0.95
"""Of every interval."""
ALPHA = 1 - LEVEL
"""A difference is real where its p-value after Holm's correction is below this."""
HIGHER_IS_BETTER = {
    "test/accuracy": True, "test/precision": True, "test/recall": True, "test/f1": True, "test/log_likelihood": True,
    "train/log_likelihood": True, "aic": False, "bic": False, "params": False, "flops/forward": False,
    "flops/train_step": False, "time/inference_ms_per_image": False, "time/inference_ms_batch1": False,
    "time/train_seconds_per_epoch": False, "memory/peak_mib": False,
}  # fmt: skip
"""The measures of the table, in the order of the question, and which end of each is the good one."""
FEW_DISCORDANT = 25
"""Below so many discordant images McNemar's test is exact (binomial), above chi-squared with continuity correction."""
RESAMPLES = 9999
FEWEST_RESAMPLED = 3
"""Seeds from which on resampling them says anything."""
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
    equal accuracies of two seeds prove nothing; there is no interval. Source: scipy.stats.ttest_rel.
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
    found = stats.ttest_rel(first, second)
    low, high = found.confidence_interval(LEVEL)
    return Paired(mean, float(low), float(high), float(found.pvalue), n)


def _flat(values: np.ndarray, scale: np.ndarray) -> bool:
    return float(np.ptp(values)) <= _SPREAD * float(np.abs(scale).max())


def holm(p: np.ndarray) -> np.ndarray:
    """Holm's correction of one family of (tests,) p-values; NaN stays NaN and is no member of the family."""
    p = np.asarray(p, float)
    corrected, tested = np.full(len(p), np.nan), ~np.isnan(p)
    if tested.any():
        gc.freeze()  # multipletests collects garbage on every call: half a second each where torch is loaded
        try:
            corrected[tested] = multipletests(p[tested], alpha=ALPHA, method="holm")[1]
        finally:
            gc.unfreeze()
    return corrected


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
        for measure in HIGHER_IS_BETTER:
            if runs is not None and measure in runs:
                rows.append((*key, measure, *mean_interval(runs[measure].to_numpy())))
    return pd.DataFrame(rows, columns=[*KEY, "measure", *Interval._fields])


def differences(outcomes: Outcomes, measures: Sequence[str] | None = None, against: str | None = None) -> pd.DataFrame:
    """Paired t-tests by seed of every pair, corrected by Holm; a family is one measure of one study and data set.

    Args:
        measures: those of `HIGHER_IS_BETTER` unless others are named.
        against: a study to compare the others with; see `pairs`.
    Returns:
        A row a pair and measure: `PAIR`, `measure`, `difference` (arm minus against), `low`, `high`, `p`, `n`
        (common seeds), `p_holm`. Below two common seeds nothing is tested: NaN.
    """
    runs, rows = by_arm(sound_runs(outcomes)), []
    for pair in pairs(outcomes.arms, against).to_dict("records"):
        first, second = common(runs, pair)
        for measure in measures or HIGHER_IS_BETTER:
            if measure in outcomes.runs:
                found = paired_test(first.get(measure, np.array([])), second.get(measure, np.array([])))
                rows.append(pair | {"measure": measure} | found._asdict())
    table = pd.DataFrame(rows, columns=[*PAIR, "measure", *Paired._fields])
    return _corrected(table, "p", [*KEY[:2], "measure"])


def _corrected(table: pd.DataFrame, p: str, family: list[str]) -> pd.DataFrame:
    table["p_holm"] = np.nan
    for _, rows in table.groupby(family, sort=False):
        table.loc[rows.index, "p_holm"] = holm(rows[p].to_numpy())
    return table


def mcnemar(outcomes: Outcomes, against: str | None = None) -> pd.DataFrame:
    """McNemar's test of each pair and seed on the same test images: do both models err on different images?

    Corrected by Holm; a family is all pairs of one study, data set and seed.
    Returns:
        A row a pair: `PAIR`, `only_arm`, `only_against` (images only one of both has right, summed over seeds),
        `p_median` over seeds, `n` (seeds), `seeds_significant` (with a corrected p below 0.05).
    Source: McNemar 1947; statsmodels.
    """
    runs, rows = by_arm(sound_runs(outcomes)), []
    for pair in pairs(outcomes.arms, against).to_dict("records"):
        first, second = common(runs, pair)
        labels = outcomes.labels.get(pair["dataset"], np.array([]))
        for seed in first.index:
            one, two = (outcomes.predictions.get(frame.loc[seed, "uid"]) for frame in (first, second))
            if one is not None and two is not None and len(one) == len(two) == len(labels) > 0:
                rows.append(pair | {"seed": seed} | _discordant(one == labels, two == labels))
    table = pd.DataFrame(rows, columns=[*PAIR, "seed", "only_arm", "only_against", "p"])
    table = _corrected(table, "p", [*KEY[:2], "seed"])
    table["significant"] = table["p_holm"] < ALPHA
    return table.groupby(PAIR, sort=False, as_index=False).agg(
        only_arm=("only_arm", "sum"), only_against=("only_against", "sum"), p_median=("p", "median"),
        n=("seed", "size"), seeds_significant=("significant", "sum"),
    )  # fmt: skip


def _discordant(first: np.ndarray, second: np.ndarray) -> dict[str, float]:
    only_first, only_second = int((first & ~second).sum()), int((second & ~first).sum())
    table = [[int((first & second).sum()), only_first], [only_second, int((~first & ~second).sum())]]
    p = mcnemar_test(table, exact=only_first + only_second < FEW_DISCORDANT).pvalue
    return {"only_arm": only_first, "only_against": only_second, "p": float(p)}


def gap_closed(outcomes: Outcomes, measure: str = "test/accuracy") -> pd.DataFrame:
    """(variant - its Performer baseline) / (softmax - that baseline): the part of the gap an encoding closes.

    Returns:
        A row an encoded linear attention: `study`, `dataset`, `arm`, `baseline`, `softmax`, `preliminary`, `gap`
        (softmax - baseline) with its t-interval `gap_low`, `gap_high`, `gap_is_real` (that interval lies above 0;
        else the ratio means little), `closed` (1: the whole gap) with its bootstrap interval `low`, `high`, `n`
        (seeds all three have).
    """
    runs, rows = by_arm(sound_runs(outcomes)), []
    finished = dict(zip(arm_keys(outcomes.arms), outcomes.arms["finished"].astype(bool), strict=True))
    for arm in outcomes.arms.itertuples(index=False):
        here = (arm.study, arm.dataset)
        trio = (arm.arm, partner(outcomes.arms, arm, arm.attention), partner(outcomes.arms, arm, "softmax"))
        keys = [(*here, str(name)) for name in trio]
        if arm.attention == "softmax" or arm.encoding == "none" or None in trio:
            continue
        whole = all(finished[key] for key in keys)
        columns = [runs[key][measure] if key in runs else pd.Series(dtype=float) for key in keys]
        values = pd.concat(columns, axis=1, join="inner").sort_index().dropna().to_numpy().T  # (3, seeds)
        rows.append((*here, *trio, not whole, *_gap(*values)))
    names = "preliminary gap gap_low gap_high gap_is_real closed low high n".split()
    return pd.DataFrame(rows, columns=[*KEY, "baseline", "softmax", *names])


def _gap(variant: np.ndarray, baseline: np.ndarray, softmax: np.ndarray) -> tuple[float | bool, ...]:
    gap = paired_test(softmax, baseline)
    closed = float(_ratio(variant, baseline, softmax)) if gap.n else np.nan
    low, high = bootstrap_interval(variant, baseline, softmax)
    return gap.difference, gap.low, gap.high, gap.low > 0, closed, low, high, gap.n


def _ratio(variant: np.ndarray, baseline: np.ndarray, softmax: np.ndarray, axis: int = -1) -> np.ndarray:
    gain, gap = (variant - baseline).mean(axis), (softmax - baseline).mean(axis)
    return np.divide(gain, gap, out=np.full(np.shape(gap), np.nan), where=gap != 0)


def bootstrap_interval(variant: np.ndarray, baseline: np.ndarray, softmax: np.ndarray) -> tuple[float, float]:
    """95 % bootstrap interval of the gap closed; whole seeds are drawn anew, always in the same way.

    A percentile interval of n values is too narrow by about sqrt((n - 1) / n) z / t(n - 1), and five seeds are few: its
    percentiles are moved outwards to make good for both. In simulation the truth then lies inside in 95 % of studies of
    ten seeds, 91 % of five, 73 % of three; below three it is NaN.

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
