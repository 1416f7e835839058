"""Figures of a trial: matplotlib objects without pyplot, so any thread may draw them.

The colours are safe for colour-blind eyes.
"""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colorbar import Colorbar
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from PIL import Image

from erpe.errors import ShapeError

TRAIN, HELD_OUT, MARK = "#0072B2", "#D55E00", "#E69F00"
"""Blue, vermilion, orange of Okabe and Ito."""

_UNITS = {"loss": "loss (nats an image)", "accuracy": "accuracy", "lr": "learning rate"}
_PART = {"train": ("training", TRAIN), "val": ("validation", HELD_OUT), "test": ("test", HELD_OUT)}
_LONGEST_NAME = 12


def learning_curves(history: Sequence[dict[str, float]]) -> Figure:
    """Loss, accuracy and learning rate by epoch.

    Args:
        history: a dict an epoch with `epoch` and measures such as `train/loss`, `val/loss`, `val/accuracy`, `lr`.
    """
    measures = [name for name in _UNITS if any(key.rpartition("/")[2] == name for row in history for key in row)]
    figure = _figure(3.6 * max(1, len(measures)), 3.2, left=0.7, bottom=0.5, top=0.3, between=0.3)
    for place, name in enumerate(measures, 1):
        axes = figure.add_subplot(1, len(measures), place)
        keys = dict.fromkeys(key for row in history for key in row if key.rpartition("/")[2] == name)
        for key in keys:
            label, colour = _PART.get(key.partition("/")[0], ("", TRAIN))
            points = [(row["epoch"], row[key]) for row in history if key in row]
            axes.plot(*zip(*points, strict=True), color=colour, label=label, marker="o", markersize=3, linewidth=1.5)
        axes.set(xlabel="epoch", ylabel=_UNITS[name])
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        axes.grid(alpha=0.3, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        if name == "lr":
            axes.ticklabel_format(axis="y", scilimits=(-2, 4))
        else:
            axes.legend(frameon=False)
    return figure


def confusion(matrix: Sequence[Sequence[int]] | np.ndarray, classes: Sequence[str], title: str) -> Figure:
    """Draw counts of true against predicted class; the shade is the part of the true class.

    Raises:
        ShapeError: the matrix is not square with one row a class.
    """
    counts = np.asarray(matrix)
    if counts.shape != (len(classes), len(classes)):
        raise ShapeError(f"{len(classes)} classes need a square matrix of that size, got {counts.shape}")
    part = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    names = [str(name)[:_LONGEST_NAME] for name in classes]
    longest = max(map(len, names), default=0)
    side = 0.46 * len(classes) + 0.5
    left, bottom = 0.5 + 0.09 * longest, 0.45 + (0.07 * longest if longest > 2 else 0.1)
    figure = _figure(left + side + 1.3, bottom + side + 0.4, left, bottom, top=0.4)
    axes = figure.add_subplot()
    shades = axes.imshow(part, cmap="Blues", vmin=0, vmax=1)
    for (row, column), count in np.ndenumerate(counts):
        if count:
            colour = "white" if part[row, column] > 0.5 else "black"
            axes.text(column, row, f"{count}", ha="center", va="center", fontsize=8, color=colour)
    axes.set_xticks(range(len(names)), names)
    if longest > 2:
        axes.tick_params(axis="x", labelrotation=45, labelrotation_mode="xtick")
    axes.set_yticks(range(len(names)), names)
    axes.set(xlabel="predicted class", ylabel="true class")
    right = np.trace(counts) / max(counts.sum(), 1)
    axes.set_title(f"{title}: {counts.sum():,} images, accuracy {right:.4f}", fontsize=10)
    figure.colorbar(shades, ax=axes, shrink=0.8, label="part of the true class")
    return figure


def attention_maps(image: np.ndarray, maps: np.ndarray, grid: tuple[int, int]) -> Figure:
    """Where each block looks, heads averaged, in multiples of uniform attention 1/N.

    The upper row is what the token in the middle of the image attends to. The lower row is the mean over all tokens
    by the offset from query to key, which is where a relative position encoding shows.

    Args:
        image: (channels, height, width) in [0, 1].
        maps: (blocks, H, N, N) attention weights; a class token, if there is one, comes first and is left out.
        grid: (h, w) patches.
    Raises:
        ShapeError: the maps do not fit the grid.
    """
    h, w = (int(side) for side in grid)
    if maps.ndim != 4 or maps.shape[2] != maps.shape[3] or maps.shape[3] not in (h * w, h * w + 1):
        raise ShapeError(f"maps of a ({h}, {w}) grid are (blocks, H, {h * w}, {h * w}), got {maps.shape}")
    weights = maps[:, :, -h * w :, -h * w :].astype(float).mean(axis=1) * maps.shape[-1]  # (blocks, N, N)
    query = (h // 2, w // 2)
    looks = weights[:, query[0] * w + query[1]].reshape(-1, h, w)
    offsets = np.stack([_by_offset(layer, h, w) for layer in weights])  # (blocks, 2h-1, 2w-1)

    columns = len(weights) + 1
    figure = _figure(1.75 * columns + 1.0, 4.2, left=0.3, bottom=0.5, top=0.35, between=0.25)
    panels = figure.subplots(2, columns, squeeze=False)
    _show_image(panels[0, 0], image, query, (h, w))
    panels[1, 0].axis("off")
    panels[1, 0].text(0.8, 0.5, "mean of\nall tokens,\nby offset", ha="right", va="center", fontsize=9)
    most = float(np.clip(max(looks.max(), offsets.max()), 2, 32))
    scale = LogNorm(1 / most, most)  # white is uniform; what is negative, as rotated features can be, is darkest
    corners = ((-0.5, w - 0.5, h - 0.5, -0.5), (0.5 - w, w - 0.5, h - 0.5, 0.5 - h))
    for row, shown in enumerate((looks, offsets)):
        for axes, values in zip(panels[row, 1:], shown, strict=True):
            clipped = values.clip(1 / most, most)
            drawn = axes.imshow(clipped, cmap="RdBu_r", norm=scale, extent=corners[row])
            _patch_ticks(axes)
            if axes is not panels[row, 1]:
                axes.set_yticks([])
    for block, axes in enumerate(panels[0, 1:], 1):
        axes.set_title(f"block {block}", fontsize=9)
        axes.add_patch(_mark(query, "black"))
    panels[0, 1].set_ylabel("patch row", fontsize=8)
    panels[1, 1].set_ylabel("rows from query", fontsize=8)
    for axes in panels[1, 1:]:
        axes.set_xlabel("columns from query", fontsize=8)
    _bar_of_multiples(figure.colorbar(drawn, ax=list(panels.flat), shrink=0.6, pad=0.02), most)
    return figure


def _bar_of_multiples(bar: Colorbar, most: float) -> None:
    twos = [2.0**n for n in range(-5, 6) if 1 / most <= 2.0**n <= most]
    bar.set_ticks(twos, labels=[f"{two:g}" if two >= 1 else f"1/{1 / two:g}" for two in twos])
    bar.minorticks_off()
    bar.set_label("attention (1 = uniform)", fontsize=8)
    bar.ax.tick_params(labelsize=7)


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG of 256 colours, a third as large as one of all colours."""
    drawn = BytesIO()
    figure.savefig(drawn, dpi=150, pil_kwargs={"compress_level": 0})
    with Image.open(drawn) as picture:
        picture.convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE).save(path)


def _figure(width: float, height: float, left: float, bottom: float, top: float, between: float = 0.0) -> Figure:
    """Make a figure of the given size in inches, with margins and a gap between panels.

    A layout engine would draw everything three times to find them, and a study has many figures.
    """
    figure = Figure(figsize=(width, height))
    right = 1 - 0.15 / width
    figure.subplots_adjust(left / width, bottom / height, right, 1 - top / height, between, between)
    return figure


def _show_image(axes: Axes, image: np.ndarray, query: tuple[int, int], grid: tuple[int, int]) -> None:
    """Draw the image with its patches, so that it lines up with the maps beside it."""
    h, w = grid
    pixels = image[0] if image.shape[0] == 1 else image.transpose(1, 2, 0)
    axes.imshow(pixels, cmap="gray", vmin=0, vmax=1, extent=(-0.5, w - 0.5, h - 0.5, -0.5))
    for line in range(1, h):
        axes.axhline(line - 0.5, color="white", linewidth=0.4, alpha=0.5)
    for line in range(1, w):
        axes.axvline(line - 0.5, color="white", linewidth=0.4, alpha=0.5)
    axes.add_patch(_mark(query, MARK))
    axes.set_title("image and patches", fontsize=9)
    _patch_ticks(axes)


def _patch_ticks(axes: Axes) -> None:
    axes.tick_params(labelsize=7)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=3))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=3))


def _mark(query: tuple[int, int], colour: str) -> Rectangle:
    return Rectangle((query[1] - 0.5, query[0] - 0.5), 1, 1, fill=False, edgecolor=colour, linewidth=1.8)


def _by_offset(weights: np.ndarray, h: int, w: int) -> np.ndarray:
    """(N, N) weights to their mean at each offset of key minus query: (2h-1, 2w-1), zero offset in the centre."""
    y, x = np.divmod(np.arange(h * w), w)
    place = (y[None] - y[:, None] + h - 1) * (2 * w - 1) + x[None] - x[:, None] + w - 1
    size = (2 * h - 1) * (2 * w - 1)
    total = np.bincount(place.ravel(), weights.ravel(), size)
    return (total / np.bincount(place.ravel(), minlength=size)).reshape(2 * h - 1, 2 * w - 1)
