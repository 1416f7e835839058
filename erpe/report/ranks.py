"""Orders: average ranks over seeds with the tests of Friedman and Nemenyi, and Pareto fronts."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pandas as pd
from scipy import stats

from erpe.report.outcomes import Outcomes, goals_of
from erpe.report.pairing import KEY, arm_keys, sound_runs

RANKED = "test/accuracy"
"""What arms are ranked by. AIC and BIC would rank counts of parameters."""
FEWEST_ARMS, FEWEST_BLOCKS = 3, 5
"""Smallest number of arms and of blocks (a block is a seed) for ranks, their test and the diagram."""


def _blocks(outcomes: Outcomes) -> Iterator[tuple[str, str, pd.DataFrame, bool]]:
    """Yield of each study and data set its complete blocks, (seeds, arms), and whether they are preliminary.

    Finished arms are ranked; while fewer than two are, all arms with enough seeds. Seeds that one of these arms lacks
    are left out.
    """
    sound = sound_runs(outcomes)
    for (study, dataset), arms in outcomes.arms.groupby(KEY[:2], sort=False) if RANKED in sound else ():
        runs = sound[(sound["study"] == study) & (sound["dataset"] == dataset)]
        blocks = runs.pivot(index="seed", columns="arm", values=RANKED).sort_index()
        enough = blocks.columns[blocks.notna().sum() >= FEWEST_BLOCKS]
        finished = [arm for arm in arms.loc[arms["finished"].astype(bool), "arm"] if arm in enough]
        preliminary = len(finished) < 2
        ranked = [arm for arm in arms["arm"] if arm in enough] if preliminary else finished
        yield study, dataset, blocks[ranked].dropna(), preliminary


def ranks(outcomes: Outcomes) -> pd.DataFrame:
    """Average rank of each arm over blocks (a block is a seed), 1 the best; equal values share their mean rank.

    Returns:
        A row an arm: `study`, `dataset`, `arm`, `measure`, `rank`, `arms` (so many), `n` (seeds), `preliminary`.
    """
    rows = []
    for study, dataset, blocks, preliminary in _blocks(outcomes):
        if len(blocks) >= FEWEST_BLOCKS and blocks.shape[1] > 1:
            means = stats.rankdata(-blocks, axis=1).mean(axis=0)
            counts = (blocks.shape[1], len(blocks), preliminary)
            rows += [(study, dataset, arm, RANKED, rank, *counts) for arm, rank in zip(blocks, means, strict=True)]
    return pd.DataFrame(rows, columns=[*KEY, "measure", "rank", "arms", "n", "preliminary"])


def friedman(outcomes: Outcomes) -> pd.DataFrame:
    """Friedman's test: do the arms' ranks differ at all? Needs `FEWEST_ARMS` and `FEWEST_BLOCKS`.

    Returns:
        A row a study: `study`, `dataset`, `measure`, `statistic` (chi-squared), `p`, `arms`, `n` (blocks),
        `preliminary`. Where all arms are equal on every seed, statistic 0 and p 1. Chi-squared is the limit of many
        blocks: of 40,000 simulated studies with 3 to 12 arms that were all alike, a test at 5 % calls 3.2 to 3.8 %
        different at five seeds: cautious, but of use; at four it is not (2.6 to 7.1 %).
    Source: Iman and Davenport 1980, Communications in Statistics A9(6), on how good the approximation is.
    """
    rows = []
    for study, dataset, blocks, preliminary in _blocks(outcomes):
        if _testable(blocks):
            equal = (blocks.max(axis=1) == blocks.min(axis=1)).all()  # scipy would divide by zero
            statistic, p = (0.0, 1.0) if equal else stats.friedmanchisquare(*blocks.to_numpy().T)
            rows.append((study, dataset, RANKED, float(statistic), float(p), *blocks.shape[::-1], preliminary))
    return pd.DataFrame(rows, columns=[*KEY[:2], "measure", "statistic", "p", "arms", "n", "preliminary"])


def nemenyi(outcomes: Outcomes) -> pd.DataFrame:
    """Nemenyi's test of every two arms' average ranks, for the critical-difference diagram.

    Returns:
        A row two arms, both ways: `study`, `dataset`, `measure`, `arm`, `against`, `p`.
    Source: Demšar 2006, JMLR 7; scikit_posthocs.
    """
    import scikit_posthocs  # brings the whole of seaborn: seconds

    rows = []
    for study, dataset, blocks, _ in _blocks(outcomes):
        if _testable(blocks):
            matrix = scikit_posthocs.posthoc_nemenyi_friedman(-blocks)
            for (row, column), p in np.ndenumerate(matrix.to_numpy()):
                if row != column:
                    rows.append((study, dataset, RANKED, blocks.columns[row], blocks.columns[column], p))
    return pd.DataFrame(rows, columns=[*KEY[:2], "measure", "arm", "against", "p"])


def nemenyi_matrix(mine: pd.DataFrame) -> pd.DataFrame:
    """One study's rows of `nemenyi` as the symmetric (arms, arms) matrix of p-values that a diagram wants."""
    names = list(dict.fromkeys(mine["arm"]))
    matrix = mine.pivot(index="arm", columns="against", values="p").reindex(index=names, columns=names)
    return matrix.where(~np.eye(len(names), dtype=bool), 1.0).rename_axis(index=None, columns=None)


def _testable(blocks: pd.DataFrame) -> bool:
    return blocks.shape[1] >= FEWEST_ARMS and len(blocks) >= FEWEST_BLOCKS


def pareto_front(cost: np.ndarray, quality: np.ndarray) -> np.ndarray:
    """Which of n points no other beats: none is as cheap and as good, and better in one of both.

    Args:
        cost: (n,), lower is better.
        quality: (n,), higher is better.
    Returns:
        (n,) bool; a point with a NaN is never on the front.
    """
    cost, quality = np.asarray(cost, float), np.asarray(quality, float)
    no_worse = (cost <= cost[:, None]) & (quality >= quality[:, None])  # [i, j]: j is no worse than i
    better = (cost < cost[:, None]) | (quality > quality[:, None])
    return ~(no_worse & better).any(axis=1) & ~np.isnan(cost) & ~np.isnan(quality)


def surely_unbeaten(cost: np.ndarray, quality: np.ndarray) -> np.ndarray:
    """Which of n points every other one is dearer or worse than, and by more than both intervals.

    Args:
        cost: (n, 2), the ends of the interval of each, the low one first; lower is better.
        quality: (n, 2), likewise; higher is better.
    Returns:
        (n,) bool; without an interval (NaN) nothing is sure.
    """
    dearer = cost[:, 0] > cost[:, 1, None]  # [i, j]: j is dearer than i
    worse = quality[:, 1] < quality[:, 0, None]
    return np.all(dearer | worse | np.eye(len(cost), dtype=bool), axis=1)


def pareto(summary: pd.DataFrame, cost: str) -> pd.DataFrame:
    """Accuracy against a cost, of the means over seeds; each study and data set has its own front.

    Args:
        summary: of `statistics.summary`.
        cost: a measure of which less is better.
    Returns:
        A row an arm that has both: `study`, `dataset`, `arm`, `cost`, `quality`, `front`.
    """
    means = summary.pivot(index=KEY, columns="measure", values="mean").reindex(columns=[cost, RANKED]).dropna()
    order = pd.MultiIndex.from_frame(summary[KEY].drop_duplicates())
    table = means.reindex(order[order.isin(means.index)]).set_axis(["cost", "quality"], axis=1).reset_index()
    table["front"] = False
    for _, rows in table.groupby(KEY[:2], sort=False):
        table.loc[rows.index, "front"] = pareto_front(rows["cost"].to_numpy(), rows["quality"].to_numpy())
    return table


def fronts(outcomes: Outcomes) -> pd.DataFrame:
    """`study`, `dataset`, `arm`, `number` (of a trial), `objective`, `value`: of the trials of an arm that no other
    one of it dominates, the best by the first objective first. Empty where one objective is sought.
    """
    rows = []
    for study, dataset, arm in arm_keys(outcomes.arms):
        goals = goals_of(outcomes.arms[outcomes.arms["study"] == study])
        found = _ended(outcomes, study, arm, goals.objectives) if goals.several and len(outcomes.trials) else {}
        for number, values in goals.unbeaten(found).items():
            rows += [(study, dataset, arm, number, *each) for each in values.items()]
    return pd.DataFrame(rows, columns=[*KEY, "number", "objective", "value"])


def _ended(outcomes: Outcomes, study: str, arm: str, objectives: tuple[str, ...]) -> dict[int, dict[str, float]]:
    """Number of a complete trial within the limits -> its objectives, the best first."""
    trials = outcomes.trials
    own = trials[(trials["study"] == study) & (trials["arm"] == arm) & (trials["state"] == "COMPLETE")]
    own = own.dropna(subset="value").sort_values(["value", "number"], ascending=[False, True])
    known = own.reindex(columns=["number", *objectives]).dropna()
    return {int(row["number"]): {name: float(row[name]) for name in objectives} for row in known.to_dict("records")}
