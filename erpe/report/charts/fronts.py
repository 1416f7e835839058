"""The figure of what searches of several objectives found."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

from erpe.report.charts.legends import legend_height, legend_of
from erpe.report.charts.style import FULL, PALE, marks, panels_of
from erpe.report.comparison import Comparison
from erpe.report.outcomes import Outcomes, goals_of
from erpe.study.objectives import CLOSED, drawn_as

WIDE = 10
"""Largest over smallest cost, from which the axis is logarithmic."""


def fronts(outcomes: Outcomes, comparison: Comparison) -> Figure | None:
    """Draw the Pareto front of each arm: the first objective against each other one, a row each, a column an attention.

    Dots are the other complete trials; the fronts of the other attentions are pale. Of more than two objectives a
    front is points without a line. None where one objective is sought.
    """
    first, *others = goals_of(outcomes.arms).objectives
    found = comparison.fronts.pivot(index=["arm", "number"], columns="objective", values="value").reset_index()
    shown = {arm: mark for arm, mark in marks(outcomes.arms).items() if arm in set(found["arm"])}
    if not shown or not others:
        return None
    trials = outcomes.trials[outcomes.trials["state"] == "COMPLETE"].dropna(subset=["value", *others])
    height = 2.0 * len(others) + legend_height(shown, FULL)
    figure, panels, attentions = panels_of(shown, len(others), height, sharey=True, sharex="row")
    for row, cost in zip(panels, others, strict=True):
        for axes, attention in zip(row, attentions, strict=True):
            for arm, mark in shown.items():
                own, rest = (table[table["arm"] == arm].sort_values(cost) for table in (found, trials))
                here = mark.attention == attention
                colour: dict[str, Any] = {"color": mark.colour if here else PALE, "linewidth": 1.2}
                colour["linestyle"] = "none" if len(others) > 1 else mark.dashes if here else "-"
                look = mark.dot(5.5) | {"zorder": 3} if here else {"marker": mark.marker, "markersize": 3, "alpha": 0.6}
                axes.plot(own[cost] * drawn_as(cost)[0], own[first] * drawn_as(first)[0], drawstyle="steps-post",
                          **colour, **look)  # fmt: skip
                if here:
                    points = rest[cost] * drawn_as(cost)[0], rest["value"] * drawn_as(first)[0]
                    axes.plot(*points, ".", color=mark.colour, markersize=3, alpha=0.5, zorder=2)
        low, high = trials[cost].min(), trials[cost].max()
        if 0 < low * WIDE < high:
            row[0].set_xscale("log")
            row[0].xaxis.set_major_locator(LogLocator(subs=(1, 3)))
            row[0].xaxis.set_minor_formatter(NullFormatter())
        else:
            row[0].xaxis.set_major_locator(MaxNLocator(5))
        large = cost in CLOSED
        row[0].xaxis.set_major_formatter(EngFormatter(sep="\N{THIN SPACE}") if large else StrMethodFormatter("{x:g}"))
        row[len(row) // 2].set_xlabel(drawn_as(cost)[1])
        row[0].set_ylabel(drawn_as(first)[1])
    legend_of(figure, shown, line=True)
    return figure
