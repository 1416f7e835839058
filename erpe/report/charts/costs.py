"""Figures of what accuracy costs: against time, FLOPs and parameters, and attention's FLOPs against tokens."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, MaxNLocator, NullFormatter

from erpe.config import ModelConfig, defaults
from erpe.datasets import DATASETS
from erpe.model.flops import attention_cost
from erpe.model.kernels import faster_method
from erpe.report.charts.intervals import interval
from erpe.report.charts.style import (
    COLOURS,
    INK,
    PALE,
    SMALL,
    Mark,
    blank,
    direct_labels,
    dress,
    legend_height,
    legend_of,
    marks,
)
from erpe.report.comparison import Comparison
from erpe.report.outcomes import Outcomes
from erpe.report.ranks import pareto_front

COSTS = {
    "time/inference_ms_per_image": "inference (ms an image, full batch)",
    "time/train_seconds_per_epoch": "training (s an epoch)",
    "flops/forward": "FLOPs of a forward pass (an image)",
    "params": "trainable parameters",
}
"""Measure -> what its axis says."""

SIDES = range(4, 65)
"""Square grids of 16 to 4096 tokens."""
TICKS = (16, 64, 256, 1024, 4096)


def tradeoffs(outcomes: Outcomes, comparison: Comparison) -> Figure | None:
    """Test accuracy against each of `COSTS`, means over seeds with 95 % intervals, and the Pareto front: the arms that
    none beats in both. The arms on a front are named where there is room. None without confirmed runs.
    """
    accuracy = interval(comparison, "test/accuracy")
    costs = {name: table for name in COSTS if not (table := interval(comparison, name)).empty}
    shown = {arm: mark for arm, mark in marks(outcomes.arms).items() if arm in accuracy.index}
    if not costs or not shown:
        return None
    columns = min(2, len(costs))
    width = 4.75 * columns
    figure = blank(width, 3.2 * math.ceil(len(costs) / columns) + legend_height(shown, width))
    panels = figure.subplots(math.ceil(len(costs) / columns), columns, squeeze=False, sharey=True).flatten()
    fronts = {}
    for axes, (name, cost) in zip(panels, costs.items(), strict=False):
        both = accuracy.join(cost.add_suffix("_cost"), how="inner").reindex([arm for arm in shown if arm in cost.index])
        fronts[axes] = both, *_panel(axes, both, shown)
        axes.set_xlabel(COSTS[name])
        if not name.startswith("time/"):  # "200 m" ms would be no help
            axes.xaxis.set_major_formatter(EngFormatter(sep="\N{THIN SPACE}"))
        axes.set_xlim(*_reach(fronts[axes][0], "_cost"))
        dress(axes)
    low, high = _reach(accuracy.loc[list(shown)], "")
    panels[0].set_ylim(low, min(high, 1.0))
    for axes in panels[len(costs) :]:
        axes.set_axis_off()
    for axes in figure.axes[::columns]:
        axes.set_ylabel("test accuracy", fontsize=SMALL + 1)
    legend_of(figure, shown)
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # names must not move what they were placed by
    for axes, (both, front, lines) in fronts.items():
        points = {arm: (both.loc[arm, "mean_cost"], both.loc[arm, "mean"]) for arm in front}
        direct_labels(axes, points, lines)
    return figure


def _panel(axes: Axes, both: pd.DataFrame, shown: dict[str, Mark]) -> tuple[list[str], list[Line2D]]:
    """Draw one panel.

    Args:
        both: index arm; `mean`, `low`, `high` of accuracy, and the same with `_cost`.
    Returns:
        The arms on the front, and the lines that a name must not cover.
    """
    lines: list[Line2D] = []
    for arm, row in both.iterrows():
        mark = shown[str(arm)]
        thin: dict[str, Any] = {"color": mark.colour, "linewidth": 0.9, "alpha": 0.4}
        lines += axes.plot([row["mean_cost"]] * 2, [row["low"], row["high"]], **thin)
        lines += axes.plot([row["low_cost"], row["high_cost"]], [row["mean"]] * 2, **thin)
        lines += axes.plot(row["mean_cost"], row["mean"], linestyle="none", zorder=3, clip_on=False, **mark.dot(7))
    front = both[pareto_front(both["mean_cost"], both["mean"])].sort_values("mean_cost")
    steps = np.repeat(front["mean_cost"], 2)[1:], np.repeat(front["mean"], 2)[:-1]
    lines += axes.plot(*steps, color=PALE, linewidth=1.2, zorder=1)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    return [str(arm) for arm in front.index], lines


def _reach(table: pd.DataFrame, which: str) -> tuple[float, float]:
    """Limits of an axis that show every point, and of the intervals what lies within half of the points' range: those
    of few seeds are so long that the points would be one.
    """
    means, ends = table[f"mean{which}"], table[[f"{name}{which}" for name in ("low", "mean", "high")]].stack()
    room = (means.max() - means.min()) / 2 or ends.max() - ends.min() or abs(means.max()) / 10 or 1.0
    low, high = max(ends.min(), means.min() - room), min(ends.max(), means.max() + room)
    return low - 0.25 * room, high + 0.25 * room


def cost_against_tokens(outcomes: Outcomes, comparison: Comparison) -> Figure | None:
    """Closed-form FLOPs of one attention layer, all heads, forward, against the number of tokens: a panel for each
    linear attention, softmax in each, and a mark where the linear one becomes cheaper. None without a linear one.

    The layer has the default width and heads of the data set.
    """
    arms = outcomes.arms.drop_duplicates("variant").assign(arm=lambda table: table["variant"])
    shown = marks(arms)
    linear = list(dict.fromkeys(mark.attention for mark in shown.values() if mark.attention != "softmax"))
    if not linear:
        return None
    dataset = str(outcomes.arms["dataset"].iloc[0])
    softmax = layer_flops("softmax", dataset)
    figure = blank(4.6 * len(linear) + 0.4, 4.0)
    for axes, attention in zip(figure.subplots(1, len(linear), squeeze=False, sharey=True)[0], linear, strict=True):
        axes.plot(*softmax.T, color=COLOURS["softmax"], linewidth=2.2, label="softmax")
        for variant, mark in shown.items():
            if mark.attention == attention:
                name = variant + method_told(variant, dataset)
                _line(axes, name, layer_flops(variant, dataset), softmax, mark)
        axes.set(xscale="log", yscale="log", xlabel="tokens N", title=attention)
        axes.set_xticks(TICKS, labels=[str(n) for n in TICKS])
        axes.xaxis.set_minor_formatter(NullFormatter())
        dress(axes)
        axes.legend(frameon=False, fontsize=SMALL, labelcolor=INK, loc="upper left")
    figure.axes[0].set_ylabel("FLOPs of an attention layer", fontsize=SMALL + 1)
    return figure


def layer_flops(variant: str, dataset: str) -> np.ndarray:
    """(sides, 2): tokens N, and FLOPs of a forward pass of one attention layer, all heads, for one image."""
    base, table = _layer(variant, dataset), []
    for side in SIDES:
        config = base.replace({"image": (1, side, side), "patch": 1})
        table.append((side * side, attention_cost(config, side * side).forward))
    return np.array(table)


def method_told(variant: str, dataset: str) -> str:
    """How a general encoding on linear attention is computed at `SIDES`: ` (dense)`, ` (dense, fft from 3364)`;
    empty for the others, which have one way only.
    """
    config = _layer(variant, dataset)
    if config.attention == "softmax" or config.encoding != "general":
        return ""
    m, d = config.feature_count(config.head_dim), config.head_dim
    methods = {side * side: faster_method(side * side, m, d) if config.method == "auto" else config.method
               for side in SIDES}  # fmt: skip
    first, *others = dict.fromkeys(methods.values())
    starts = [f", {other} from {min(n for n in methods if methods[n] == other)}" for other in others]
    return f" ({first}{''.join(starts)})"


def _layer(variant: str, dataset: str) -> ModelConfig:
    return defaults(variant, dataset if dataset in DATASETS else next(iter(DATASETS))).model


def break_even(flops: np.ndarray, softmax: np.ndarray) -> float | None:
    """Return the N from which `flops` stay below `softmax`, both (sides, 2) as of `layer_flops`.

    None if that never comes.
    """
    ahead = np.log(softmax[:, 1] / flops[:, 1])  # positive where the linear one is cheaper
    if ahead[-1] <= 0:
        return None
    behind = np.flatnonzero(ahead <= 0)
    if not behind.size:
        return float(flops[0, 0])
    last, tokens = int(behind[-1]), np.log(flops[:, 0])
    part = -ahead[last] / (ahead[last + 1] - ahead[last])
    return math.exp(tokens[last] + part * (tokens[last + 1] - tokens[last]))


def _line(axes: Axes, name: str, flops: np.ndarray, softmax: np.ndarray, mark: Mark) -> None:
    even = break_even(flops, softmax)
    told = f"cheaper from N = {even:.0f}" if even else f"never cheaper up to {flops[-1, 0]:.0f}"
    every = range(0, len(flops), 12)
    axes.plot(*flops.T, label=f"{name}: {told}", **mark.line(markersize=3.5, markevery=list(every)))
    if even:
        height = np.exp(np.interp(math.log(even), np.log(softmax[:, 0]), np.log(softmax[:, 1])))
        axes.plot(even, height, **mark.dot(9), zorder=4)
