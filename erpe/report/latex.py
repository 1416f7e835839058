"""Tables for a paper: of each study one main table, then the others. They need the package booktabs."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import pandas as pd

from erpe.report.comparison import Comparison
from erpe.report.grid import Cell, grid
from erpe.report.labels import DATASET, label
from erpe.report.measures import MEGA
from erpe.report.ratios import TIMES
from erpe.report.significance import signed
from erpe.report.table_blocks import Block, blocks
from erpe.text import printable

SIGNS = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "×": r"$\times$", "<": r"$<$", ">": r"$>$",
    "*": r"$^{*}$",
}  # fmt: skip


NARROW = 44
"""Characters of a row that fit one column of a paper at the size of a footnote; a wider table takes both."""


def as_latex(comparison: Comparison, searches: Sequence[Block] = ()) -> str:
    """Render all tables; what a reader should know beside them stands in comments.

    Args:
        searches: further tables, for the end; see `erpe.report.protocol.search_tables`.
    """
    parts = ["% needs \\usepackage{booktabs}", *(f"% {_ascii(note)}" for note in comparison.notes)]
    for study, dataset in comparison.arms[["study", "dataset"]].drop_duplicates().itertuples(index=False, name=None):
        parts.append(_main(comparison.only(study, dataset), study, dataset))
    parts += [_further(block) for block in [*blocks(comparison, labels=True), *searches] if block.columns]
    return "\n".join(parts)


def _main(one: Comparison, study: str, dataset: str) -> str:
    """Render accuracy, the difference that the question is about, and costs; a row an arm, as papers call it."""
    cells = {cell.arm: cell for row in grid(one) for cell in row.cells.values()}
    means = one.summary.pivot(index="arm", columns="measure", values="mean")
    margin, best = _margin(one), _best(means, _margin(one))
    ratios = one.ratios.set_index(["measure", "arm"])["ratio"]
    costs = [("params", "params (k)", 1e3), ("flops/forward", "MFLOPs", MEGA)]
    costs = [cost for cost in costs if cost[0] in means]
    times = [name for name in TIMES if name in ratios.index.get_level_values(0)]
    rows: list[str] = []
    last = None
    for arm in one.arms.itertuples(index=False):
        rows += ["\\addlinespace"] * (last not in (None, arm.attention))
        cell, last = cells[arm.arm], arm.attention
        row = [_tex(label(arm.arm, arm.variant)), _accuracy(cell, arm.arm in best), *map(_tex, cell[4:7])]
        row += [_number(means[name].get(arm.arm, np.nan) / unit, 1) for name, _, unit in costs]
        row += [_number(ratios.get((name, arm.arm), np.nan), 2) for name in times]
        rows.append(" & ".join(row) + r" \\")
    head = ["model", "accuracy %", "difference", "95 %", "verdict", *(name for _, name, _ in costs)]
    head += [f"{TIMES[name]} ×" for name in times]
    n = one.summary.loc[one.summary["measure"] == "test/accuracy", "n"]
    seeds = f"{n.min()}" if n.min() == n.max() else f"{n.min()} to {n.max()}"
    remark = (
        f"Accuracy: mean ± half-width of the 95 % interval over {seeds} seeds; bold: the best, and what is within "
        f"{margin:g} points of it. Difference in points: without an encoding to softmax, with one to the same "
        "attention without; its interval holds for all differences of one kind together. ×: ratio to softmax."
    )
    caption = f"Test accuracy on {DATASET[dataset]} by attention and encoding"
    return _table(head, rows, [1, 2, 3, *range(5, len(head))], caption, f"{study}-{dataset}", [remark])


def _margin(one: Comparison) -> float:
    margins = one.differences.loc[one.differences["measure"] == "test/accuracy", "margin"].dropna()
    return 100 * float(margins.iloc[0]) if len(margins) else 0.0


def _best(means: pd.DataFrame, margin: float) -> set[str]:
    """Return the arm with the best mean accuracy, and those whose mean is within the margin of it."""
    accuracy = means["test/accuracy"]
    return set(accuracy.index[100 * (accuracy.max() - accuracy) <= margin + 1e-9])


def _accuracy(cell: Cell, bold: bool) -> str:
    value = f"\\textbf{{{_tex(cell.accuracy)}}}" if bold else _tex(cell.accuracy)
    return value if cell.half == "-" else f"{value} {_tex('±')} {_tex(cell.half)}"


def _number(value: float, digits: int) -> str:
    return "-" if np.isnan(value) else _tex(signed(value, digits))


def _further(block: Block) -> str:
    rows = [" & ".join(map(_tex, row)) + r" \\" for row in block.rows]
    right = [place for place, number in enumerate(block.numbers) if number]
    return _table(block.columns, rows, right, block.title, block.title, block.remarks)


def _table(
    head: Sequence[str], rows: list[str], right: Sequence[int], caption: str, name: str, remarks: list[str]
) -> str:
    kind = "table" if max(map(len, [" & ".join(head), *rows])) <= NARROW else "table*"
    columns = "".join("r" if place in right else "l" for place in range(len(head)))
    lines = [f"\\begin{{{kind}}}[htbp]", r"\centering", r"\footnotesize",
             r"\setlength{\tabcolsep}{3pt}", f"\\caption{{{_tex(caption)}}}",
             f"\\label{{tab:{re.sub('[^a-z0-9]+', '-', name.lower()).strip('-')}}}", f"\\begin{{tabular}}{{{columns}}}",
             r"\toprule", " & ".join(map(_tex, head)) + r" \\", r"\midrule", *rows, r"\bottomrule", r"\end{tabular}",
             *(f"\\par\\medskip{{\\footnotesize {_tex(remark)}}}" for remark in remarks),
             f"\\end{{{kind}}}"]  # fmt: skip
    return "\n".join(lines) + "\n"


def _tex(text: str) -> str:
    text = _ascii(text)
    return re.sub(r"(?<![\w$])-(?=\d)", "$-$", "".join(SIGNS.get(sign, sign) for sign in text))


def _ascii(text: str) -> str:
    return printable(text).replace("\n", " ")
