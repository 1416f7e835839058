"""The answer as a grid, attention x encoding: accuracy, difference and verdict in each cell."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import pandas as pd

from erpe.report.comparison import Comparison
from erpe.report.labels import ATTENTION, ENCODING, switched
from erpe.report.pairing import switches
from erpe.report.significance import digits_of, plus, point_digits, signed
from erpe.report.statistics import ACCURACY
from erpe.variants import ATTENTIONS, ENCODINGS

SIGNS = {"better": "▲", "worse": "▼", "equivalent": "■", "undecided": "○"}
"""Of each verdict, where colour alone would tell it."""


class Cell(NamedTuple):
    """One arm; all words. A dash stands where there is nothing."""

    arm: str
    accuracy: str
    """In per cent: `96.74`."""
    half: str
    """Half-width of its 95 % interval, in points: `0.22`."""
    against: str
    """What the difference is to: no encoding to softmax, an encoding to none; empty: to nothing."""
    difference: str
    """In points, with a sign: `+0.14`; `0.00` if it is rounded to zero."""
    interval: str
    """Simultaneous, in points: `-0.03 to 0.31`."""
    verdict: str


class Row(NamedTuple):
    """One attention with one combination of switches."""

    attention: str
    label: str
    """`FAVOR+`, or with switches `FAVOR+, no positions`."""
    cells: dict[str, Cell]
    """By encoding; those that the study has not are not there."""


def grid(one: Comparison) -> list[Row]:
    """Return the grid of one study on one data set, a row an attention and a combination of switches."""
    summary, differences = one.summary, one.differences
    means = summary[summary["measure"] == ACCURACY].set_index("arm")
    tests = differences[(differences["measure"] == ACCURACY) & differences["kind"].isin(["gap", "encoding"])]
    pairs = {pair["arm"]: pair for pair in tests.to_dict("records")}
    rows: dict[tuple[str, frozenset[str]], dict[str, Cell]] = {}
    digits = _coarsest(point_digits(low, high) for low, high in means[["low", "high"]].itertuples(index=False))
    finer = _coarsest(digits_of(pair) for pair in pairs.values() if pair["n"])
    for arm in one.arms.itertuples(index=False):
        place = (str(arm.attention), switches(str(arm.arm), str(arm.variant)))
        cell = _cell(str(arm.arm), means, pairs.get(arm.arm), digits, finer)
        rows.setdefault(place, {})[str(arm.encoding)] = cell
    attentions = list(dict.fromkeys([*ATTENTIONS, *(attention for attention, _ in rows)]))
    ordered = sorted(rows, key=lambda place: (sorted(place[1]), attentions.index(place[0])))
    return [Row(place[0], ATTENTION[place[0]] + switched(place[1], ", {}"), rows[place]) for place in ordered]


def _coarsest(digits: Iterable[int]) -> int:
    """Return the digits that all numbers of one kind get: those of the least certain."""
    return min(digits, default=2)


def _cell(arm: str, means: pd.DataFrame, pair: dict | None, digits: int, of_difference: int) -> Cell:
    accuracy, half, against, difference, interval, verdict = "-", "-", "", "-", "-", "-"
    if arm in means.index and not np.isnan(means.loc[arm, "mean"]):
        mean, low, high = (100 * float(means.loc[arm, name]) for name in ("mean", "low", "high"))
        accuracy = signed(mean, digits)
        half = "-" if np.isnan(low) else signed((high - low) / 2, digits)
    if pair is not None and pair["n"]:
        against, difference = pair["against"], plus(100 * pair["difference"], of_difference)
        verdict = pair["verdict"]
        if not np.isnan(pair["all_low"]):
            ends = (signed(100 * pair[name], of_difference) for name in ("all_low", "all_high"))
            interval = " to ".join(ends)
    return Cell(arm, accuracy, half, against, difference, interval, verdict)


def as_lines(rows: list[Row]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of words, three lines a row of the grid: accuracy, difference, verdict."""
    names = dict.fromkeys([*ENCODINGS, *(name for row in rows for name in row.cells)])
    there = [name for name in names if any(name in row.cells for row in rows)]
    lines = []
    for row in rows:
        cells = [row.cells.get(name) for name in there]
        lines.append([row.label, *(cell.accuracy if cell else "" for cell in cells)])
        if any(cell and cell.against for cell in cells):
            lines.append(["  difference", *(cell.difference if cell and cell.against else "" for cell in cells)])
            lines.append(["  verdict", *(cell.verdict if cell and cell.against else "" for cell in cells)])
    return ["accuracy %", *(ENCODING[name] for name in there)], lines
