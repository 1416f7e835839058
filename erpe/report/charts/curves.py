"""Figures of how arms learn, and of what they look at."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from erpe.errors import StoreError
from erpe.io import read_arrays
from erpe.report.charts.legends import legend_height, legend_of
from erpe.report.charts.style import FULL, INK, PALE, SMALL, Mark, blank, marks, panels_of
from erpe.report.outcomes import Outcomes, goals_of
from erpe.study.objectives import drawn_as

ROW = 6
"""Most attention maps side by side."""


def learning_curves(outcomes: Outcomes) -> Figure | None:
    """Draw a column an attention. Above: first objective of each arm's best trial in the search, by epoch. Below:
    training loss (nats an image) of the confirmed runs, mean over seeds and a band from the lowest to the highest.

    The other attentions' curves are drawn pale behind, for comparison. None without epochs.
    """
    shown = marks(outcomes.arms)
    sought = drawn_as(goals_of(outcomes.arms).objectives[0])[1]
    above, below = best_trials(outcomes), confirmed_losses(outcomes.epochs)
    rows = [(f"{sought}\nof the best trial", above), ("training loss (nats)\nof the confirmed runs", below)]
    rows = [(label, curves) for label, curves in rows if not curves.empty]
    if not rows:
        return None
    present = {arm for _, curves in rows for arm in curves["arm"]}
    shown = {arm: mark for arm, mark in shown.items() if arm in present}
    height = 1.9 * len(rows) + legend_height(shown, FULL)
    figure, panels, attentions = panels_of(shown, len(rows), height, sharex="row", sharey="row")
    for line, (label, curves) in zip(panels, rows, strict=True):
        for axes, attention in zip(line, attentions, strict=True):
            _curves(axes, curves, shown, attention)
            axes.set_xlabel("epoch")
        line[0].set_ylabel(label)
    legend_of(figure, shown, line=True)
    return figure


def best_trials(outcomes: Outcomes) -> pd.DataFrame:
    """`arm`, `epoch`, `middle`: of the finished trial with the highest value of each arm, its first objective, by
    default validation accuracy (%).
    """
    trials, epochs, goals = outcomes.trials, outcomes.epochs, goals_of(outcomes.arms)
    if trials.empty or epochs.empty:
        return pd.DataFrame(columns=["arm", "epoch", "middle"])
    sign, key = goals.reported("search")
    done = trials[(trials["state"] == "COMPLETE") & trials["value"].notna()].sort_values("number", kind="stable")
    best = done.loc[done.groupby("arm", sort=False)["value"].idxmax(), ["arm", "uid"]]
    curves = epochs[epochs["phase"] == "search"].merge(best, on=["arm", "uid"]).dropna(subset=key)
    curves = curves.assign(middle=sign * drawn_as(goals.objectives[0])[0] * curves[key])
    return curves[["arm", "epoch", "middle"]].sort_values(["arm", "epoch"])


def confirmed_losses(epochs: pd.DataFrame) -> pd.DataFrame:
    """`arm`, `epoch`, `middle`, `low`, `high`: training loss over the seeds that have that epoch."""
    columns = {"middle": "mean", "low": "min", "high": "max"}
    if epochs.empty:
        return pd.DataFrame(columns=["arm", "epoch", *columns])
    losses = epochs[(epochs["phase"] == "confirm") & np.isfinite(epochs["train/loss"])]
    return losses.groupby(["arm", "epoch"])["train/loss"].agg(**columns).reset_index()


def _curves(axes: Axes, curves: pd.DataFrame, shown: Mapping[str, Mark], attention: str) -> None:
    for arm, mark in shown.items():
        own = curves[curves["arm"] == arm]
        if mark.attention != attention:
            axes.plot(own["epoch"], own["middle"], color=PALE, linewidth=0.8, alpha=0.6, zorder=1)
            continue
        often = max(1, len(own) // 8)
        axes.plot(own["epoch"], own["middle"], **mark.line(markersize=3.5, markevery=often, zorder=3))
        if "low" in own:
            axes.fill_between(own["epoch"], own["low"], own["high"], color=mark.colour, alpha=0.15, linewidth=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))


class Example(NamedTuple):
    """What `erpe.training.evaluate.save_attention_example` wrote."""

    image: np.ndarray
    """(channels, height, width) in [0, 1]."""
    weights: np.ndarray
    """(N, N) attention of the last block, heads averaged, patches only."""
    grid: tuple[int, int]
    """(h, w) patches."""


def attention_maps(outcomes: Outcomes) -> Figure | None:
    """Draw what one patch attends to in the last block, heads averaged, in multiples of uniform attention: a map an
    arm, all on the same image and from the same place, a row an attention. None without attention files.
    """
    examples = attention_examples(outcomes)
    if not examples:
        return None
    shown = {arm: mark for arm, mark in marks(outcomes.arms).items() if arm in examples}
    first = next(iter(examples.values()))
    at = brightest_patch(first.image, min((example.grid for example in examples.values()), key=lambda grid: grid[0]))
    maps = {arm: _looks(examples[arm], at) for arm in shown}
    most = float(np.clip(max(values.max() for values in maps.values()), 2, 32))
    scale = LogNorm(1 / most, most)  # white is uniform; what is negative, as rotated features can be, is darkest
    lines = _lines(shown)
    columns = 1 + max(map(len, lines))
    figure = blank(FULL, 1.25 * FULL / columns * len(lines))
    panels = figure.subplots(len(lines), columns, squeeze=False)
    for axes in panels.flat:
        axes.set_axis_off()
    _place_image(panels[0, 0], first, at)
    for row, arms in zip(panels, lines, strict=True):
        for axes, arm in zip(row[1:], arms, strict=False):
            drawn = axes.imshow(maps[arm].clip(1 / most, most), cmap="RdBu_r", norm=scale, extent=(0, 1, 1, 0))
            axes.add_patch(_mark(at, examples[arm].grid))
            axes.set_title(shown[arm].label.replace(" + ", "\n+ ").replace(", ", ",\n"), fontsize=SMALL, color=INK)
    bar = figure.colorbar(drawn, ax=list(panels.flat), shrink=0.7 if len(lines) > 1 else 1.0, aspect=25, pad=0.02)
    twos = [2.0**n for n in range(-5, 6) if 1 / most <= 2.0**n <= most]
    bar.set_ticks(twos, labels=[f"{two:g}" if two >= 1 else f"1/{1 / two:g}" for two in twos])
    bar.minorticks_off()
    bar.set_label("attention (1 = uniform)", fontsize=SMALL, color=INK)
    bar.ax.tick_params(labelsize=SMALL - 1, colors=INK)
    return figure


def attention_examples(outcomes: Outcomes) -> dict[str, Example]:
    """Arm -> example of its lowest seed that has one; a damaged file, or another image than the first, is left out."""
    found: dict[str, Example] = {}
    if outcomes.runs.empty:
        return found
    for run in outcomes.runs.sort_values("seed", kind="stable").to_dict("records"):
        folder = outcomes.folders.get(run["uid"])
        example = _read(folder / "attention.npz") if folder and run["arm"] not in found else None
        if example and all(np.array_equal(example.image, other.image) for other in found.values()):
            found[run["arm"]] = example
    return found


def brightest_patch(image: np.ndarray, grid: tuple[int, int]) -> tuple[float, float]:
    """(y, x) in [0, 1] of the patch that asks: the brightest of a grey image, the middle one of a colour image."""
    h, w = grid
    y, x = h // 2, w // 2
    if image.shape[0] == 1:
        patches = image[0].reshape(h, image.shape[1] // h, w, image.shape[2] // w).mean(axis=(1, 3))  # (h, w)
        y, x = divmod(int(patches.argmax()), w)
    return (y + 0.5) / h, (x + 0.5) / w


def _read(path: Path) -> Example | None:
    try:
        found = read_arrays(path)
        image, maps, (h, w) = found["image"].astype(float), found["maps"], map(int, found["grid"])
        weights = maps[-1].astype(float).mean(axis=0)[-h * w :, -h * w :]  # a class token comes first
        fits = image.ndim == 3 and weights.shape == (h * w, h * w) and not (image.shape[1] % h or image.shape[2] % w)
    except (StoreError, ValueError, KeyError, TypeError, IndexError, ZeroDivisionError, OverflowError):
        return None
    return Example(image, weights, (h, w)) if fits and np.isfinite(weights).all() else None


def _looks(example: Example, at: tuple[float, float]) -> np.ndarray:
    """(h, w) attention of the patch at `at`, 1 being uniform."""
    h, w = example.grid
    return example.weights[int(at[0] * h) * w + int(at[1] * w)].reshape(h, w) * h * w


def _lines(shown: Mapping[str, Mark]) -> list[list[str]]:
    """Arms in rows: an attention starts a row, and a row has at most `ROW`."""
    by_attention: dict[str, list[str]] = {}
    for arm, mark in shown.items():
        by_attention.setdefault(mark.attention, []).append(arm)
    return [arms[start : start + ROW] for arms in by_attention.values() for start in range(0, len(arms), ROW)]


def _place_image(axes: Axes, example: Example, at: tuple[float, float]) -> None:
    pixels = example.image[0] if example.image.shape[0] == 1 else example.image.transpose(1, 2, 0)
    axes.imshow(pixels, cmap="gray", vmin=0, vmax=1, extent=(0, 1, 1, 0))
    axes.add_patch(_mark(at, example.grid))
    axes.set_title("image", fontsize=SMALL, color=INK)


def _mark(at: tuple[float, float], grid: tuple[int, int]) -> Rectangle:
    h, w = grid
    corner = (int(at[1] * w) / w, int(at[0] * h) / h)
    return Rectangle(corner, 1 / w, 1 / h, fill=False, edgecolor="#e69f00", linewidth=1.6)
