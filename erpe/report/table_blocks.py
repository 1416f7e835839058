"""The tables of a comparison as text in cells, each narrow enough for a terminal of 80 columns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd

from erpe.report.comparison import Comparison
from erpe.report.gaps import coverage_told
from erpe.report.significance import MEASURE, of_pair, point_digits, signed

PLUS_MINUS = "mean ± half-width of the 95 % interval over n seeds (no ±: one seed, or all are equal)"


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


class Column(NamedTuple):
    """How a measure is shown."""

    name: str
    unit: float
    """The measure is divided by this."""
    exact: bool = False
    """A count, not an estimate: no interval, no digit too many."""


PERCENT, MEGA = 0.01, 1e6
WIDE = 1e5
"""From here on two more digits would break the lines of a terminal."""
QUALITY = {
    "test/accuracy": Column("accuracy %", PERCENT), "test/precision": Column("precision %", PERCENT),
    "test/recall": Column("recall %", PERCENT), "test/f1": Column("F1 %", PERCENT),
}  # fmt: skip
FIT = {
    "test/log_likelihood": Column("test lnL", 1), "train/log_likelihood": Column("train lnL", 1),
    "aic": Column("AIC", 1), "bic": Column("BIC", 1),
}  # fmt: skip
SIZE = {
    "params": Column("parameters", 1, exact=True), "flops/forward": Column("forward MFLOPs", MEGA, exact=True),
    "flops/train_step": Column("training step MFLOPs", MEGA, exact=True),
}  # fmt: skip
COST = {
    "time/inference_ms_per_image": Column("ms/image", 1), "time/inference_ms_batch1": Column("ms, batch 1", 1),
    "time/train_seconds_per_epoch": Column("train s/epoch", 1), "memory/peak_mib": Column("peak MiB", 1),
}  # fmt: skip
MAIN = {
    "quality on the test set": (QUALITY, f"{PLUS_MINUS}; precision, recall and F1 are macro averages"),
    "fit": (
        FIT,
        f"{PLUS_MINUS}; lnL in nats, summed over the images; AIC and BIC of the training set, lower is better",
    ),
    "size": (SIZE, "FLOPs of one image, a multiplication and an addition counted as two"),
    "time and memory": (COST, f"{PLUS_MINUS}; inference in full batches unless it says batch 1"),
}
KINDS = {
    "baseline": "test accuracy, each encoding against none",
    "softmax": "test accuracy, linear attention against softmax",
    "switch": "test accuracy, one switch changed",
    "study": "test accuracy, against the same arm of another study",
}


def blocks(comparison: Comparison) -> list[Block]:
    """All blocks, a study and data set after another, the notes last."""
    found = []
    for study, dataset in comparison.arms[["study", "dataset"]].drop_duplicates().itertuples(index=False, name=None):
        one = Slice(comparison, study, dataset)
        made = [*_main(one), *_differences(one), _mcnemar(one), _gaps(one), _ranks(one), _verdicts(one)]
        starred = [block for block in made if any(row[0].endswith(" *") for row in block.rows)]
        for block in starred[:1]:
            block.remarks.append(one.stars())
        found += [block for block in made if block.rows or block.lines]
    if comparison.notes:
        found.append(Block("notes", [], [], [], list(comparison.notes), []))
    return found


class Slice:
    """One study and data set of a comparison."""

    def __init__(self, comparison: Comparison, study: str, dataset: str) -> None:
        self.comparison, self.where = comparison, {"study": study, "dataset": dataset}
        self.title = f"{study} on {dataset}"
        self.arms = self.of("arms")
        self.marks = {arm: mark for arm, mark in zip(self.arms["arm"], self.arms["mark"], strict=True) if mark}

    def of(self, table: str) -> pd.DataFrame:
        """The rows of one of the comparison's tables."""
        every = getattr(self.comparison, table)
        return every[(every["study"] == self.where["study"]) & (every["dataset"] == self.where["dataset"])]

    def name(self, arm: str) -> str:
        """The arm, with a star where something is amiss with it."""
        return f"{arm} *" if arm in self.marks else arm

    def block(self, what: str, columns: Sequence[str], rows: list[list[str]], left: int, *remarks: str) -> Block:
        """A table whose first `left` columns are words."""
        numbers = [place >= left for place in range(len(columns))]
        return Block(f"{self.title}: {what}", list(columns), rows, numbers, [], list(remarks))

    def stars(self) -> str:
        """What the stars mean."""
        return "* " + "; ".join(f"{arm}: {mark}" for arm, mark in self.marks.items())


def _main(one: Slice) -> list[Block]:
    table = one.of("summary")
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


def _cells(table: pd.DataFrame, column: Column, seeds: dict[str, int]) -> dict[str, str]:
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


def _digits(half: float, means: pd.Series, column: Column) -> int:
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


def _differences(one: Slice) -> list[Block]:
    table = one.of("differences")
    columns = ["arm", "against", "points", "95 % interval", "p (Holm)", "n", "verdict"]
    remark = (
        "points of accuracy, arm minus against, paired by seed; intervals are not corrected, p of the t-test is, by "
    )
    remark += "Holm over this study's pairs: a difference can be noise though its interval leaves out 0"
    found = []
    for kind, what in KINDS.items():
        rows = []
        for pair in table[(table["measure"] == MEASURE) & (table["kind"] == kind)].to_dict("records"):
            against = pair["against"] if kind != "study" else f"{pair['against_study']}"
            digits = point_digits(pair["low"], pair["high"])
            numbers = [
                _points(pair["difference"], digits),
                _range(pair["low"], pair["high"], digits),
                _p(pair["p_holm"]),
            ]
            rows.append([one.name(pair["arm"]), against, *numbers, str(pair["n"]), of_pair(pair)])
        found.append(one.block(what, columns, rows, 2, remark))
    return found


def _mcnemar(one: Slice) -> Block:
    columns = ["arm", "against", "only arm", "only against", "median p", "p < 0.05"]
    rows = [
        [one.name(row["arm"]), row["against"], f"{row['only_arm']:,}", f"{row['only_against']:,}", _p(row["p_median"]),
         f"{row['seeds_significant']} of {row['n']}"]
        for row in one.of("mcnemar").to_dict("records")
    ]  # fmt: skip
    remark = (
        "test images that only one of both has right, summed over seeds; median p over seeds, and the seeds whose p is "
    )
    remark += "below 0.05 after Holm's correction over the pairs of that seed"
    return one.block("McNemar's test on the same images", columns, rows, 2, remark)


def _gaps(one: Slice) -> Block:
    columns = ["arm", "baseline", "gap", "real", "closed %", "95 % interval", "n"]
    rows = []
    table = one.of("gaps")
    for row in table.to_dict("records"):
        digits = point_digits(row["gap_low"], row["gap_high"])
        shares = [_points(row["closed"], 0), _range(row["low"], row["high"], 0)]
        shown = shares if row["gap_is"] == "real" else ["-", "-"]
        real = {"real": "yes", "noise": "no"}.get(row["gap_is"], row["gap_is"])
        rows.append([one.name(row["arm"]), row["baseline"], _points(row["gap"], digits), real, *shown, str(row["n"])])
    remarks = ["gap: softmax - baseline, in points, real by the corrected paired test of both; closed: the part of it "
               "that the encoding adds, with its bootstrap interval, or a dash where no gap is real"]  # fmt: skip
    drawn = table.loc[(table["gap_is"] == "real") & table["low"].notna(), "n"]
    remarks += [told] if (told := coverage_told(drawn)) else []
    return one.block("gap closed", columns, rows, 2, *remarks)


def _ranks(one: Slice) -> Block:
    table, tests = one.of("ranks"), one.of("friedman").set_index("measure")
    names = {"test/accuracy": "accuracy", "aic": "AIC", "bic": "BIC"}
    shown = [name for name in dict.fromkeys(table["measure"])]
    means = table.pivot(index="arm", columns="measure", values="rank")
    seeds = dict(zip(table["arm"], table["n"], strict=True))
    rows = [
        [one.name(arm), str(seeds[arm]), *(signed(means.loc[arm, name], 1) for name in shown)]
        for arm in one.arms["arm"]
        if arm in seeds
    ]
    known = tests["p"].dropna()
    each = ", ".join(f"{names.get(name, name)} {_p(known[name])}" for name in shown if name in known)
    test = f"; Friedman's test, p: {each}" if each else "; Friedman's test: too few seeds" if len(tests) else ""
    remarks = [f"average over seeds, 1 is best{test}"]
    if 0 < len(rows) < len(one.arms):
        remarks.append("arms that are unfinished or have no run to compare are left out")
    return one.block("ranks", ["arm", "n", *(names.get(name, name) for name in shown)], rows, 1, *remarks)


def _verdicts(one: Slice) -> Block:
    return Block(f"{one.title}: what is real and what is noise", [], [], [], list(one.of("verdicts")["text"]), [])


def _points(value: float, digits: int) -> str:
    return "-" if np.isnan(value) else signed(100 * value, digits)


def _range(low: float, high: float, digits: int) -> str:
    return "-" if np.isnan(low) else f"{signed(100 * low, digits)} to {signed(100 * high, digits)}"


def _p(p: float) -> str:
    return "-" if np.isnan(p) else "< 0.001" if p < 0.001 else f"{p:.3f}"
