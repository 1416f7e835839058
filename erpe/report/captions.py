"""What each figure is called, what its caption says, and what to say where it cannot be drawn."""

from __future__ import annotations

from typing import NamedTuple


class Caption(NamedTuple):
    """Words of a figure; `{n}` in them is "n = 5 seeds"."""

    title: str
    text: str
    """What is shown, over how many, and what the intervals are."""
    missing: str
    """What the figure needs and has not."""


CAPTIONS = {
    "accuracy": Caption(
        "Test accuracy",
        "Marker: mean, {n}. Bar: 95 % t-interval of the mean. Small dots: the single seeds.",
        "no confirmed run has a test accuracy",
    ),
    "tradeoffs": Caption(
        "Accuracy against its cost",
        "Means, {n}; thin lines are 95 % t-intervals. Grey steps: the Pareto front, the arms that no other beats in "
        "both; they are named where there is room. FLOPs and parameters are counted, the same for every seed.",
        "no confirmed run has an accuracy and a cost",
    ),
    "gap_closed": Caption(
        "Gap closed",
        "The part of the gap in test accuracy from a linear attention without encoding (0) to softmax (1) that an "
        "encoding closes. Marker: ratio of the mean differences, {n}. Bar: 95 % bootstrap interval, whole seeds drawn "
        "anew; an arrow where it goes on outside the figure. Hollow: the gap itself is not told apart from 0, so its "
        "part means little.",
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
        "Below: training loss of the confirmed runs, mean, {n}; the band goes from the lowest to the highest seed, "
        "no confidence interval. Pale: the other attentions.",
        "no epoch was recorded",
    ),
    "criteria": Caption(
        "AIC and BIC",
        "On the training images, lower is better. Marker: mean, {n}. Bar: 95 % t-interval, often narrower than the "
        "marker. For networks with more parameters than images the count of parameters outweighs the fit.",
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
        "default width and heads; nothing is measured. Large marker: from here the linear attention needs fewer FLOPs "
        "than softmax.",
        "no linear attention is in this study",
    ),
}
"""Name of a chart -> its words."""
