"""What the seeds allow us to say: means with intervals, paired differences, McNemar's test.

Every function takes `Outcomes` and returns a tidy table; none changes what it is given. An arm is known by its study,
its data set and its name. Only runs of one version of erpe are compared, seed by seed, over the seeds both arms have.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar as mcnemar_test
from statsmodels.stats.multitest import multipletests

from erpe.report.outcomes import Outcomes
from erpe.report.pairing import KEY, PAIR, arm_keys, by_arm, common, pairs, reference_version, sound_runs

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
