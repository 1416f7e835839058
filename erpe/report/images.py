"""How sure a difference is for new test images, too: seeds and images are drawn anew.

An interval over seeds alone is about new seeds on these very test images. Every seed of every arm saw the same images,
so seeds and images are crossed: both are drawn, independently of each other.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd
from scipy import stats

from erpe.report.decisions import ALPHA
from erpe.report.outcomes import Outcomes
from erpe.report.pairing import by_arm, common, sound_runs

DRAWS = 1000
AT_ONCE = 100
"""Draws of images that are in memory at a time."""


def crossed_errors(differences: Sequence[np.ndarray], draws: int = DRAWS, seed: int = 0) -> np.ndarray:
    """Return standard error of the mean of each of several (images, n) tables, n >= 2 seeds, under new seeds and new
    images.

    Hierarchical bootstrap: a draw takes n - 1 of the n seeds, with replacement, which makes the variance over few seeds
    unbiased, and as many images as there are, the same for all tables. It errs on the safe side: what is of one seed on
    one image alone counts up to three times.

    Returns:
        (tables,)
    Source: McCullagh 2000, Bernoulli 6; Owen 2007, Annals of Applied Statistics 1 (both factors drawn); McCarthy and
    Snowden 1985, Vital and Health Statistics 2(95) (n - 1 of n).
    """
    random = np.random.default_rng(seed)
    images = len(differences[0])
    columns = np.concatenate(differences, axis=1).astype(np.float32)
    drawn = []
    for first in range(0, draws, AT_ONCE):
        some = min(AT_ONCE, draws - first)
        chosen = random.integers(0, images, (some, images)) + images * np.arange(some)[:, None]
        times = np.bincount(chosen.ravel(), minlength=some * images).reshape(some, images)
        drawn.append(times.astype(np.float32) @ columns / images)
    means, errors, start = np.concatenate(drawn), [], 0  # means: (draws, seeds of all tables)
    for table in differences:
        n = table.shape[1]
        seeds = random.integers(0, n, (draws, n - 1))
        errors.append(np.take_along_axis(means[:, start : start + n], seeds, axis=1).mean(axis=1).std(ddof=1))
        start += n
    return np.array(errors, float)


def image_intervals(outcomes: Outcomes, table: pd.DataFrame, families: Iterable[pd.Index]) -> pd.DataFrame:
    """Simultaneous 95 % intervals of differences in accuracy, for new seeds and new images.

    Args:
        table: pairs, as of `statistics.differences`, with `difference` and `n`.
        families: the rows of each family of `table`.
    Returns:
        Index of `table`; `images_low`, `images_high`, NaN where a run has no predictions or one seed is all there is.
    """
    parts = _parts(outcomes, table)
    errors = pd.Series(np.nan, index=table.index)
    for dataset, rows in table.loc[list(parts)].groupby("dataset").groups.items():
        assert dataset is not None
        errors.loc[rows] = crossed_errors([parts[row] for row in rows])
    sizes = {row: len(rows) for rows in families for row in rows}
    tests = np.array([sizes[row] for row in table.index], float)
    half = errors * stats.t.isf(ALPHA / 2 / tests, np.maximum(table["n"] - 1, 1))
    return pd.DataFrame({"images_low": table["difference"] - half, "images_high": table["difference"] + half})


def _parts(outcomes: Outcomes, table: pd.DataFrame) -> dict[object, np.ndarray]:
    """Row -> (images, seeds): 1 where only the arm is right, -1 where only the other is, else 0."""
    if not outcomes.predictions:
        return {}
    runs, right, parts = by_arm(sound_runs(outcomes)), {}, {}
    for uid, dataset in outcomes.runs[["uid", "dataset"]].itertuples(index=False, name=None):
        labels, predicted = outcomes.labels.get(dataset), outcomes.predictions.get(uid)
        if labels is not None and predicted is not None and len(labels) == len(predicted) > 0:
            right[uid] = (predicted == labels).astype(np.int8)
    for row, pair in zip(table.index, table.to_dict("records"), strict=True):
        one, two = (list(frame["uid"]) if len(frame) else [] for frame in common(runs, pair))
        if len(one) > 1 and all(uid in right for uid in [*one, *two]):
            parts[row] = np.stack([right[a] - right[b] for a, b in zip(one, two, strict=True)], axis=1)
    return parts
