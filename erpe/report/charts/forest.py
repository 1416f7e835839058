"""The forest plot: every paired difference that is tested, with its simultaneous interval, margin and verdict."""

from __future__ import annotations

from textwrap import wrap
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from erpe.report.charts.legends import legend_below
from erpe.report.charts.style import COLUMN, FULL, GREY, INK, PALE, PAPER, SMALL, blank, dress
from erpe.report.comparison import Comparison
from erpe.report.labels import labels_of, names, switched
from erpe.report.outcomes import Outcomes
from erpe.report.pairing import KEY, KINDS
from erpe.report.statistics import ACCURACY
from erpe.text import counted

VERDICT: dict[str, dict[str, Any]] = {
    "better": {"marker": ">", "color": "#0072b2"},
    "worse": {"marker": "<", "color": "#d55e00"},
    "equivalent": {"marker": "s", "color": "#009e73"},
    "undecided": {"marker": "o", "color": GREY, "markerfacecolor": PAPER},
}
"""Mark and colour of each verdict, safe for colour-blind eyes."""
ROW, HEADING = 0.19, 0.28
"""Inches of a difference and of a heading."""
COLUMNS = {
    "difference": "points", "all_low": "low", "all_high": "high", "images_low": "images_low",
    "images_high": "images_high", "margin": "margin",
}  # fmt: skip
"""Of `statistics.differences` -> of `forest`; in points of accuracy."""


def forest(comparison: Comparison) -> pd.DataFrame:
    """Return the differences that tests are about, grouped by family, the gaps first.

    Returns:
        A row a pair: `study`, `dataset`, `arm`, `against_study`, `against`, `kind`, `family`, `label` (`ReLU + RoPE (no
        positions)`), `against_label`, `name` (`ReLU + RoPE`, where the family is told), `shared` (`no positions`, the
        switches of both), `points` (arm minus against), `low`, `high` (simultaneous 95 % interval for new seeds),
        `images_low`, `images_high` (for new images too), `margin` (points), `verdict`, `preliminary`, `n`.
    """
    variants = dict(zip(comparison.arms["arm"], comparison.arms["variant"], strict=True))
    table = comparison.differences[comparison.differences["measure"] == ACCURACY]
    order = {kind: place for place, kind in enumerate(KINDS)}
    table = table.iloc[table["kind"].map(order).argsort(kind="stable")]
    called = [names(pair, variants) for pair in table.to_dict("records")]
    labels = labels_of(comparison.arms)
    found = table.assign(
        label=table["arm"].map(labels), against_label=table["against"].map(labels), name=[pair.arm for pair in called],
        shared=[pair.shared for pair in called], **{new: 100 * table[old] for old, new in COLUMNS.items()},
    )  # fmt: skip
    wanted = [*KEY, "against_study", "against", "kind", "family", "label", "against_label", "name", "shared"]
    return found[[*wanted, *COLUMNS.values(), "verdict", "preliminary", "n"]].reset_index(drop=True)


def differences(outcomes: Outcomes, comparison: Comparison, width: float = FULL) -> Figure | None:
    """Draw paired differences in test accuracy, in points, arm minus against, grouped by family, the gaps first.

    Thick: simultaneous 95 % interval for new seeds on these test images. Thin: for new images too. Shaded: the margin.
    None where no two arms can be compared.
    """
    table = forest(comparison)
    table = table[table["points"].notna()]
    if table.empty:
        return None
    groups = [
        (wrap(_words(str(family), rows), int(15 * width)), rows) for family, rows in table.groupby("family", sort=False)
    ]
    inches = ROW * len(table) + sum(_inches(heading) for heading, _ in groups)
    figure = blank(width, (1.1 if width > COLUMN else 1.5) + inches)
    axes = figure.add_subplot()
    ticks, height, limits = {}, 0.0, _limits(table)
    for heading, rows in groups:
        height -= _inches(heading) / ROW
        _heading(axes, height + (_inches(heading) - HEADING) / 2 / ROW, heading)
        top = height
        for pair in rows.to_dict("records"):
            height -= 1
            ticks[height] = _name(pair)
            _draw(axes, height, pair, limits)
        margin = float(rows["margin"].iloc[0])
        axes.fill_betweenx([height - 0.5, top - 0.5], -margin, margin, color=PALE, alpha=0.35, linewidth=0, zorder=0)
    axes.axvline(0, color=INK, linewidth=1, zorder=1)
    axes.set_yticks(list(ticks), list(ticks.values()))
    axes.set_ylim(height - 0.7, 0)
    axes.set_xlim(*limits)
    axes.set_xlabel("difference in test accuracy (points)" if width > COLUMN else "difference (points)")
    dress(axes, grid="x")
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    _legend(figure, table)
    return figure


def _name(pair: dict[Any, Any]) -> str:
    """`ReLU + RoPE`: the heading tells what it is compared with."""
    of = f" \N{MINUS SIGN} that of {pair['against_study']}" if pair["against_study"] != pair["study"] else ""
    return f"{pair['name']}{of}"


def _words(family: str, rows: pd.DataFrame) -> str:
    kind, _, which = family.partition(" ")
    words, shared = KINDS[kind], rows["shared"].iloc[0]
    if kind == "switch":
        new, old = (switched(frozenset(value.split(", "))) for value in which.split(" for "))
        words = f"{new} instead of {old}"
    words += f" ({shared})" if shared else ""
    return f"{words[:1].upper()}{words[1:]}, {_seeds(rows['n'])}"


def _inches(heading: list[str]) -> float:
    return HEADING + 0.14 * (len(heading) - 1)


def _heading(axes: Axes, height: float, lines: list[str]) -> None:
    note = axes.annotate(
        "\n".join(lines), (0.005, height), xycoords=("figure fraction", "data"), va="center", fontsize=SMALL,
        fontweight="bold", color=INK, annotation_clip=False,
    )  # fmt: skip
    note.set_bbox({"facecolor": PAPER, "edgecolor": "none", "pad": 1})
    note.set_in_layout(False)  # it may be longer than the names of the rows


def _seeds(n: pd.Series) -> str:
    return counted(int(n.min()), "seed") if n.min() == n.max() else f"{n.min()} to {counted(int(n.max()), 'seed')}"


def _draw(axes: Axes, height: float, pair: dict[Any, Any], limits: tuple[float, float]) -> None:
    """Draw mark and intervals; an arrow stands where one of these goes on outside of the limits."""
    look = VERDICT[pair["verdict"]]
    for low, high, width in (("images_low", "images_high", 0.9), ("low", "high", 2.6)):
        axes.plot([pair[low], pair[high]], [height, height], color=look["color"], linewidth=width,
                  solid_capstyle="butt")  # fmt: skip
    for end, marker, ends in ((limits[0], "<", ("low", "images_low")), (limits[1], ">", ("high", "images_high"))):
        beyond = [pair[name] < end if marker == "<" else pair[name] > end for name in ends]
        if any(beyond):
            axes.annotate("", (end, height), (7 if marker == "<" else -7, 0), textcoords="offset points",
                          arrowprops={"arrowstyle": "->", "color": look["color"], "linewidth": 1.4})  # fmt: skip
    axes.plot(pair["points"], height, linestyle="none", markersize=6, markeredgewidth=1.2, zorder=3, **look)


def _limits(table: pd.DataFrame) -> tuple[float, float]:
    """Room for every dot, 0 and the margin; of intervals up to three times that, as those of few seeds are long."""
    margin = float(table["margin"].max())
    least, most = min(-margin, table["points"].min()), max(margin, table["points"].max())
    room = most - least
    low, high = table[["low", "images_low"]].min(axis=None), table[["high", "images_high"]].max(axis=None)
    return max(least - room, min(least, low)) - 0.05 * room, min(most + room, max(most, high)) + 0.05 * room


def _legend(figure: Figure, table: pd.DataFrame) -> None:
    there = {name: look for name, look in VERDICT.items() if name in set(table["verdict"])}
    handles: list[Any] = [
        Line2D([], [], linestyle="none", markersize=6.5, label=name, **look) for name, look in there.items()
    ]
    margins = " or ".join(f"{margin:g}" for margin in sorted(table["margin"].unique()))
    handles.append(Patch(color=PALE, alpha=0.35, label=f"within {margins} points"))
    legend_below(figure, handles, columns=5 if figure.get_figwidth() > COLUMN else 2)
