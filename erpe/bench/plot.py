"""The figure of `erpe bench layer`: time and memory of a token against N, and where a layer overtakes torch's SDPA."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.ticker import NullLocator

from erpe.bench.layers import SDPA, THEIRS
from erpe.report.charts.style import INK, PALE, SMALL, blank, dress, marks
from erpe.report.charts.tokens import break_even
from erpe.variants import ATTENTIONS, VARIANTS, split_variant

PANELS = {
    ("forward", "ms"): "forward, µs a token",
    ("step", "ms"): "forward and backward,\nµs a token",
    ("step", "peak_mib"): "peak of forward and\nbackward, KiB a token",
}
"""(pass, number) of a row -> what its axis says."""

BETTER = {"ms": "faster", "peak_mib": "smaller"}


def costs_of_layers(found: dict[str, Any]) -> Figure:
    """Rows: forward, training step, its memory. Columns: an attention each, torch's SDPA in all of them.

    A token's share is drawn: a flat line grows linearly with N, a rising one faster. A greater mark on the line of SDPA
    without bias is where a layer of linear attention overtakes it.
    """
    table = pd.DataFrame(found["rows"])
    table = table[table["n"] > 0]
    scale = {"ms": 1e3, "peak_mib": 1024.0}
    for number, factor in scale.items():
        table[number] = factor * table[number].astype(float) / (table["batch"] * table["tokens"])
    present = [name for name in table["name"].unique() if name in VARIANTS]
    columns = [each for each in ATTENTIONS if any(split_variant(name)[0] == each for name in present)]
    figure = blank(3.4 * len(columns) + 0.6, 2.5 * len(PANELS) + 1.2)
    panels = figure.subplots(len(PANELS), len(columns), squeeze=False, sharex=True, sharey="row")
    for row, ((what, number), label) in zip(panels, PANELS.items(), strict=True):
        lines = {
            str(name): group.sort_values("tokens")[["tokens", number]].to_numpy()
            for name, group in table[table["pass"] == what].groupby("name", sort=False)
        }
        for axes, attention in zip(row, columns, strict=True):
            _panel(axes, lines, attention, BETTER[number])
        row[0].set_ylabel(label, fontsize=SMALL + 1)
    for axes, attention in zip(panels[0], columns, strict=True):
        axes.set_title(attention, fontsize=SMALL + 2, color=INK)
    for axes in panels[-1]:
        axes.set_xlabel("tokens N", fontsize=SMALL + 1)
        drawn = {line.get_label(): line for line in axes.lines if not str(line.get_label()).startswith("_")}
        axes.legend(
            drawn.values(), drawn.keys(), frameon=False, fontsize=SMALL - 0.5, labelcolor=INK, ncols=2,
            loc="upper center", bbox_to_anchor=(0.5, -0.36),
        )  # fmt: skip
    return figure


def _panel(axes: Axes, lines: dict[str, np.ndarray], attention: str, better: str) -> None:
    """Draw SDPA and the layers of an attention.

    Args:
        lines: name -> (n, 2): N, and what a token costs.
        better: than SDPA, in a word.
    """
    axes.plot(*lines[SDPA].T, color=INK, linewidth=2.2, label=SDPA)
    axes.plot(*lines[f"{SDPA}, bias"].T, color=INK, linewidth=1.2, linestyle=(0, (5, 1.5)), label=f"{SDPA}, bias")
    variants = [name for name in lines if name in VARIANTS and split_variant(name)[0] == attention]
    arms = pd.DataFrame([(v, v, *split_variant(v)) for v in variants], columns=["arm", "variant", *_PARTS])
    overtaking = []
    for variant, mark in marks(arms).items():
        axes.plot(*lines[variant].T, label=variant, **mark.line(markersize=3.5))
        even = break_even(lines[variant], _at(lines[SDPA], lines[variant])) if attention != "softmax" else None
        if even:
            height = np.exp(np.interp(math.log(even), *np.log(lines[SDPA]).T))
            overtaking += axes.plot(even, height, **mark.dot(9), zorder=4, linestyle="none", label=f"_{even:.0f}")
    if f"{THEIRS}, {attention}" in lines:
        line = lines[f"{THEIRS}, {attention}"]
        axes.plot(*line.T, color=PALE, marker="x", markersize=4, linewidth=1.4, label=THEIRS)
    axes.set(xscale="log", yscale="log")
    ticks = [int(n) for n in lines[SDPA][:, 0]]
    axes.set_xticks(ticks, labels=[str(n) for n in ticks], rotation=45)
    axes.xaxis.set_minor_locator(NullLocator())
    dress(axes)
    if overtaking:
        told = [str(point.get_label()).removeprefix("_") for point in overtaking]
        note = Legend(
            axes, overtaking, told, title=f"{better} from N =", title_fontsize=SMALL - 1, fontsize=SMALL - 1,
            frameon=False, labelcolor=INK, loc="upper left", markerscale=0.6, handletextpad=0.2, ncols=2,
        )  # fmt: skip
        axes.add_artist(note)  # beside the legend of names


_PARTS = ("attention", "encoding")


def _at(reference: np.ndarray, line: np.ndarray) -> np.ndarray:
    """Return the rows of a reference at the N that a line has: at the greatest there may have been no room for it."""
    return reference[np.isin(reference[:, 0], line[:, 0])]
