"""The tables of a comparison as text in cells, the answer first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from erpe.report.comparison import Comparison
from erpe.report.gaps import NOT_SHOWN
from erpe.report.grid import as_lines, grid
from erpe.report.labels import labels_of
from erpe.report.measures import MAIN, PERCENT, WIDE, Measure
from erpe.report.outcomes import goals_of
from erpe.report.pairing import KINDS
from erpe.report.ratios import TIMES
from erpe.report.significance import MEASURE, digits_of, p_value, point_digits, signed
from erpe.report.summary import sentences
from erpe.study.objectives import shown


@dataclass(frozen=True)
class Block:
    """A table or a list, with its title."""

    title: str
    columns: list[str]
    """Empty: a list."""
    rows: list[list[str]]
    numbers: list[bool]
    """Which columns are set to the right."""
    lines: list[str]
    remarks: list[str]
    """What to know, below."""
    spare: tuple[str, ...] = ()
    """Columns that a narrow terminal does without, the first one first."""


FAMILIES = {kind: f"test accuracy, {words}" for kind, words in KINDS.items()}
"""Kind of pair -> what its table is called."""
REMARK = (
    "points of accuracy, arm minus against, paired by seed; 95 % intervals for new seeds on these images; intervals "
    "hold and p is corrected (Holm) for all pairs of the table with the same switches together"
)


def blocks(comparison: Comparison, labels: bool = False) -> list[Block]:
    """All blocks, a study and data set after another, the notes last.

    Args:
        labels: call arms as a paper does, `ReLU + RoPE (no positions)`, not as commands do.
    """
    found = []
    for study, dataset in comparison.arms[["study", "dataset"]].drop_duplicates().itertuples(index=False, name=None):
        one = Slice(comparison, study, dataset, labels)
        made = [*_answer(one), *_differences(one), _gaps(one), *_main(one), _ratios(one), _ranks(one), _fronts(one)]
        starred = [block for block in made if any(row[0].endswith(" *") for row in block.rows)]
        for block in starred[:1]:
            block.remarks.append(one.stars())
        found += [block for block in made if block.rows or block.lines]
    if comparison.notes:
        found.append(Block("notes", [], [], [], list(comparison.notes), []))
    return found


class Slice:
    """One study and data set of a comparison."""

    def __init__(self, comparison: Comparison, study: str, dataset: str, labels: bool) -> None:
        self.comparison = comparison.only(study, dataset)
        self.title = f"{study} on {dataset}"
        self.arms = self.comparison.arms
        self.labels = labels_of(self.arms) if labels else {}
        self.marks = {arm: mark for arm, mark in zip(self.arms["arm"], self.arms["mark"], strict=True) if mark}

    def name(self, arm: str) -> str:
        """Return the arm's name, with a star where something is amiss with it."""
        return f"{self.plain(arm)} *" if arm in self.marks else self.plain(arm)

    def plain(self, arm: str) -> str:
        """Return the arm's name."""
        return self.labels.get(arm, arm)

    def block(self, what: str, columns: Sequence[str], rows: list[list[str]], left: int, *remarks: str) -> Block:
        """Return a table whose first `left` columns are words."""
        numbers = [place >= left for place in range(len(columns))]
        spare = tuple(columns[: left + 1 : -1])
        return Block(f"{self.title}: {what}", list(columns), rows, numbers, [], list(remarks), spare)

    def stars(self) -> str:
        """Return what the stars mean."""
        alike = dict[str, list[str]]()
        for arm, mark in self.marks.items():
            alike.setdefault(mark, []).append(self.plain(arm))
        return "* " + "; ".join(f"{mark}: {', '.join(arms)}" for mark, arms in alike.items())


def _main(one: Slice) -> list[Block]:
    table = one.comparison.summary
    seeds = table.groupby("arm")["n"].max().to_dict()
    found = []
    for what, (columns, remark) in MAIN.items():
        shown = list(columns) if set(columns) & set(table["measure"]) else []
        cells = [_cells(table[table["measure"] == name].set_index("arm"), columns[name], seeds) for name in shown]
        rows = [
            [one.name(arm), str(seeds.get(arm, 0)), *(column.get(arm, "-") for column in cells)]
            for arm in one.arms["arm"]
        ]
        if shown:
            found.append(one.block(what, ["arm", "n", *(columns[name].name for name in shown)], rows, 1, remark))
    return found


def _cells(table: pd.DataFrame, column: Measure, seeds: dict[str, int]) -> dict[str, str]:
    """Arm -> `95.12 ± 0.34`, with `(n=3)` where other measures have more seeds; see `_digits`."""
    scaled = table.dropna(subset="mean")[["mean", "low", "high"]] / column.unit
    half = (scaled["high"] - scaled["low"]) / 2
    cells = {}
    for arm, mean in scaled["mean"].items():
        digits = _digits(half[arm], scaled["mean"], column)
        spread = f" ± {half[arm]:,.{digits}f}" if half[arm] > 0 else ""
        fewer = f" (n={table['n'][arm]})" if table["n"][arm] < seeds[str(arm)] else ""
        cells[str(arm)] = signed(mean, digits) + spread + fewer
    return cells


def _digits(half: float, means: pd.Series, column: Measure) -> int:
    """Digits after the point of one number: two of its own half-width count, or one where its column is wide; where it
    has none, four of the largest of its column's means.
    """
    if column.unit == PERCENT:
        return point_digits(0, 2 * PERCENT * half)
    if half > 0 and not column.exact:
        return int(np.clip((means.abs().max() < WIDE) - np.floor(np.log10(half)), 0, 6))
    if (means == means.round()).all():
        return 0
    return int(np.clip(3 - np.floor(np.log10(means.abs().max())), 0, 6))


def _answer(one: Slice) -> list[Block]:
    """Return the sentences and the grid."""
    columns, rows = as_lines(grid(one.comparison))
    remarks = ["difference in points: without an encoding to softmax, with one to the same attention without"]
    table = one.block("attention x encoding", columns, rows if len(rows) > 1 else [], 1, *remarks)
    return [Block(f"{one.title}: the answer", [], [], [], sentences(one.comparison), []), replace(table, spare=())]


def _differences(one: Slice) -> list[Block]:
    table = one.comparison.differences
    columns = ["arm", "against", "points", "95 % interval", "new images too", "p (Holm)", "n", "verdict"]
    found = []
    for kind, what in FAMILIES.items():
        rows = []
        for pair in table[(table["measure"] == MEASURE) & (table["kind"] == kind)].to_dict("records"):
            against = one.plain(pair["against"]) if kind != "study" else f"{pair['against_study']}"
            digits = digits_of(pair)
            numbers = [
                _points(pair["difference"], digits), _range(pair["all_low"], pair["all_high"], digits),
                _range(pair["images_low"], pair["images_high"], digits), p_value(pair["p_holm"]), str(pair["n"]),
            ]  # fmt: skip
            verdict = f"{pair['verdict']} (so far)" if pair["preliminary"] else pair["verdict"]
            rows.append([one.name(pair["arm"]), against, *numbers, verdict])
        margins = table.loc[(table["kind"] == kind) & (table["measure"] == MEASURE), "margin"].unique()
        remark = f"{REMARK}; equivalent: within {' or '.join(f'{100 * margin:g}' for margin in margins)} points"
        block = one.block(what, columns, rows, 2, remark)
        found.append(replace(block, spare=("new images too", "p (Holm)", "n", "against")))
    return found


def _gaps(one: Slice) -> Block:
    columns = ["arm", "from", "gap", "95 % interval", "closed %", "95 % of closed", "n"]
    rows, table = [], one.comparison.gaps
    for row in table.to_dict("records"):
        digits = point_digits(row["gap_low"], row["gap_high"])
        shares = [_points(row["closed"], 0), _range(row["low"], row["high"], 0)]
        shown = shares if row["shown"] else [NOT_SHOWN, "-"]
        gap = [_points(row["gap"], digits), _range(row["gap_low"], row["gap_high"], digits)]
        rows.append([one.name(row["arm"]), one.plain(row["baseline"]), *gap, *shown, str(row["n"])])
    remark = (
        "gap: softmax - attention without encoding, in points; closed: the part of it that the encoding adds, with "
        "Fieller's interval of a ratio of two means"
    )
    return replace(one.block("gap closed", columns, rows, 2, remark), spare=("n", "95 % interval", "from"))


def _ratios(one: Slice) -> Block:
    table, rows = one.comparison.ratios, []
    for arm, own in table.groupby("arm", sort=False):
        row = [one.name(str(arm)), one.plain(str(own["against"].iloc[0]))]
        for measure in TIMES:
            for found in own[own["measure"] == measure].to_dict("records") or [NO_RATIO]:
                row += [_ratio(found["ratio"]), "-" if np.isnan(found["low"]) else " to ".join(
                    _ratio(found[end]) for end in ("low", "high"))]  # fmt: skip
        rows.append([*row, str(own["n"].max())])
    columns = ["arm", "over", *(f"{what} {part}" for what in TIMES.values() for part in ("×", "95 %")), "n"]
    remark = "times of the arm over those of softmax on the same seed; geometric mean, interval of the logarithms"
    return replace(one.block("times as ratios to softmax", columns, rows, 2, remark), spare=("n", "over"))


NO_RATIO = dict.fromkeys(("ratio", "low", "high"), np.nan)


def _ratio(value: float) -> str:
    return "-" if np.isnan(value) else f"{value:.2f}" if value < 10 else f"{value:.1f}"


def _ranks(one: Slice) -> Block:
    table, tests = one.comparison.ranks, one.comparison.friedman
    ranks = dict(zip(table["arm"], table["rank"], strict=True))
    seeds = dict(zip(table["arm"], table["n"], strict=True))
    rows = [[one.name(arm), str(seeds[arm]), signed(ranks[arm], 1)] for arm in one.arms["arm"] if arm in seeds]
    test = f"; Friedman's test, p: {p_value(tests['p'].iloc[0])}" if len(tests) else ""
    remarks = [f"average over blocks, 1 is best; a block is a seed{test}"]
    if 0 < len(rows) < len(one.arms):
        remarks.append("arms that are unfinished or have no run to compare are left out")
    return one.block("ranks by accuracy", ["arm", "blocks", "rank"], rows, 1, *remarks)


def _fronts(one: Slice) -> Block:
    goals, table = goals_of(one.arms), one.comparison.fronts
    values = table.groupby(["arm", "number"], sort=False)[["objective", "value"]]
    trials = {key: dict(own.itertuples(index=False, name=None)) for key, own in values}
    rows = [[one.name(arm), str(number), *(shown(name, own[name]) for name in goals.objectives)]
            for (arm, number), own in trials.items()]  # fmt: skip
    remark = "trials of the search, on the validation part, that no other one of their arm dominates"
    within = f"; at most {goals.limits}" if goals.limits else ""
    return one.block("Pareto fronts", ["arm", "trial", *goals.objectives], rows, 1, remark + within)


def _points(value: float, digits: int) -> str:
    return "-" if np.isnan(value) else signed(100 * value, digits)


def _range(low: float, high: float, digits: int) -> str:
    return "-" if np.isnan(low) else f"{signed(100 * low, digits)} to {signed(100 * high, digits)}"
