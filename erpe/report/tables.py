"""A comparison as tables to read (terminal, Markdown, LaTeX) or to compute with (CSV, Parquet, JSON).

Readable tables come a study and data set at a time, in blocks that fit 80 columns; `tidy` has every number in full.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pandas as pd

from erpe.errors import ConfigError, nearest
from erpe.report.comparison import Comparison, compare
from erpe.report.latex import as_latex
from erpe.report.outcomes import Outcomes
from erpe.report.pairing import arm_keys
from erpe.report.protocol import search_tables
from erpe.report.table_blocks import blocks
from erpe.report.terminal import as_terminal
from erpe.text import printable

__all__ = ["FORMATS", "TIDY", "Comparison", "as_csv", "compare", "render", "tidy"]

TIDY = {
    "table": "summary, difference, gap, ratio, rank, friedman or nemenyi",
    "study": "name of the study",
    "dataset": "data set",
    "arm": "variant with its switches; empty for friedman, which is of all arms",
    "against": "the arm it is compared with; for gap its Performer baseline; empty for summary and rank",
    "against_study": "the study of that arm",
    "kind": "of the pair: gap, encoding, softmax, replacement, switch or study",
    "measure": "name as in MLflow; gap/size is softmax - baseline, gap/closed the part of it that the arm closes",
    "mean": "mean over seeds, mean difference (arm minus against), ratio of times (arm over against, geometric mean), "
    "average rank, statistic or part; full precision, in the unit of the measure (accuracy in [0, 1], nats, FLOPs an "
    "image, ms, s, MiB)",
    "low": "lower end of the 95 % interval",
    "high": "upper end of the 95 % interval",
    "n": "seeds, or common seeds",
    "p": "p-value: paired t-test, Friedman's, Nemenyi's",
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
        "ratio": comparison.ratios.rename(columns={"ratio": "mean"}),
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


def as_csv(table: pd.DataFrame) -> str:
    """Return a table as CSV; a text that a spreadsheet would take for a formula begins with an apostrophe."""
    words = {name: table[name].map(_unformulated) for name in table if pd.api.types.is_string_dtype(table[name])}
    return table.assign(**words).to_csv(index=False)


def _unformulated(text: Any) -> Any:
    return f"'{text}" if isinstance(text, str) and text.startswith(("=", "+", "-", "@", "\t", "\r")) else text


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
    """Text escaped for Markdown."""
    text = printable(text).replace("\n", " ")
    for sign in "\\|*_`<[":
        text = text.replace(sign, "\\" + sign)
    return text


FORMATS: dict[str, Callable[[Comparison], str | bytes]] = {
    "terminal": as_terminal, "markdown": _markdown, "csv": lambda found: as_csv(tidy(found)),
    "parquet": lambda found: tidy(found).to_parquet(index=False), "json": _json, "latex": as_latex,
}  # fmt: skip
"""Name of a format -> what writes it; Parquet is bytes, all others text."""


def render(comparison: Comparison, format: str, outcomes: Outcomes | None = None) -> str | bytes:
    """Return a comparison in one of `FORMATS`.

    Args:
        outcomes: what it compares; then LaTeX has the tables of the searches and of the best settings, too.
    Raises:
        ConfigError: there is no such format.
    """
    if format not in FORMATS:
        raise ConfigError(f"unknown format {format!r}; {nearest(format, FORMATS)}")
    if format == "latex" and outcomes is not None:
        studies = outcomes.arms[["study", "dataset"]].drop_duplicates().itertuples(index=False, name=None)
        searches = [table for study in studies for table in search_tables(outcomes.only(*study))]
        return as_latex(comparison, searches)
    return FORMATS[format](comparison)
