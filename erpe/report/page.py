"""The report of a study: one HTML page that needs nothing else, neither network nor script."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from erpe import __version__
from erpe.io import write_atomic
from erpe.report.charts import CHARTS, parts
from erpe.report.charts.captions import CAPTIONS, told
from erpe.report.comparison import Comparison
from erpe.report.decisions import VERDICTS
from erpe.report.outcomes import Outcomes
from erpe.report.protocol import protocol, search_table
from erpe.report.summary import sentences
from erpe.report.svg import inline_svg
from erpe.report.table_blocks import FAMILIES, Block, blocks

SECTIONS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "Differences": (("differences",), ("attention x encoding", *FAMILIES.values())),
    "How much of the gap is closed": (("gap_closed",), ("gap closed",)),
    "Accuracy": (("accuracy", "critical_difference"), ("quality on the test set", "ranks by accuracy")),
    "What it costs": (("tradeoffs", "cost_against_tokens"), ("size", "time and memory")),
    "Fit": (("criteria",), ("fit",)),
    "Training": (("learning_curves",), ()),
    "Where the models look": (("attention_maps",), ()),
}
"""Heading -> its charts and its tables, in the order of the page."""
MEANING = {
    "better": "Better",
    "worse": "Worse",
    "equivalent": "Equivalent within the margin",
    "undecided": "Undecided",
}


class Picture(NamedTuple):
    """A figure on the page, or why there is none."""

    title: str
    text: str
    svg: Markup | None


class Section(NamedTuple):
    """A heading and what is below it."""

    title: str
    pictures: list[Picture]
    tables: list[Block]


class Study(NamedTuple):
    """One study on one data set."""

    title: str
    answer: list[str]
    sections: list[Section]
    verdicts: dict[str, list[str]]
    search: Block
    protocol: dict[str, str]


def write_report(outcomes: Outcomes, comparison: Comparison, path: Path) -> Path:
    """Write the report of all studies in `outcomes`, whole or not at all; returns `path`.

    Raises:
        OSError: the folder is missing or the disk is full; an older report is intact.
    """
    write_atomic(path, page(outcomes, comparison))
    return path


def page(outcomes: Outcomes, comparison: Comparison) -> str:
    """Return the report as HTML, the same text for the same outcomes."""
    environment = Environment(
        loader=PackageLoader("erpe", "report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    studies = [_study(place, *part) for place, part in enumerate(parts(outcomes, comparison).values(), 1)]
    found: str = environment.get_template("page.html.j2").render(
        title=", ".join(dict.fromkeys(outcomes.arms["study"])), studies=studies, notes=comparison.notes,
        version=__version__,
    )  # fmt: skip
    return found


def _study(place: int, outcomes: Outcomes, comparison: Comparison) -> Study:
    study, dataset = outcomes.arms[["study", "dataset"]].iloc[0]
    title = f"{study} on {dataset}"
    tables = {block.title.removeprefix(f"{title}: "): block for block in blocks(comparison) if block.columns}
    columns, rows = search_table(outcomes)
    told = comparison.verdicts
    return Study(
        title,
        sentences(comparison),
        list(_sections(f"f{place}", tables, outcomes, comparison)),
        {MEANING[name]: list(told.loc[told["verdict"] == name, "text"]) for name in VERDICTS},
        Block("Search and best configurations", columns, rows, [place > 0 for place in range(len(columns))], [], []),
        protocol(outcomes),
    )


def _sections(prefix: str, tables: dict[str, Block], outcomes: Outcomes, comparison: Comparison) -> Iterator[Section]:
    for title, (charts, whats) in SECTIONS.items():
        pictures = [_picture(f"{prefix}-{name}", name, outcomes, comparison) for name in charts]
        yield Section(title, pictures, [_titled(what, tables.pop(what)) for what in whats if what in tables])
    if tables:
        yield Section("More", [], [_titled(what, block) for what, block in tables.items()])


def _picture(ids: str, name: str, outcomes: Outcomes, comparison: Comparison) -> Picture:
    words, figure = CAPTIONS[name], CHARTS[name](outcomes, comparison)
    if figure is None:
        return Picture(words.title, f"No figure: {words.missing}.", None)
    text = told(name, comparison)
    drawn = inline_svg(figure, re.sub("[^a-z0-9]", "-", ids), f"{words.title}. {text} The tables have the numbers.")
    return Picture(words.title, text, drawn)


def _titled(what: str, block: Block) -> Block:
    return Block(what[:1].upper() + what[1:], block.columns, block.rows, block.numbers, block.lines, block.remarks)
