"""How marks get their names: by a legend below the figure, or by a text beside each."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Annotation
from matplotlib.transforms import Bbox

from erpe.report.charts.style import GREY, INK, NO_LINE, SMALL, Mark
from erpe.report.labels import ENCODING


def legend_of(figure: Figure, shown: Mapping[str, Mark], line: bool = False) -> None:
    """Name the marks of a figure with a panel an attention, below it: see `_entries`."""
    handles, columns = _entries(shown, figure.get_figwidth(), line)
    legend_below(figure, handles, columns)


def legend_below(figure: Figure, handles: list[Any], columns: int) -> None:
    """Below the figure, in so many columns."""
    look: Any = {"frameon": False, "fontsize": SMALL, "labelcolor": INK}
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, **look)


def legend_height(shown: Mapping[str, Mark], width: float) -> float:
    """Inches that `legend_of` takes below a figure of that width."""
    handles, columns = _entries(shown, width, False)
    return 0.2 + 0.165 * math.ceil(len(handles) / columns)


def by_switch(shown: Mapping[str, Mark]) -> bool:
    """Whether the filling of markers is a switch, so that a legend can tell encodings and switches apart."""
    return len({mark.switch for mark in shown.values()}) > 1


def _entries(shown: Mapping[str, Mark], width: float, line: bool) -> tuple[list[Line2D], int]:
    """Entries of a legend, column by column, and the number of columns: every arm once, a column an attention where the
    names leave room; or of arms with switches the encodings, and beside them the switches.
    """
    if by_switch(shown):
        return _factors(shown, width, line)
    attentions = list(dict.fromkeys(mark.attention for mark in shown.values()))
    groups = [[mark for mark in shown.values() if mark.attention == name] for name in attentions]
    fit = _columns([mark.label for mark in shown.values()], width)
    rows = max(map(len, groups), default=0) if 1 < len(groups) <= fit else 0
    named = [_filled([_entry(mark, mark.label, line) for mark in group], rows) for group in groups]
    return list(itertools.chain(*named)), len(groups) if rows else fit


def _factors(shown: Mapping[str, Mark], width: float, line: bool) -> tuple[list[Line2D], int]:
    encodings, switches = dict[str, Line2D](), dict[str, Line2D]()
    for mark in shown.values():
        grey = mark._replace(colour=GREY, edge=INK if mark.edge == INK else GREY)
        name = "no encoding" if mark.encoding == "none" else ENCODING[mark.encoding]
        encodings.setdefault(name, _entry(grey, name, line))
        value = mark.switch or "no switch"
        switches.setdefault(value, _entry(grey._replace(marker="o"), value, line=False))
    fit = max(2, _columns([*encodings, *switches], width))
    sizes = len(encodings), len(switches)
    rows = next(rows for rows in itertools.count(1) if sum(-(-size // rows) for size in sizes) <= fit)
    entries = [*_filled(list(encodings.values()), rows), *_filled(list(switches.values()), rows)]
    return entries, len(entries) // rows


def _filled(entries: list[Line2D], rows: int) -> list[Line2D]:
    """Fill the last column of `rows` with nothing."""
    return entries + [Line2D([], [], label=" ", **NO_LINE) for _ in range(-len(entries) % rows if rows else 0)]


def _columns(names: Sequence[str], width: float) -> int:
    """How many columns of a legend with these names fit into so many inches."""
    return max(1, int(width / (0.075 * max(map(len, names), default=1) + 0.5)))


def _entry(mark: Mark, name: str, line: bool) -> Line2D:
    return Line2D([], [], label=name, **(mark.line() if line else NO_LINE | mark.dot()))


def direct_labels(axes: Axes, points: Mapping[str, tuple[float, float]], lines: Sequence[Line2D]) -> list[Annotation]:
    """Name points beside their markers where there is room: no name covers another or a line, or leaves the axes.

    A point whose name fits nowhere stays without: is the list shorter, a legend is needed. Call it when limits and
    layout are final.

    Args:
        points: name -> (x, y) in data.
        lines: markers and lines that no name may cover.
    """
    figure = axes.get_figure(root=True)
    assert figure is not None
    renderer = FigureCanvasAgg(figure).get_renderer()
    inside = axes.get_window_extent(renderer)
    taken = [box for line in lines for box in _boxes(line, figure.dpi / 72)]
    placed = []
    for arm, point in points.items():
        name = axes.annotate(arm, point, xytext=(0, 0), textcoords="offset points", fontsize=SMALL - 1, color=INK)
        for across, up in _PLACES:
            name.set(ha="left" if across > 0 else "right" if across < 0 else "center")
            name.set(va="bottom" if up > 0 else "top" if up < 0 else "center")
            name.xyann = (across, up)
            box = name.get_window_extent(renderer)
            within = inside.x0 <= box.x0 and box.x1 <= inside.x1 and inside.y0 <= box.y0 and box.y1 <= inside.y1
            if within and not any(box.overlaps(other) for other in taken):
                taken.append(box)
                placed.append(name)
                break
        else:
            name.remove()
    return placed


def _boxes(line: Line2D, scale: float) -> list[Bbox]:
    """Return what a line of horizontal and vertical parts, and its marker, cover in pixels; `scale` pixels a point."""
    path = np.asarray(line.get_transform().transform_path(line.get_path()).vertices)  # (corners, 2)
    reach = (line.get_markersize() / 2 if line.get_marker() not in ("None", None, "") else 1.0) * scale
    ends = itertools.pairwise(path) if len(path) > 1 else [(path[0], path[0])]
    return [Bbox([np.minimum(*both) - reach, np.maximum(*both) + reach]) for both in ends]


_AROUND = ((1, 0), (-1, 0), (0.7, 1), (-0.7, 1), (0.7, -1), (-0.7, -1), (0, 1), (0, -1))
_PLACES = [(reach * x, reach * y) for reach in (5, 8, 12, 17) for x, y in _AROUND]
"""Offsets in points, the nearest first."""
