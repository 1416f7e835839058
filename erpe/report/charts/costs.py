"""The figure of what accuracy costs: against times, FLOPs and parameters."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from erpe.report.charts.intervals import interval
from erpe.report.charts.legends import by_switch, direct_labels, legend_height, legend_of
from erpe.report.charts.style import FULL, PALE, SMALL, Mark, marks, panels_of
from erpe.report.comparison import Comparison
from erpe.report.labels import ATTENTION
from erpe.report.outcomes import Outcomes
from erpe.report.ratios import TIMES

COSTS = {
    **{name: f"{what} time (softmax = 1)" for name, what in TIMES.items()},
    "flops/forward": "FLOPs of a forward pass (an image)",
    "params": "trainable parameters",
}
"""Measure -> what its axis says."""
FINE = (1, 1.2, 1.5, 2, 3, 4, 5, 7)
"""Ticks of a short logarithmic axis."""


def tradeoffs(outcomes: Outcomes, comparison: Comparison) -> Figure | None:
    """Draw test accuracy against each of `COSTS`, means over seeds with 95 % intervals.

    A row is a cost, a column an attention. The other attentions are pale. Times are ratios to softmax, on a
    logarithmic axis. None without confirmed runs.
    """
    accuracy = 100 * interval(comparison, "test/accuracy")[["mean", "low", "high"]]
    costs = {name: table for name in COSTS if not (table := _cost(comparison, name)).empty}
    shown = {arm: mark for arm, mark in marks(outcomes.arms).items() if arm in accuracy.index}
    if not costs or not shown:
        return None
    height = 1.55 * len(costs) + 0.3
    figure, panels, attentions = panels_of(shown, len(costs), height, sharey=True, sharex="row")
    drawn = []
    for line, (name, cost) in zip(panels, costs.items(), strict=True):
        both = accuracy.join(cost.add_suffix("_cost"), how="inner").reindex([arm for arm in shown if arm in cost.index])
        for axes, attention in zip(line, attentions, strict=True):
            drawn.append((axes, *_panel(axes, both, shown, attention)))
        _scale(line[0], name, both)
        line[len(line) // 2].set_xlabel(COSTS[name], fontsize=SMALL)
        line[0].set_ylabel("test accuracy (%)", fontsize=SMALL)
    low, high = _reach(accuracy.loc[list(shown)], "")
    panels[0, 0].set_ylim(low, min(high, 100.0))
    _name(figure, drawn, shown)
    return figure


def _name(figure: Figure, drawn: list[tuple[Axes, dict[str, tuple[float, float]], list[Line2D]]],
          shown: dict[str, Mark]) -> None:  # fmt: skip
    """Name every mark by a text beside it; where one has no room, by a legend, too; those of switches by that alone."""
    figure.draw_without_rendering()
    names = [[] if by_switch(shown) else direct_labels(axes, points, lines) for axes, points, lines in drawn]
    if any(len(placed) < len(points) for placed, (_, points, _) in zip(names, drawn, strict=True)):
        for name in (name for placed in names for name in placed):
            name.remove()
        figure.set_figheight(figure.get_figheight() + legend_height(shown, FULL))
        legend_of(figure, shown)
        figure.draw_without_rendering()
        for axes, points, lines in drawn if any(names) else []:
            direct_labels(axes, points, lines)
    figure.set_layout_engine("none")  # names must not move what they were placed by


def _cost(comparison: Comparison, name: str) -> pd.DataFrame:
    """Return, by arm, `mean`, `low`, `high` of a cost: of a time its ratio to softmax."""
    if name not in TIMES:
        return interval(comparison, name)[["mean", "low", "high"]]
    table = comparison.ratios[comparison.ratios["measure"] == name].set_index("arm")
    return table.rename(columns={"ratio": "mean"})[["mean", "low", "high"]]


def _scale(axes: Axes, name: str, both: pd.DataFrame) -> None:
    """Set the axis of a cost, the same in a row of panels."""
    if name in TIMES:
        low, high = _reach(both.filter(like="_cost").map(math.log), "_cost")
        axes.set_xscale("log")
        axes.set_xlim(math.exp(low), math.exp(high))
        decades = (high - low) / math.log(10)
        axes.xaxis.set_major_locator(LogLocator(subs=(1,) if decades > 2 else (1, 2, 5) if decades > 0.6 else FINE))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
    else:
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.xaxis.set_major_formatter(EngFormatter(sep="\N{THIN SPACE}"))
        axes.set_xlim(*_reach(both, "_cost"))


def _panel(
    axes: Axes, both: pd.DataFrame, shown: dict[str, Mark], attention: str
) -> tuple[dict[str, tuple[float, float]], list[Line2D]]:
    """Draw one panel.

    Args:
        both: index arm; `mean`, `low`, `high` of accuracy, and the same with `_cost`.
        attention: whose arms are drawn and named; the others are pale.
    Returns:
        Name -> place of each mark, and the lines that a name must not cover.
    """
    points, lines = {}, list[Line2D]()
    for arm, row in both.iterrows():
        mark = shown[str(arm)]
        if mark.attention != attention:
            pale: dict[str, Any] = {"marker": mark.marker, "markersize": 3.5, "color": PALE, "alpha": 0.7, "zorder": 1}
            lines += axes.plot(row["mean_cost"], row["mean"], linestyle="none", **pale)
            continue
        thin: dict[str, Any] = {"color": mark.colour, "linewidth": 0.9, "alpha": 0.45}
        lines += axes.plot([row["mean_cost"]] * 2, [row["low"], row["high"]], **thin)
        lines += axes.plot([row["low_cost"], row["high_cost"]], [row["mean"]] * 2, **thin)
        lines += axes.plot(row["mean_cost"], row["mean"], linestyle="none", zorder=3, clip_on=False, **mark.dot(5.5))
        points[_short(mark)] = (row["mean_cost"], row["mean"])
    return points, lines


def _short(mark: Mark) -> str:
    """Return a label without the attention, which the panel names: `RoPE (no positions)`, or `no positions`."""
    words = mark.label.removeprefix(ATTENTION[mark.attention]).removeprefix(" + ")
    return (words[2:-1] if words.startswith(" (") else words) or "no encoding"


def _reach(table: pd.DataFrame, which: str) -> tuple[float, float]:
    """Return limits of an axis that show every point, and of the intervals what lies within half of the points' range.

    Intervals of few seeds are so long that the points would be one.
    """
    means, ends = table[f"mean{which}"], table[[f"{name}{which}" for name in ("low", "mean", "high")]].stack()
    room = (means.max() - means.min()) / 2 or ends.max() - ends.min() or abs(means.max()) / 10 or 1.0
    low, high = max(ends.min(), means.min() - room), min(ends.max(), means.max() + room)
    return low - 0.25 * room, high + 0.25 * room
