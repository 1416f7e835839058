"""What each figure is called, what its caption says, and what to say where it cannot be drawn."""

from __future__ import annotations

from typing import NamedTuple

import pandas as pd

from erpe.report.comparison import Comparison
from erpe.report.gaps import coverage_told
from erpe.report.significance import GAPS, MEASURE


class Caption(NamedTuple):
    """Words of a figure; `{n}` in them is "n = 5 seeds", `{bar}` and the like what `told` says of what is drawn."""

    title: str
    text: str
    """What is shown, over how many, and what the intervals are."""
    missing: str
    """What the figure needs and has not."""


CAPTIONS = {
    "accuracy": Caption(
        "Test accuracy",
        "Marker: mean, {n}. {bar} Small dots: the single seeds.",
        "no confirmed run has a test accuracy",
    ),
    "tradeoffs": Caption(
        "Accuracy against its cost",
        "Means, {n}. {bar} Grey steps: the Pareto front by the means, the arms that no other beats in both; they are "
        "named where there is room. FLOPs and parameters are counted, the same for every seed.",
        "no confirmed run has an accuracy and a cost",
    ),
    "gap_closed": Caption(
        "Gap closed",
        "The part of the gap in test accuracy from a linear attention without encoding (0) to softmax (1) that an "
        "encoding closes. Marker: ratio of the mean differences, {n}; an arrow where something lies outside the "
        "figure. {bar} {hollow}",
        "it needs confirmed runs of softmax, of a linear attention and of the same with an encoding",
    ),
    "critical_difference": Caption(
        "Critical differences",
        "Mean rank by test accuracy (1 is the best), {n}, those that all ranked arms have. A black bar joins "
        "arms that Nemenyi's test, after Friedman's, does not tell apart at 5 %.",
        "it needs three arms with two seeds in common",
    ),
    "learning_curves": Caption(
        "Learning curves",
        "Above: the trial with the best validation accuracy of each arm's search, one run an arm, so without interval. "
        "Below: training loss of the confirmed runs, mean, {n}; the band, where there are more, goes from the "
        "lowest to the highest seed, no confidence interval. Pale: the other attentions.",
        "no epoch was recorded",
    ),
    "criteria": Caption(
        "AIC and BIC",
        "On the training images, lower is better. Marker: mean, {n}. {bar} For networks with more "
        "parameters than images the count of parameters outweighs the fit.",
        "no confirmed run has an AIC or a BIC",
    ),
    "attention_maps": Caption(
        "What one patch looks at",
        "Attention of the marked patch in the last block, heads averaged, in multiples of uniform attention, on the "
        "same image for all, in each arm's confirmed run with the lowest seed. One image, one seed: an example, no "
        "measurement.",
        "no confirmed run's attention.npz is on this machine",
    ),
    "cost_against_tokens": Caption(
        "Cost of an attention layer against its tokens",
        "FLOPs in closed form of one layer, all heads, forward, one image, for 16 to 4096 tokens at the data set's "
        "default width and heads, not at those that a search chose; nothing is measured. A general encoding takes the "
        "method that the layer chooses by itself (auto: dense or FFT, whichever was faster on a CPU, not which needs "
        "fewer FLOPs), so its curve has a kink where that changes. Large marker: from here the linear attention needs "
        "fewer FLOPs than softmax.",
        "no linear attention is in this study",
    ),
}
"""Name of a chart -> its words."""

NO_BAR = "No intervals: one seed has none, nor have equal ones."
BARS: dict[str, tuple[tuple[str, ...], str]] = {
    "accuracy": ((MEASURE,), "Bar: 95 % t-interval of the mean, cut off where accuracy ends."),
    "tradeoffs": (
        (MEASURE, "time/inference_ms_per_image", "time/train_seconds_per_epoch"),
        "Thin lines: 95 % t-intervals, which may go on outside a panel.",
    ),
    "criteria": (("aic", "bic"), "Bar: 95 % t-interval."),
}
"""Name of a chart -> the measures whose intervals it draws, and what it says of them."""


def told(name: str, comparison: Comparison) -> str:
    """The text below a chart of one study: it tells of what is drawn there, and of nothing else."""
    facts = {"n": seeds_told(comparison, name), "bar": _bar(name, comparison), "hollow": _hollow(comparison.gaps)}
    return " ".join(CAPTIONS[name].text.format(**facts).split())


def seeds_told(comparison: Comparison, chart: str) -> str:
    """ "n = 5 seeds", "n = 2 to 5 seeds": over how many seeds a chart's means, ranks or gaps are."""
    table = {"critical_difference": comparison.ranks, "gap_closed": comparison.gaps}.get(chart, comparison.summary)
    n = table.loc[table["measure"] == MEASURE, "n"] if "measure" in table else table["n"]
    low, high = (int(n.min()), int(n.max())) if len(n) else (0, 0)
    return f"n = {low} seed{'s' * (low != 1)}" if low == high else f"n = {low} to {high} seeds"


def _bar(name: str, comparison: Comparison) -> str:
    if name == "gap_closed":
        drawn = comparison.gaps[comparison.gaps["low"].notna()]
        if drawn.empty:
            return "No intervals: too few seeds, or no gap at all."
        few = coverage_told(drawn["n"])
        return "Bar: 95 % bootstrap interval, whole seeds drawn anew" + (f"; {few}." if few else ".")
    measures, text = BARS.get(name, ((), ""))
    drawn = comparison.summary[comparison.summary["measure"].isin(measures) & comparison.summary["low"].notna()]
    return NO_BAR if measures and drawn.empty else text


def _hollow(gaps: pd.DataFrame) -> str:
    """What is the matter with the gaps that are drawn hollow."""
    drawn = gaps[gaps["closed"].notna()]
    parts = []
    for state, words in GAPS.items():
        baselines = drawn.loc[drawn["gap_is"] == state, "baseline"].unique()
        parts += [f"the gap from {' and from '.join(baselines)} {words}"] if len(baselines) else []
    return f"Hollow: {'; '.join(parts)}; so the part of it means little." if parts else ""
