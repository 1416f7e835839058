"""How an arm looks, the same in every figure: colour and filling are the attention, marker and dashes the encoding.

Where arms share a variant (`relu_rope-patch2`, `relu_rope-patch4`) the filling is the switch instead. Figures are as
wide as a column of a paper, or as both, and their text has 8 points.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from erpe.report.labels import ATTENTION, label, switched
from erpe.report.pairing import switches
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
"""In `FILLS`, where no arms share a variant: without colours, too, one sees the attention."""
EDGED = ("full", "left", "top", "right", "bottom")
"""For the seventh switch and those after it, whose markers have a dark edge."""

NO_LINE: dict[str, Any] = {"linestyle": "none"}

INK, PALE, PAPER = "#222222", "#b0b0b0", "#fefefe"
"""Text and axes, grid and context, background. The page swaps exactly these colours in the dark."""
GREY = "#7a7a7a"
"""Of marks that belong to no attention; seen on light and on dark."""

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
    switch: str
    """`no positions`, or nothing."""

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
    shared = once["variant"].duplicated().any()
    values = list(dict.fromkeys(switches(row.arm, row.variant) for row in once.itertuples())) if shared else []
    for row in sorted(once.itertuples(), key=place):
        colour = COLOURS.get(row.attention, OTHER_COLOUR)
        switch = switches(row.arm, row.variant)
        turn = values.index(switch) if shared else 0
        found[row.arm] = Mark(
            row.attention,
            row.encoding,
            colour,
            shapes[row.encoding],
            DASHES.get(row.encoding, "-"),
            _fill(turn, 0 if shared else FIRST_FILL.get(row.attention, 0)),
            INK if turn % len(FILLS + EDGED) >= len(FILLS) else colour,
            label(row.arm, row.variant),
            switched(switch),
        )
    return found


def _fill(turn: int, first: int) -> str:
    """Of the `turn`-th value of a switch."""
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


def _index(known: Sequence[str], name: str) -> int:
    return known.index(name) if name in known else len(known)
