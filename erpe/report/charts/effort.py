"""The figure of whether a search searched: what more trials are expected to bring."""

from __future__ import annotations

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from erpe.report.charts.style import FULL, PALE, blank, dress, legend_height, legend_of, marks
from erpe.report.effort import expected_best_curves
from erpe.report.labels import ATTENTION
from erpe.report.outcomes import Outcomes, goals_of
from erpe.study.objectives import drawn_as


def search_effort(outcomes: Outcomes) -> Figure | None:
    """Draw the expected best of the first objective, by default validation accuracy (%), after n trials.

    A panel an attention; the others are pale.

    None where no arm has two trials that ended with a value.

    Source: Dodge et al. 2019 (EMNLP); see `effort.expected_best`.
    """
    if outcomes.trials.empty:
        return None
    curves = expected_best_curves(outcomes)
    shown = {arm: mark for arm, mark in marks(outcomes.arms).items() if (curves["arm"] == arm).sum() > 1}
    if not shown:
        return None
    factor, label = drawn_as(goals_of(outcomes.arms).objectives[0])
    attentions = list(dict.fromkeys(mark.attention for mark in shown.values()))
    figure = blank(FULL, 2.1 + legend_height(shown, FULL))
    for axes, attention in zip(
        figure.subplots(1, len(attentions), squeeze=False, sharey=True, sharex=True)[0], attentions, strict=True
    ):
        for arm, mark in shown.items():
            own = curves[curves["arm"] == arm]
            pale = {"color": PALE, "linewidth": 0.8, "alpha": 0.6, "zorder": 1}
            look = mark.line(markersize=3.5, zorder=3) if mark.attention == attention else pale
            axes.plot(own["trials"], factor * own["value"], **look)
        axes.set(xlabel="trials", title=ATTENTION.get(attention, attention))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        dress(axes)
    figure.axes[0].set_ylabel(f"expected best\n{label}")
    legend_of(figure, shown, line=True)
    return figure
