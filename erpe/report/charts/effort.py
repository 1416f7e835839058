"""The figure of whether a search searched: what more trials are expected to bring."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from erpe.report.charts.legends import legend_height, legend_of
from erpe.report.charts.style import FULL, PALE, marks, panels_of
from erpe.report.outcomes import Outcomes, goals_of
from erpe.report.pairing import KEY, arm_keys
from erpe.study.objectives import drawn_as


def search_effort(outcomes: Outcomes) -> Figure | None:
    """Draw the expected best of the first objective, by default validation accuracy (%), after n trials.

    A panel an attention; the others are pale.

    None where no arm has two trials that ended with a value.

    Source: Dodge et al. 2019 (EMNLP); see `expected_best`.
    """
    if outcomes.trials.empty:
        return None
    curves = expected_best_curves(outcomes)
    shown = {arm: mark for arm, mark in marks(outcomes.arms).items() if (curves["arm"] == arm).sum() > 1}
    if not shown:
        return None
    factor, label = drawn_as(goals_of(outcomes.arms).objectives[0])
    height = 2.1 + legend_height(shown, FULL)
    figure, panels, attentions = panels_of(shown, 1, height, sharey=True, sharex=True)
    for axes, attention in zip(panels[0], attentions, strict=True):
        for arm, mark in shown.items():
            own = curves[curves["arm"] == arm]
            pale = {"color": PALE, "linewidth": 0.8, "alpha": 0.6, "zorder": 1}
            look = mark.line(markersize=3.5, zorder=3) if mark.attention == attention else pale
            axes.plot(own["trials"], factor * own["value"], **look)
        axes.set_xlabel("trials")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    figure.axes[0].set_ylabel(f"expected best\n{label}")
    legend_of(figure, shown, line=True)
    return figure


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
    return weights @ found


def expected_best_curves(outcomes: Outcomes) -> pd.DataFrame:
    """`study`, `dataset`, `arm`, `trials` (n) and `value`: `expected_best` of the trials that ended with a value.

    A pruned trial has its last value, which is below what it would have become.
    """
    rows = []
    for study, dataset, arm in arm_keys(outcomes.arms):
        own = outcomes.trials[(outcomes.trials["study"] == study) & (outcomes.trials["arm"] == arm)]
        ended = own[own["state"].isin(["COMPLETE", "PRUNED"])]
        curve = expected_best(ended["value"].astype(float).to_numpy())
        rows += [(study, dataset, arm, n, value) for n, value in enumerate(curve.tolist(), 1)]
    return pd.DataFrame(rows, columns=[*KEY, "trials", "value"])
