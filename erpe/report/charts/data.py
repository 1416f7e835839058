"""The numbers behind each figure, to be downloaded from the page."""

from __future__ import annotations

from collections.abc import Callable

import pandas as pd

from erpe.report.charts.costs import COSTS
from erpe.report.charts.curves import best_trials, confirmed_losses
from erpe.report.charts.effort import expected_best_curves
from erpe.report.charts.forest import forest
from erpe.report.charts.tokens import layer_flops
from erpe.report.comparison import Comparison
from erpe.report.outcomes import Outcomes, goals_of
from erpe.report.pairing import sound_runs
from erpe.study.objectives import drawn_as


def _of(comparison: Comparison, *measures: str) -> pd.DataFrame:
    return comparison.summary[comparison.summary["measure"].isin(measures)]


def _curves(outcomes: Outcomes) -> pd.DataFrame:
    above = best_trials(outcomes).assign(measure=drawn_as(goals_of(outcomes.arms).objectives[0])[1])
    return pd.concat([above, confirmed_losses(outcomes.epochs).assign(measure="train/loss")])


def _tokens(outcomes: Outcomes) -> pd.DataFrame:
    dataset = str(outcomes.arms["dataset"].iloc[0])
    tables = [
        pd.DataFrame(layer_flops(variant, dataset), columns=["tokens", "flops"]).assign(variant=variant)
        for variant in dict.fromkeys(["softmax", *outcomes.arms["variant"]])
    ]
    return pd.concat(tables)


DATA: dict[str, Callable[[Outcomes, Comparison], pd.DataFrame]] = {
    "differences": lambda outcomes, comparison: forest(comparison),
    "accuracy": lambda outcomes, comparison: sound_runs(outcomes)[["arm", "seed", "test/accuracy"]],
    "tradeoffs": lambda outcomes, comparison: pd.concat(
        [_of(comparison, "test/accuracy", *COSTS), comparison.ratios.rename(columns={"ratio": "mean"})]
    ),
    "gap_closed": lambda outcomes, comparison: comparison.gaps,
    "critical_difference": lambda outcomes, comparison: comparison.ranks,
    "learning_curves": lambda outcomes, comparison: _curves(outcomes),
    "criteria": lambda outcomes, comparison: _of(comparison, "aic", "bic"),
    "fronts": lambda outcomes, comparison: comparison.fronts,
    "search_effort": lambda outcomes, comparison: expected_best_curves(outcomes),
    "cost_against_tokens": lambda outcomes, comparison: _tokens(outcomes),
}
"""Name of a chart -> its table; an attention map's is an image."""
