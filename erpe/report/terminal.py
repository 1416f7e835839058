"""A comparison for a terminal: the answer first, in the width that there is."""

from __future__ import annotations

import io
import shutil
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace

from rich.box import SIMPLE_HEAD
from rich.table import Table

from erpe.report.comparison import Comparison
from erpe.report.measures import ACCURACIES, PLUS_MINUS
from erpe.report.table_blocks import Block, blocks
from erpe.text import Terminal

NARROWEST, WIDEST = 40, 120
"""Characters of a line."""


def as_terminal(comparison: Comparison) -> str:
    """Render everything, the answer first."""
    return _shown(blocks(comparison))


def ending(comparison: Comparison) -> str:
    """Return what a study ends with: the accuracy of each arm, and the answer in sentences."""
    found = blocks(comparison)
    accuracies = [block for block in found if block.title.endswith(ACCURACIES)]
    answers = [block for block in found if block.title.endswith(": the answer")]
    return _shown([*(_only_accuracy(block) for block in accuracies), *answers])


def _only_accuracy(block: Block) -> Block:
    """Return the table of quality without precision, recall and F1."""
    rows = [row[:3] for row in block.rows]
    title = block.title.replace(ACCURACIES, "test accuracy")
    return replace(
        block,
        title=title,
        columns=block.columns[:3],
        rows=rows,
        numbers=block.numbers[:3],
        remarks=[PLUS_MINUS, *block.remarks[1:]],
        spare=(),
    )


def _shown(parts: Iterable[Block]) -> str:
    out = io.StringIO()
    width = min(WIDEST, max(NARROWEST, shutil.get_terminal_size().columns))
    console = Terminal(file=out, width=width, force_terminal=sys.stdout.isatty())
    for block in parts:
        console.print(block.title, style="bold")
        gone = _gone(console, block) if block.columns else []
        if block.columns:
            console.print(_rich(block, gone))
        if block.lines:
            console.print(_list(block.lines))
        for line in block.remarks + [f"not shown in this width: {', '.join(gone)}"] * bool(gone):
            console.print(line, style="dim")
        console.print()
    return "".join(f"{line.rstrip()}\n" for line in out.getvalue().splitlines())


def _gone(console: Terminal, block: Block) -> list[str]:
    """Return the spare columns that a terminal has no room for, beginning with the first of them."""
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
