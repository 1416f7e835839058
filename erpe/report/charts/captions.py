"""What each figure is called, what its caption says, and what to say where it cannot be drawn."""

from __future__ import annotations

from typing import NamedTuple

from erpe.report.comparison import Comparison
from erpe.report.gaps import NOT_SHOWN
from erpe.report.labels import labels_of
from erpe.report.significance import MEASURE
from erpe.text import counted


class Caption(NamedTuple):
    """Words of a figure; `{n}` in them is "n = 5 seeds", `{bar}` and the like what `told` says of what is drawn."""

    title: str
    text: str
    """What is shown, over how many, and what the intervals are."""
    missing: str
    """What the figure needs and has not."""


CAPTIONS = {
    "differences": Caption(
        "Paired differences",
        "Test accuracy of one arm minus that of the other, seed by seed, {n}. {bar} Shaded: the margin, differences "
        "that are too small to matter. Filled triangle: better or worse; square: equivalent within the margin; hollow "
        "circle: undecided; an arrow where an interval goes on outside the figure.",
        "it needs two arms to compare",
    ),
    "accuracy": Caption(
        "Test accuracy",
        "Marker: mean, {n}. {bar} Small dots: the single seeds.",
        "no confirmed run has a test accuracy",
    ),
    "tradeoffs": Caption(
        "Accuracy against its cost",
        "Means, {n}. {bar} A column an attention; grey: the other ones. Times are ratios to softmax on the same seed, "
        "on a logarithmic axis. FLOPs and parameters are counted, the same for every seed.",
        "no confirmed run has an accuracy and a cost",
    ),
    "gap_closed": Caption(
        "Gap closed",
        "The part of the gap in test accuracy from a linear attention without encoding (0) to softmax (100 %) that an "
        "encoding closes. Marker: ratio of the mean differences, {n}; an arrow where something lies outside the "
        "figure. Bar: Fieller's 95 % interval. {without}",
        "no gap is shown, or no encoding could close one",
    ),
    "fronts": Caption(
        "Pareto fronts of the searches",
        "Trials that no other one of their arm dominates: none is as good in every objective and better in one. Of two "
        "objectives, a line joins them. Dots: the other complete trials within the limits. Pale: the fronts of the "
        "other attentions. One search an arm, on the validation part, so without interval.",
        "the searches have one objective",
    ),
    "search_effort": Caption(
        "What more trials bring",
        "Expected best value, on the validation part, of a search of so many trials (Dodge et al. 2019), of the trials "
        "that ended with a value; one search an arm, so without interval. Still rising at its end: more trials would "
        "pay. Pale: the other attentions.",
        "no search has two trials that ended with a value",
    ),
    "critical_difference": Caption(
        "Critical differences",
        "Mean rank by test accuracy (1 is the best), {n}, those that all ranked arms have. A block is a seed. A black "
        "bar joins arms that Nemenyi's test, after Friedman's, does not tell apart at 5 %.",
        "it needs three to twelve arms with five seeds in common, as a block is a seed",
    ),
    "learning_curves": Caption(
        "Learning curves",
        "Above: the trial of each arm's search with the best value on the validation part, one run an arm, so without "
        "interval. Below: training loss of the confirmed runs, mean, {n}; the band, where there are more, goes from "
        "the lowest to the highest seed, no confidence interval. Pale: the other attentions.",
        "no epoch was recorded",
    ),
    "criteria": Caption(
        "AIC and BIC",
        "On the training images. Marker: mean, {n}. {bar} No ranks and no tests: these models are no "
        "maximum-likelihood fits, and the count of parameters outweighs the fit.",
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
    "differences": (
        (),
        "Thick bar: 95 % interval, all of a group together, for new seeds on these test images; thin: for new images "
        "too.",
    ),
    "accuracy": ((MEASURE,), "Bar: 95 % t-interval of the mean, cut off where accuracy ends."),
    "tradeoffs": (
        (MEASURE, "time/inference_ms_per_image", "time/train_seconds_per_epoch"),
        "Thin lines: 95 % t-intervals, which may go on outside a panel.",
    ),
    "criteria": (("aic", "bic"), "Bar: 95 % t-interval."),
}
"""Name of a chart -> the measures whose intervals it draws, and what it says of them."""


def told(name: str, comparison: Comparison) -> str:
    """Return the text below a chart of one study: it tells of what is drawn there, and of nothing else."""
    facts = {"n": seeds_told(comparison, name), "bar": _bar(name, comparison), "without": _without(comparison)}
    return " ".join(CAPTIONS[name].text.format(**facts).split())


def seeds_told(comparison: Comparison, chart: str) -> str:
    """ "n = 5 seeds", "n = 2 to 5 seeds": over how many seeds a chart's means, ranks or gaps are."""
    shown = comparison.gaps[comparison.gaps["shown"]]
    known = {"critical_difference": comparison.ranks, "gap_closed": shown, "differences": comparison.differences}
    table = known.get(chart, comparison.summary)
    n = table.loc[table["measure"] == MEASURE, "n"] if "measure" in table else table["n"]
    low, high = (int(n.min()), int(n.max())) if len(n) else (0, 0)
    return f"n = {counted(low, 'seed')}" if low == high else f"n = {low} to {high} seeds"


def _bar(name: str, comparison: Comparison) -> str:
    measures, text = BARS.get(name, ((), ""))
    drawn = comparison.summary[comparison.summary["measure"].isin(measures) & comparison.summary["low"].notna()]
    return NO_BAR if measures and drawn.empty else text


def _without(comparison: Comparison) -> str:
    """Which attentions have no gap to close."""
    gaps, labels = comparison.gaps, labels_of(comparison.arms)
    names = [labels[arm] for arm in gaps.loc[~gaps["shown"], "baseline"].unique()]
    return f"From {' and from '.join(names)}: {NOT_SHOWN}." if names else ""
