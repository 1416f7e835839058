"""The report of a study: one HTML page that needs nothing else, neither network nor script."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape
from matplotlib.figure import Figure

from erpe import __version__
from erpe.io import write_atomic
from erpe.plugins import plugin_flags
from erpe.report.charts import CHARTS, parts
from erpe.report.charts.captions import CAPTIONS, told
from erpe.report.charts.data import DATA
from erpe.report.comparison import Comparison
from erpe.report.decisions import VERDICTS
from erpe.report.grid import SIGNS, Row, grid
from erpe.report.labels import DATASET, ENCODING
from erpe.report.outcomes import Outcomes
from erpe.report.protocol import protocol, search_tables
from erpe.report.summary import sentences
from erpe.report.table_blocks import FAMILIES, Block, blocks
from erpe.report.tables import as_csv
from erpe.store import Store
from erpe.study.plan import Plan
from erpe.variants import ENCODINGS

COSTS = "What it costs"
"""The section that warnings about times stand in."""
SECTIONS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "Differences": ((), tuple(FAMILIES.values())),
    "How much of the gap is closed": (("gap_closed",), ("gap closed",)),
    "Accuracy": (("accuracy", "critical_difference"), ("quality on the test set", "ranks by accuracy")),
    COSTS: (("tradeoffs", "cost_against_tokens"), ("times as ratios to softmax", "size", "time and memory")),
    "Fit": (("criteria",), ("fit",)),
    "What the searches found": (("fronts",), ("Pareto fronts",)),
    "Search and training": (("search_effort", "learning_curves"), ()),
    "Where the models look": (("attention_maps",), ()),
}
"""Heading -> its charts and its tables, in the order of the page."""
GROWN = 1.4
"""A page has more room than a paper: how much larger a figure may be there."""
MEANING = {"better": "Better", "worse": "Worse", "equivalent": "Equivalent within the margin", "undecided": "Undecided"}


class Picture(NamedTuple):
    """A figure on the page, or why there is none."""

    title: str
    text: str
    svg: Markup | None
    name: str = ""
    """Of the file with its data."""
    data: str = ""
    """They, as CSV in a data URL; empty: a figure of an image has none."""


class Section(NamedTuple):
    """A heading and what is below it."""

    title: str
    name: str
    """What a link goes to."""
    warnings: list[str]
    pictures: list[Picture]
    tables: list[Block]


class Study(NamedTuple):
    """One study on one data set."""

    title: str
    name: str
    """What a link goes to."""
    facts: list[str]
    """When, and the command that repeats it."""
    file: str
    """The study file in a data URL, or nothing."""
    answer: list[str]
    encodings: list[str]
    """Columns of the grid."""
    grid: list[Row]
    forest: Picture
    sections: list[Section]
    verdicts: dict[str, list[str]]
    search: list[Block]
    protocol: dict[str, str]


def write_report(outcomes: Outcomes, comparison: Comparison, path: Path) -> Path:
    """Write the report of all studies in `outcomes`, whole or not at all; returns `path`.

    Raises:
        OSError: the folder is missing or the disk is full; an older report is intact.
    """
    write_atomic(path, page(outcomes, comparison))
    return path


def publish(plan: Plan, store: Store, outcomes: Outcomes, comparison: Comparison) -> tuple[Path, int]:
    """Write `reports/STUDY/report.html` of a study's confirmed runs and log it to MLflow, once for each content.

    Returns:
        The page, and how many changes MLflow does not show yet.
    Raises:
        StoreError: it cannot be written.
    """
    from erpe.study.reading import read_studies
    from erpe.tracking.tracker import Tracker

    folder = store.root / "reports" / plan.name
    folder.mkdir(parents=True, exist_ok=True)
    page = write_report(outcomes, comparison, folder / "report.html")
    parts = [part for part in read_studies(store) if part.experiment == plan.name]
    return page, Tracker(store, plan.name, parts=parts).close(60)


def page(outcomes: Outcomes, comparison: Comparison) -> str:
    """Return the report as HTML, the same text for the same outcomes."""
    environment = Environment(
        loader=PackageLoader("erpe", "report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, finalize=_unbroken,
    )  # fmt: skip
    studies = [_study(place, *part) for place, part in enumerate(parts(outcomes, comparison).values(), 1)]
    return environment.get_template("page.html.j2").render(
        title=", ".join(dict.fromkeys(outcomes.arms["study"])), studies=studies, signs=SIGNS, version=__version__,
        encoding_names=ENCODING, dataset_names=DATASET,
        notes=[note for note in comparison.notes if note not in comparison.time_notes],
    )  # fmt: skip


def _unbroken(value: Any) -> Any:
    """Keep a number and its per cent sign on one line."""
    return value.replace(" %", "\N{NO-BREAK SPACE}%") if isinstance(value, str) else value


def _study(place: int, outcomes: Outcomes, comparison: Comparison) -> Study:
    study, dataset = map(str, outcomes.arms[["study", "dataset"]].iloc[0])
    title, prefix = f"{study} on {dataset}", f"f{place}"
    tables = {
        block.title.removeprefix(f"{title}: "): block for block in blocks(comparison, labels=True) if block.columns
    }
    tables.pop("attention x encoding", None)  # the first screen has it
    words, rows = comparison.verdicts, grid(comparison)
    cells = [name for row in rows for name in row.cells]
    return Study(
        title,
        prefix,
        _facts(outcomes, study),
        _download(outcomes.files[study], "application/toml") if study in outcomes.files else "",
        sentences(comparison),
        [name for name in dict.fromkeys([*ENCODINGS, *cells]) if name in cells],
        rows,
        _picture(prefix, "differences", outcomes, comparison),
        list(_sections(prefix, tables, outcomes, comparison)),
        {MEANING[name]: list(words.loc[words["verdict"] == name, "text"]) for name in VERDICTS},
        search_tables(outcomes),
        protocol(outcomes),
    )


def _facts(outcomes: Outcomes, study: str) -> list[str]:
    """Return when the study ended; its file and the commands that repeat it."""
    ended = [f"Last run: {outcomes.dates[study]}"] if study in outcomes.dates else []
    given = f"{study}.toml" if study in outcomes.files else f"{study}{plugin_flags()}"  # of own images there is no file
    return [*ended, f"To repeat it: erpe study run {given}; erpe report {study}{plugin_flags()}"]


def _sections(prefix: str, tables: dict[str, Block], outcomes: Outcomes, comparison: Comparison) -> Iterator[Section]:
    dataset = outcomes.arms["dataset"].iloc[0]
    of_times = [note for note in comparison.time_notes if f" on {dataset}:" in note]
    for title, (charts, whats) in SECTIONS.items():
        asked = [name for name in charts if name != "fronts" or len(comparison.fronts)]
        pictures = [_picture(prefix, name, outcomes, comparison) for name in asked]
        shown = [_titled(what, tables.pop(what)) for what in whats if what in tables]
        if pictures or shown:
            yield Section(title, _id(prefix, title), of_times if title == COSTS else [], pictures, shown)
    if tables:
        more = [_titled(what, block) for what, block in tables.items()]
        yield Section("More", _id(prefix, "more"), [], [], more)


def _id(*parts: str) -> str:
    return re.sub("[^a-z0-9]+", "-", "-".join(parts).lower())


def _download(text: str, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(text.encode()).decode()}"


def _picture(prefix: str, name: str, outcomes: Outcomes, comparison: Comparison) -> Picture:
    words, figure = CAPTIONS[name], CHARTS[name](outcomes, comparison)
    if figure is None:
        return Picture(words.title, f"No figure: {words.missing}.", None)
    text = told(name, comparison)
    drawn = inline_svg(figure, _id(prefix, name), f"{words.title}. {text} The tables have the numbers.")
    data = _download(as_csv(DATA[name](outcomes, comparison)), "text/csv") if name in DATA else ""
    return Picture(words.title, text, drawn, f"{name}.csv", data)


def inline_svg(figure: Figure, name: str, description: str) -> Markup:
    """A figure as `<svg role="img">`, with `description` for those who do not see it; equal for equal figures.

    Args:
        name: prefix of the ids, of letters, digits and dashes, its own for each figure of a page.
    """
    out = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "erpe"}):
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = out.getvalue()
    head, body = text[text.index("<svg") :].split(">", 1)
    view = re.search(r'viewBox="([^"]+)"', head)
    assert view is not None
    body = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>|<metadata>.*?</metadata>", "", body, count=2, flags=re.DOTALL)
    body = re.sub(r'( id="|xlink:href="#|url\(#)', rf"\g<1>{name}-", body).replace("xlink:href", "href")
    body = re.sub(r"font-family: [^;]*; ?", "", body)  # the page has one for all
    width = GROWN * float(view[1].split()[2])
    label = escape(description)
    return Markup(  # matplotlib has escaped what is in the figure
        f'<svg role="img" aria-label="{label}" viewBox="{view[1]}" width="{width:.1f}pt">{body}'
    )


def _titled(what: str, block: Block) -> Block:
    return Block(what[:1].upper() + what[1:], block.columns, block.rows, block.numbers, block.lines, block.remarks)
