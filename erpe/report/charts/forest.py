"""The forest plot: every paired difference that is tested, with its simultaneous interval, margin and verdict."""

from __future__ import annotations

from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from erpe.report.charts.style import INK, PALE, PAPER, SMALL, blank, dress
from erpe.report.comparison import Comparison
from erpe.report.forest import forest
from erpe.report.outcomes import Outcomes
from erpe.report.pairing import KINDS

VERDICT: dict[str, dict[str, Any]] = {
    "better": {"marker": ">", "color": "#0072b2"},
    "worse": {"marker": "<", "color": "#d55e00"},
    "equivalent": {"marker": "s", "color": "#009e73"},
    "undecided": {"marker": "o", "color": "#7a7a7a", "markerfacecolor": PAPER},
}
"""Mark and colour of each verdict, safe for colour-blind eyes."""
ROW, HEADING = 0.24, 0.34
"""Inches of a difference and of a heading."""
LETTER = 0.07
"""Inches of a letter of either."""


def differences(outcomes: Outcomes, comparison: Comparison) -> Figure | None:
    """Paired differences in test accuracy, in points, arm minus against, grouped by family, the gaps first.

    Thick: simultaneous 95 % interval for new seeds on these test images. Thin: for new images too. Shaded: the margin.
    None where no two arms can be compared.
    """
    table = forest(comparison.arms, comparison.differences)
    table = table[table["points"].notna()]
    if table.empty:
        return None
    groups = [(str(family), rows) for family, rows in table.groupby("family", sort=False)]
    inches = ROW * len(table) + HEADING * len(groups)
    label = max(len(pair["label"] + _minus(pair)) for pair in table.to_dict("records"))
    heading = max(len(_words(family, rows)) for family, rows in groups)
    figure = blank(max(8.0, 0.6 + LETTER * (label + max(heading, 50))), 1.1 + inches)
    axes = figure.add_subplot()
    ticks, height = {}, 0.0
    for family, rows in groups:
        height -= HEADING / ROW
        _heading(axes, height, _words(family, rows))
        top = height
        for pair in rows.to_dict("records"):
            height -= 1
            ticks[height] = pair["label"] + _minus(pair)
            _draw(axes, height, pair)
        margin = float(rows["margin"].iloc[0])
        axes.fill_betweenx([height - 0.5, top - 0.5], -margin, margin, color=PALE, alpha=0.35, linewidth=0, zorder=0)
    axes.axvline(0, color=INK, linewidth=1, zorder=1)
    axes.set_yticks(list(ticks), list(ticks.values()))
    axes.set_ylim(height - 0.7, 0)
    axes.set_xlim(*_limits(table))
    axes.set_xlabel("difference in test accuracy (points)")
    dress(axes, grid="x")
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    _legend(figure, table)
    return figure


def _minus(pair: dict[Any, Any]) -> str:
    against = pair["against_label"]
    if pair["against_study"] != pair["study"]:
        against = f"{against} of {pair['against_study']}"
    return f" \N{MINUS SIGN} {against}"


def _words(family: str, rows: pd.DataFrame) -> str:
    kind, _, which = family.partition(" ")
    words = f"{which.replace(' for ', ' instead of ')}" if kind == "switch" else KINDS[kind]
    words += f" ({which.removeprefix('of ')})" if which and kind != "switch" else ""
    return f"{words[:1].upper()}{words[1:]}, n = {_seeds(rows['n'])} seeds"


def _heading(axes: Axes, height: float, words: str) -> None:
    axes.annotate(words, (0, height), xycoords=("axes fraction", "data"), xytext=(3, 0), textcoords="offset points",
                  va="center", fontsize=SMALL + 0.5, fontweight="bold", color=INK)  # fmt: skip


def _seeds(n: pd.Series) -> str:
    return f"{n.min()}" if n.min() == n.max() else f"{n.min()} to {n.max()}"


def _draw(axes: Axes, height: float, pair: dict[Any, Any]) -> None:
    look = VERDICT[pair["verdict"]]
    for low, high, width in (("images_low", "images_high", 0.9), ("low", "high", 2.6)):
        axes.plot([pair[low], pair[high]], [height, height], color=look["color"], linewidth=width,
                  solid_capstyle="butt")  # fmt: skip
    axes.plot(pair["points"], height, linestyle="none", markersize=6.5, markeredgewidth=1.2, zorder=3, **look)


def _limits(table: pd.DataFrame) -> tuple[float, float]:
    """Room for every dot, 0 and the margin; of intervals up to three times that, as those of few seeds are long."""
    margin = float(table["margin"].max())
    least, most = min(-margin, table["points"].min()), max(margin, table["points"].max())
    room = most - least
    low, high = table["low"].min(), table["high"].max()
    return max(least - room, min(least, low)) - 0.05 * room, min(most + room, max(most, high)) + 0.05 * room


def _legend(figure: Figure, table: pd.DataFrame) -> None:
    there = set(table["verdict"])
    handles: list[Any] = [
        Line2D([], [], linestyle="none", markersize=6.5, label=name, **look)
        for name, look in VERDICT.items()
        if name in there
    ]
    handles.append(Patch(color=PALE, alpha=0.35, label=f"within {_margins(table['margin'])} points"))
    figure.legend(handles=handles, loc="outside lower center", ncols=5, frameon=False, fontsize=SMALL, labelcolor=INK)


def _margins(margins: pd.Series) -> str:
    return " or ".join(f"{margin:g}" for margin in sorted(margins.unique()))
