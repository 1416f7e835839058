"""A comparison as tables to read (terminal, Markdown, LaTeX) or to compute with (CSV, Parquet, JSON).

Readable tables come a study and data set at a time, in blocks that fit 80 columns; `tidy` has every number in full.
"""

from __future__ import annotations

import io
import json
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from typing import Any

import pandas as pd
from rich.box import SIMPLE_HEAD
from rich.table import Table

from erpe.errors import ConfigError, nearest
from erpe.report.comparison import Comparison, compare
from erpe.report.pairing import arm_keys
from erpe.report.table_blocks import Block, blocks
from erpe.text import Terminal, printable

__all__ = ["FORMATS", "TIDY", "Comparison", "compare", "render", "tidy"]

TIDY = {
    "table": "summary, difference, gap, rank, friedman or nemenyi",
    "study": "name of the study",
    "dataset": "data set",
    "arm": "variant with its switches; empty for friedman, which is of all arms",
    "against": "the arm it is compared with; for gap its Performer baseline; empty for summary and rank",
    "against_study": "the study of that arm",
    "kind": "of the pair: baseline, softmax, switch or study",
    "measure": "name as in MLflow; mcnemar/only_arm and mcnemar/only_against count test images that only one has "
    "right, mcnemar/seeds_significant the seeds with a corrected p below 0.05; gap/size is softmax - baseline, "
    "gap/closed the part of it that the arm closes",
    "mean": "mean over seeds, mean difference (arm minus against), average rank, statistic, count or part; full "
    "precision, in the unit of the measure (accuracy in [0, 1], nats, FLOPs an image, ms, s, MiB)",
    "low": "lower end of the 95 % interval",
    "high": "upper end of the 95 % interval",
    "n": "seeds, or common seeds",
    "p": "p-value: paired t-test, median over seeds of McNemar's, Friedman's, Nemenyi's",
    "p_holm": "the same after Holm's correction, for difference; for gap/size that of the difference",
    "preliminary": "true where an arm of the test is unfinished",
    "mark": "what is amiss with the arm: unfinished (2 of 5 seeds), or run by another version of erpe",
}
"""Columns of `tidy`, of CSV and of Parquet."""


def tidy(comparison: Comparison) -> pd.DataFrame:
    """Every number of a comparison, a row each, in full precision; what does not apply is missing. See `TIDY`."""
    gaps = comparison.gaps.rename(columns={"baseline": "against"})
    of_size = {"gap": "mean", "gap_low": "low", "gap_high": "high", "gap_p": "p_holm", "gap_n": "n"}
    size = gaps.drop(columns=["low", "high", "n"]).rename(columns=of_size)
    parts = {
        "summary": comparison.summary,
        "difference": comparison.differences.rename(columns={"difference": "mean"}),
        "gap": pd.concat([size.assign(measure="gap/size"), gaps.rename(columns={"closed": "mean"}).drop(columns="gap")
                          .assign(measure="gap/closed")]),
        "rank": comparison.ranks.rename(columns={"rank": "mean"}),
        "friedman": comparison.friedman.rename(columns={"statistic": "mean"}),
        "nemenyi": comparison.nemenyi,
    }  # fmt: skip
    marks = dict(zip(arm_keys(comparison.arms), comparison.arms["mark"], strict=True))
    frames = []
    for name, frame in parts.items():
        shown = frame.assign(table=name).reindex(columns=list(TIDY))
        shown["mark"] = [marks.get(key) or None for key in arm_keys(shown)]
        frames.append(shown.astype(TYPES))
    return pd.concat(frames, ignore_index=True)


TYPES = dict.fromkeys("table study dataset arm against against_study kind measure mark".split(), "string") | {
    **dict.fromkeys("mean low high p p_holm".split(), "float64"), "n": "Int64", "preliminary": "boolean",
}  # fmt: skip


def _csv(comparison: Comparison) -> str:
    """A text that a spreadsheet would take for a formula begins with an apostrophe."""
    table = tidy(comparison)
    words = {name: [_unformulated(text) for text in table[name]] for name, kind in TYPES.items() if kind == "string"}
    return table.assign(**words).to_csv(index=False)


def _unformulated(text: Any) -> Any:
    return f"'{text}" if isinstance(text, str) and text.startswith(("=", "+", "-", "@", "\t", "\r")) else text


def _parquet(comparison: Comparison) -> bytes:
    found: bytes = tidy(comparison).to_parquet(index=False)
    return found


def _json(comparison: Comparison) -> str:
    """`columns` tells what is what, `rows` are those of `tidy`, `verdicts` and `notes` are words."""
    found = {
        "columns": TIDY, "arms": _records(comparison.arms), "rows": _records(tidy(comparison)),
        "verdicts": _records(comparison.verdicts), "notes": list(comparison.notes),
    }  # fmt: skip
    return json.dumps(found, indent=1, allow_nan=False, ensure_ascii=False, default=lambda number: number.item()) + "\n"


def _records(table: pd.DataFrame) -> list[dict[Any, Any]]:
    words = table.astype(object)
    return words.where(words.notna(), None).to_dict("records")


def _terminal(comparison: Comparison) -> str:
    out = io.StringIO()
    width = min(120, max(60, shutil.get_terminal_size().columns))
    console = Terminal(file=out, width=width, force_terminal=sys.stdout.isatty())
    for block in blocks(comparison):
        console.print(block.title, style="bold")
        gone = _gone(console, block) if block.columns else []
        if block.columns:
            console.print(_rich(block, gone))
        if block.lines:
            console.print(_list(block.lines))
        for line in block.remarks + [f"not shown in this width: {', '.join(gone)}"] * bool(gone):
            console.print(line, style="dim")
        console.print()
    return out.getvalue()


def _gone(console: Terminal, block: Block) -> list[str]:
    """The spare columns that a terminal has no room for, beginning with the first of them."""
    for count in range(len(block.spare) + 1):
        needed = console.measure(_rich(block, block.spare[:count]), options=console.options.update(width=1000)).maximum
        if needed <= console.width:
            return list(block.spare[:count])
    return list(block.spare)


def _rich(block: Block, without: Sequence[str] = ()) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    shown = [place for place, name in enumerate(block.columns) if name not in without]
    for place in shown:
        table.add_column(block.columns[place], justify="right" if block.numbers[place] else "left", overflow="fold")
    for row in block.rows:
        table.add_row(*(row[place] for place in shown))
    return table


def _list(lines: list[str]) -> Table:
    grid = Table.grid(padding=(0, 1))
    for line in lines:
        grid.add_row("-", line)
    return grid


def _markdown(comparison: Comparison) -> str:
    parts = []
    for block in blocks(comparison):
        lines = [f"### {_plain(block.title)}", ""]
        if block.columns:
            rule = ["---:" if right else "---" for right in block.numbers]
            body = [[_plain(cell) for cell in row] for row in [block.columns, *block.rows]]
            lines += [f"| {' | '.join(row)} |" for row in [body[0], rule, *body[1:]]] + [""]
        lines += [f"- {_plain(line)}" for line in block.lines] + [""] * bool(block.lines)
        lines += [line for remark in block.remarks for line in (_plain(remark), "")]
        parts.append("\n".join(lines))
    return "\n".join(parts)


def _plain(text: str) -> str:
    """Text that Markdown shows as it is."""
    text = printable(text).replace("\n", " ")
    for sign in "\\|*_`<[":
        text = text.replace(sign, "\\" + sign)
    return text


def _latex(comparison: Comparison) -> str:
    """To be put into a document that uses the package booktabs."""
    parts = ["% needs \\usepackage{booktabs}"]
    for block in blocks(comparison):
        title = _tex(block.title)
        if block.columns:
            table = pd.DataFrame(block.rows, columns=block.columns, dtype=str).map(_tex)
            caption = "; ".join([title, *map(_tex, block.remarks)])
            columns = "".join("r" if right else "l" for right in block.numbers)
            parts.append(
                table.rename(columns=_tex).to_latex(
                    index=False, escape=False, position="htbp", caption=caption, column_format=columns
                )
            )
        if block.lines:
            items = "\n".join(f"  \\item {_tex(line)}" for line in block.lines)
            parts.append(f"\\paragraph{{{title}}}\n\\begin{{itemize}}\n{items}\n\\end{{itemize}}\n")
    return "\n".join(parts)


SIGNS = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "<": r"$<$", ">": r"$>$", "*": r"$^{*}$",
}  # fmt: skip


def _tex(text: str) -> str:
    text = printable(text).replace("\n", " ")
    return re.sub(r"(?<!\w)-(?=\d)", "$-$", "".join(SIGNS.get(sign, sign) for sign in text))


FORMATS: dict[str, Callable[[Comparison], str | bytes]] = {
    "terminal": _terminal, "markdown": _markdown, "csv": _csv, "parquet": _parquet, "json": _json, "latex": _latex,
}  # fmt: skip
"""Name of a format -> what writes it; Parquet is bytes, all others text."""


def render(comparison: Comparison, format: str) -> str | bytes:
    """A comparison in one of `FORMATS`.

    Raises:
        ConfigError: there is no such format.
    """
    if format not in FORMATS:
        raise ConfigError(f"unknown format {format!r}; {nearest(format, FORMATS)}")
    return FORMATS[format](comparison)
