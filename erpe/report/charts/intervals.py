"""Figures of one measure an arm: a dot, its interval, and what it is made of."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from erpe.report.charts.style import COLUMN, FULL, INK, SMALL, Mark, blank, dress, marks
from erpe.report.comparison import Comparison
from erpe.report.outcomes import Outcomes
from erpe.report.pairing import sound_runs

LANES = 4
"""Rows of small dots above a mark."""
POSSIBLE: dict[str, tuple[float | None, float | None]] = {
    "test/accuracy": (0, 1), "aic": (None, None), "bic": (None, None),
}  # fmt: skip
"""Measure -> the lowest and the highest value that it can have; others are 0 or more."""


def accuracy(outcomes: Outcomes, comparison: Comparison, width: float = FULL) -> Figure | None:
    """Test accuracy of each arm: the mean over seeds with its 95 % interval, and every seed as a small dot.

    An arm whose seeds are not all there says how many are. None without confirmed runs.
    """
    table = interval(comparison, "test/accuracy")
    shown = {arm: mark for arm, mark in marks(outcomes.arms).items() if arm in table.index}
    if not shown:
        return None
    names = _names(shown, comparison, width)
    figure = blank(width, 0.6 + _inches(names, 0.27) * (len(shown) + _breaks(shown)))
    axes = figure.add_subplot()
    rows = _rows(axes, shown, names)
    _dots(axes, 100 * table, rows, shown)
    runs = sound_runs(outcomes)
    values = 100 * runs["test/accuracy"]
    near = 0.012 * (max(values.max(), axes.get_xlim()[1]) - min(values.min(), axes.get_xlim()[0]))
    for arm, seeds in values.groupby(runs["arm"], sort=False):
        if arm in rows:
            heights = [rows[str(arm)] + 0.26 + 0.13 * lane for lane in lanes(seeds.to_list(), near)]
            axes.scatter(seeds, heights, s=7, color=shown[str(arm)].colour, alpha=0.7, linewidths=0)
    axes.set_xlim(right=min(100.0, axes.get_xlim()[1]))
    for drawn in (*axes.lines, *axes.collections):
        drawn.set_clip_on(False)  # a marker at 100 is whole
    axes.set_xlabel("test accuracy (%)")
    dress(axes, grid="x")
    return figure


def lanes(values: Sequence[float], near: float) -> list[int]:
    """Return a lane, of `LANES`, for each value, so that no two in one lane are nearer than `near`."""
    found = [0] * len(values)
    last = [-math.inf] * LANES
    for place in sorted(range(len(values)), key=lambda place: values[place]):
        free = [lane for lane in range(LANES) if values[place] - last[lane] >= near]
        found[place] = free[0] if free else min(range(LANES), key=last.__getitem__)
        last[found[place]] = values[place]
    return found


def criteria(outcomes: Outcomes, comparison: Comparison) -> Figure | None:
    """AIC and BIC of each arm on the training images, means over seeds with 95 % intervals.

    The axis is logarithmic where the largest is more than twenty times the smallest. None without them.
    """
    tables = {name.upper(): table for name in ("aic", "bic") if not (table := interval(comparison, name)).empty}
    known = {arm for table in tables.values() for arm in table.index}
    shown = {arm: mark for arm, mark in marks(outcomes.arms).items() if arm in known}
    if not shown:
        return None
    names = _names(shown, comparison, FULL)
    figure = blank(FULL, 0.6 + 0.22 * (len(shown) + _breaks(shown)))
    for axes, (name, table) in zip(figure.subplots(1, len(tables), squeeze=False, sharey=True)[0], tables.items(),
                                   strict=True):  # fmt: skip
        rows = _rows(axes, shown, names)
        _dots(axes, table, rows, shown)
        if table["mean"].min() > 0 and table["mean"].max() > 20 * table["mean"].min():
            axes.set_xscale("log")
        else:
            axes.xaxis.set_major_locator(MaxNLocator(4))
            axes.xaxis.set_major_formatter(EngFormatter(sep="\N{THIN SPACE}"))
        axes.set_xlabel(name)
        dress(axes, grid="x")
        axes.tick_params(axis="y", labelleft=axes is figure.axes[0])
    return figure


def gap_closed(outcomes: Outcomes, comparison: Comparison, width: float = FULL) -> Figure | None:
    """Draw the part of the gap between Performer and softmax that an encoding closes, with Fieller's interval; lines
    stand at 0 (the Performer without encoding) and 100 % (softmax).

    Only gaps that are shown are drawn; None where none is.
    """
    gaps = comparison.gaps[comparison.gaps["shown"]].set_index("arm")
    shown = {arm: mark for arm, mark in marks(outcomes.arms).items() if arm in gaps.index}
    if not shown:
        return None
    names = _names(shown, comparison, width)
    figure = blank(width, 0.8 + _inches(names, 0.22) * (len(shown) + _breaks(shown)))
    axes = figure.add_subplot()
    rows = _rows(axes, shown, names)
    gaps = gaps[["closed", "low", "high"]] * 100
    _dots(axes, gaps.rename(columns={"closed": "mean"}), rows, shown)
    axes.set_xlim(*_reach(gaps))
    _arrows(axes, gaps, rows, shown)
    for place, name, side in ((0, "no encoding", "right"), (100, "softmax", "left")):
        axes.axvline(place, color=INK, linewidth=1, zorder=1)
        axes.annotate(name, (place, 1), xycoords=("data", "axes fraction"), xytext=(0, 3), textcoords="offset points",
                      ha=side, va="bottom", fontsize=SMALL, color=INK)  # fmt: skip
    axes.set_xlabel("part of the gap in test accuracy that is closed (%)" if width > COLUMN else "gap closed (%)")
    axes.xaxis.set_major_locator(MaxNLocator(8 if width > COLUMN else 3))
    dress(axes, grid="x")
    return figure


def interval(comparison: Comparison, measure: str) -> pd.DataFrame:
    """Index arm; `mean`, `low`, `high`, `n` of one measure of one study, as the table has them but for ends beyond the
    possible: accuracy ends at 0 and 1, times and counts at 0.
    """
    table = comparison.summary
    rows = table[(table["measure"] == measure) & table["mean"].notna()].set_index("arm")[["mean", "low", "high", "n"]]
    least, most = POSSIBLE.get(measure, (0, None))
    return rows.assign(low=rows["low"].clip(least, most), high=rows["high"].clip(least, most))


def _names(shown: Mapping[str, Mark], comparison: Comparison, width: float) -> list[str]:
    """Name of each arm, and what is amiss with it ("3 of 5 seeds"), where something is; in lines where there is little
    room.
    """
    arms = comparison.arms
    remarks = {arm: f" ({mark})" for arm, mark in zip(arms["arm"], arms["mark"], strict=True) if mark}
    names = [mark.label + remarks.get(arm, "") for arm, mark in shown.items()]
    return names if width > COLUMN else [name.replace(" (", "\n(").replace(", ", ",\n") for name in names]


def _inches(names: Sequence[str], least: float) -> float:
    """Height of a row that has room for the longest name."""
    return max(least, 0.06 + 0.13 * max(1 + name.count("\n") for name in names))


def _breaks(shown: Mapping[str, Mark]) -> int:
    return len({mark.attention for mark in shown.values()}) - 1


def _rows(axes: Axes, shown: Mapping[str, Mark], names: Sequence[str]) -> dict[str, float]:
    """Arm -> its height on the axes; arms downwards, a little room between attentions."""
    rows: dict[str, float] = {}
    height, last = 0.0, ""
    for arm, mark in shown.items():
        height -= 1.6 if last and mark.attention != last else 1.0
        rows[arm], last = height, mark.attention
    axes.set_yticks(list(rows.values()), names)
    axes.set_ylim(height - 0.7, -0.3)
    return rows


def _dots(axes: Axes, table: pd.DataFrame, rows: Mapping[str, float], shown: Mapping[str, Mark]) -> None:
    """Draw a marker at `mean` and a line from `low` to `high` (NaN where one seed has no interval)."""
    for arm, row in table.iterrows():
        mark, y = shown[str(arm)], rows[str(arm)]
        axes.plot([row["low"], row["high"]], [y, y], color=mark.colour, linewidth=2, solid_capstyle="butt")
        axes.plot(row["mean"], y, linestyle="none", zorder=3, **mark.dot(7))


def _reach(gaps: pd.DataFrame) -> tuple[float, float]:
    """Limits that show 0, 100 and every dot; intervals may be long and leave the figure."""
    dots = [*gaps["closed"], 0.0, 100.0]
    room = 0.5 * (max(dots) - min(dots))
    ends = gaps[["low", "closed", "high"]].stack()
    low, high = min([*dots, *ends]), max([*dots, *ends])
    return max(low, min(dots) - 4 * room) - 0.1 * room, min(high, max(dots) + 4 * room) + 0.1 * room


def _arrows(axes: Axes, table: pd.DataFrame, rows: Mapping[str, float], shown: Mapping[str, Mark]) -> None:
    """Mark the dots and intervals that are or go on outside the figure."""
    ends = table[["low", "closed", "high"]]
    for end, marker, leaves in zip(axes.get_xlim(), "<>", (ends.min(axis=1).lt, ends.max(axis=1).gt), strict=True):
        for arm in table.index[leaves(end)]:
            axes.plot(end, rows[arm], marker=marker, color=shown[arm].colour, markersize=6, clip_on=False)
