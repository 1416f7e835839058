"""The figure of what an attention layer costs, in closed form, against the number of its tokens."""

from __future__ import annotations

import math

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from erpe.config import ModelConfig, defaults
from erpe.datasets import DATASETS
from erpe.model.flops import attention_cost
from erpe.model.kernels import exact_method
from erpe.report.charts.style import COLOURS, FULL, INK, SMALL, Mark, blank, dress, marks
from erpe.report.comparison import Comparison
from erpe.report.labels import ATTENTION, ENCODING
from erpe.report.outcomes import Outcomes

SIDES = range(4, 65)
"""Square grids of 16 to 4096 tokens."""
TICKS = (16, 64, 256, 1024, 4096)


def cost_against_tokens(outcomes: Outcomes, comparison: Comparison) -> Figure | None:
    """Draw closed-form FLOPs of one attention layer, all heads, forward, against the number of tokens: a panel for each
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
    figure = blank(FULL, 4.2)
    for axes, attention in zip(figure.subplots(1, len(linear), squeeze=False, sharey=True)[0], linear, strict=True):
        axes.plot(*softmax.T, color=COLOURS["softmax"], linewidth=2.2, label="softmax")
        for variant, mark in shown.items():
            if mark.attention == attention:
                name = ENCODING[mark.encoding] + method_told(variant, dataset)
                _line(axes, name, layer_flops(variant, dataset), softmax, mark)
        axes.set(xscale="log", yscale="log", xlabel="tokens N", title=ATTENTION[attention])
        axes.set_xticks(TICKS, labels=[str(n) for n in TICKS])
        axes.xaxis.set_minor_formatter(NullFormatter())
        dress(axes)
        axes.legend(frameon=False, fontsize=SMALL - 0.5, labelcolor=INK, loc="upper center",
                    bbox_to_anchor=(0.45, -0.2), handlelength=1.8)  # fmt: skip
    figure.axes[0].set_ylabel("FLOPs of an attention layer", fontsize=SMALL)
    return figure


def layer_flops(variant: str, dataset: str) -> np.ndarray:
    """(sides, 2): tokens N, and FLOPs of a forward pass of one attention layer, all heads, for one image."""
    base, table = _layer(variant, dataset), []
    for side in SIDES:
        config = base.replace({"image": (1, side, side), "patch": 1})
        table.append((side * side, attention_cost(config, side * side).forward))
    return np.array(table)


def method_told(variant: str, dataset: str) -> str:
    """Tell how a general encoding on linear attention is computed at `SIDES`: ` (dense)`, ` (dense, fft from 3364)`;
    empty for the others, which have one way only.
    """
    config = _layer(variant, dataset)
    if config.attention == "softmax" or config.encoding != "general":
        return ""
    m, d = config.feature_count(config.head_dim), config.head_dim
    methods = {side * side: exact_method(config.method, side * side, m, d) for side in SIDES}
    first, *others = dict.fromkeys(methods.values())
    starts = [f", {other} from {min(n for n in methods if methods[n] == other)}" for other in others]
    return f" ({first}{''.join(starts)})"


def _layer(variant: str, dataset: str) -> ModelConfig:
    return defaults(variant, dataset if dataset in DATASETS else next(iter(DATASETS))).model


def break_even(flops: np.ndarray, softmax: np.ndarray) -> float | None:
    """Return the N from which `flops` stay below `softmax`, both (sides, 2) as of `layer_flops`, if there is one."""
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
    told = f"cheaper from N = {even:.0f}" if even else "never cheaper"
    every = range(0, len(flops), 12)
    axes.plot(*flops.T, label=f"{name}: {told}", **mark.line(markersize=3.5, markevery=list(every)))
    if even:
        height = np.exp(np.interp(math.log(even), np.log(softmax[:, 0]), np.log(softmax[:, 1])))
        axes.plot(even, height, **mark.dot(9), zorder=4)
