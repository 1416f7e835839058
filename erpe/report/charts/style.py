"""How an arm looks, the same in every figure: colour and filling are the attention, marker and dashes the encoding.

Arms that share a variant (`relu_rope-patch2`, `relu_rope-patch4`) differ in how their marker is filled. Figures are as
wide as a column of a paper, or as both, and their text has 8 points.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Annotation
from matplotlib.transforms import Bbox

from erpe.report.labels import ATTENTION, label
from erpe.variants import ATTENTIONS, ENCODINGS

COLOURS = {"softmax": "#0072b2", "favor": "#d55e00", "relu": "#009e73"}
"""Blue, vermilion and bluish green of Okabe and Ito."""
OTHER_COLOUR = "#cc79a7"
MARKERS = {"none": "o", "general": "s", "circulant": "^", "rope": "D"}
OTHER_MARKERS = ("X", "P", "v", "*", "p", "h")
"""Of the encodings of plug-ins, in the order of the arms."""
DASHES: dict[str, Any] = {
    "none": "-",
    "general": (0, (5, 1.5)),
    "circulant": (0, (4, 1.5, 1, 1.5)),
    "rope": (0, (1, 1)),
}
FILLS = ("full", "none", "left", "top", "right", "bottom")
FIRST_FILL = {"softmax": 0, "favor": 1, "relu": 2}
"""Of the first arm of a variant, in `FILLS`: without colours, too, one sees the attention."""
EDGED = ("full", "left", "top", "right", "bottom")
"""For the seventh arm of a variant and those after it, whose markers have a dark edge."""

NO_LINE: dict[str, Any] = {"linestyle": "none"}

INK, PALE, PAPER = "#222222", "#b0b0b0", "#fefefe"
"""Text and axes, grid and context, background. The page swaps exactly these colours in the dark."""

SMALL = 8.0
"""Points of the text in a figure."""
COLUMN, FULL = 3.3, 6.8
"""Inches of one and of both columns of a paper."""
FONTS = {"sans": ["DejaVu Sans"], "serif": ["STIXGeneral", "DejaVu Serif"]}
"""Of figures for a paper; matplotlib brings them."""


class Mark(NamedTuple):
    """What matplotlib needs to know of an arm."""

    attention: str
    encoding: str
    colour: str
    marker: str
    dashes: Any
    fill: str
    edge: str
    """Colour of the marker's edge."""
    label: str
    """What papers call the arm: `ReLU + RoPE`."""

    def line(self, **more: Any) -> dict[str, Any]:
        """Keywords of `Axes.plot` for a curve with markers."""
        return {"color": self.colour, "linestyle": self.dashes, "linewidth": 1.4, **self.dot(), **more}

    def dot(self, size: float = 6.0) -> dict[str, Any]:
        """Keywords of `Axes.plot` for a marker of `size` points."""
        inside = PAPER if self.fill == "none" else self.colour
        return {
            "marker": self.marker,
            "markersize": size * (0.85 if self.marker == "D" else 1.0),
            "fillstyle": "full" if self.fill == "none" else self.fill,
            "markerfacecolor": inside,
            "markerfacecoloralt": PAPER,
            "markeredgecolor": self.edge,
            "markeredgewidth": 1.1,
        }


def marks(arms: pd.DataFrame) -> dict[str, Mark]:
    """Arm -> mark, in the order in which figures list them: by attention, then encoding, then as given.

    Args:
        arms: with columns `arm`, `variant`, `attention`, `encoding`; an arm of several studies has one mark.
    """
    once = arms.drop_duplicates("arm")
    own = [name for name in once["encoding"].unique() if name not in MARKERS]
    shapes = MARKERS | {name: OTHER_MARKERS[i % len(OTHER_MARKERS)] for i, name in enumerate(own)}

    def place(row: Any) -> tuple[int, int]:
        return _index(ATTENTIONS, row.attention), _index(ENCODINGS, row.encoding)

    found: dict[str, Mark] = {}
    of_variant: dict[str, int] = {}
    for row in sorted(once.itertuples(), key=place):
        colour = COLOURS.get(row.attention, OTHER_COLOUR)
        turn = of_variant[row.variant] = of_variant.get(row.variant, -1) + 1
        found[row.arm] = Mark(
            row.attention,
            row.encoding,
            colour,
            shapes[row.encoding],
            DASHES.get(row.encoding, "-"),
            _fill(turn, FIRST_FILL.get(row.attention, 0)),
            INK if turn % len(FILLS + EDGED) >= len(FILLS) else colour,
            label(row.arm, row.variant),
        )
    return found


def _fill(turn: int, first: int) -> str:
    """Of the `turn`-th arm of a variant."""
    turn %= len(FILLS + EDGED)
    return FILLS[(turn + first) % len(FILLS)] if turn < len(FILLS) else EDGED[turn - len(FILLS)]


def blank(width: float, height: float) -> Figure:
    """Return an empty figure of that many inches, without pyplot."""
    return Figure(figsize=(width, height), layout="constrained", facecolor=PAPER)


def panels_of(
    shown: Mapping[str, Mark], rows: int, height: float, **share: Any
) -> tuple[Figure, np.ndarray, list[str]]:
    """Return a figure of both columns, its panels (rows, attentions), a column an attention, and the attentions."""
    attentions = list(dict.fromkeys(mark.attention for mark in shown.values()))
    figure = blank(FULL, height)
    panels = figure.subplots(rows, len(attentions), squeeze=False, **share)
    for axes, attention in zip(panels[0], attentions, strict=True):
        axes.set_title(ATTENTION[attention])
    for axes in panels.flat:
        dress(axes)
    return figure, panels, attentions


def dress(axes: Axes, grid: str = "both") -> None:
    """Apply the house look: two spines, a faint grid on `x`, `y`, `both` or no (`none`) axis, small text."""
    axes.set_facecolor("none")
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["bottom", "left"]].set_color(INK)
    axes.tick_params(labelsize=SMALL, colors=INK, which="both")
    if grid != "none":
        axes.grid(axis="both" if grid == "both" else "x" if grid == "x" else "y", color=PALE, alpha=0.4, linewidth=0.6)
    axes.set_axisbelow(True)
    for text in (axes.xaxis.label, axes.yaxis.label, axes.title):
        text.set(color=INK, fontsize=SMALL)


def legend_of(figure: Figure, shown: Mapping[str, Mark], line: bool = False) -> None:
    """Every arm once, below the figure; a column an attention where the names leave room."""
    names, columns = _legend_grid(shown, figure.get_figwidth())
    looks = {
        arm: {"label": mark.label} | (mark.line() if line else NO_LINE | mark.dot()) for arm, mark in shown.items()
    }
    nothing = NO_LINE | {"label": " "}
    legend_below(figure, [Line2D([], [], **looks.get(arm, nothing)) for arm in names], columns)


def legend_below(figure: Figure, handles: list[Any], columns: int) -> None:
    """Below the figure, in so many columns."""
    look: Any = {"frameon": False, "fontsize": SMALL, "labelcolor": INK}
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, **look)


def legend_height(shown: Mapping[str, Mark], width: float) -> float:
    """Inches that `legend_of` takes below a figure of that width."""
    names, columns = _legend_grid(shown, width)
    return 0.2 + 0.165 * math.ceil(len(names) / columns)


def _legend_grid(shown: Mapping[str, Mark], width: float) -> tuple[list[str], int]:
    """Names column by column, "" where nothing stands, and the number of columns."""
    fit = max(1, int(width / (0.075 * max((len(mark.label) for mark in shown.values()), default=1) + 0.5)))
    attentions = list(dict.fromkeys(mark.attention for mark in shown.values()))
    groups = [[arm for arm, mark in shown.items() if mark.attention == name] for name in attentions]
    if not 1 < len(groups) <= fit:
        return list(shown), fit
    rows = max(map(len, groups))
    return [name for group in groups for name in group + [""] * (rows - len(group))], len(groups)


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


def _index(known: Sequence[str], name: str) -> int:
    return known.index(name) if name in known else len(known)
