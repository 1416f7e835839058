"""Write the tables of each study in `studies/results`, and README's grids, from the files beside them.

    python infra/results.py

`erpe compare STUDY --format csv --output studies/results/STUDY/compare.csv` writes these files. A grid of README stands
between `<!-- grid of STUDY -->` and an empty line.
"""

from __future__ import annotations

import re
from pathlib import Path

from erpe.report.comparison import Comparison, compare
from erpe.report.grid import SIGNS, Cell, grid
from erpe.report.labels import DATASET, ENCODING
from erpe.report.sources.files import read
from erpe.report.tables import render
from erpe.variants import ENCODINGS

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "studies" / "results"
BEGIN = "\n### "
"""A page's own words end where the first table begins."""


def compared(folder: Path) -> Comparison:
    """Return what the files of a study say."""
    return compare(read([folder / "compare.csv"]))


def page(folder: Path, comparison: Comparison) -> str:
    """Return the page of a study with today's tables below its own words."""
    head, _, _ = (folder / "README.md").read_text().partition(BEGIN)
    return f"{head.rstrip()}\n\n{str(render(comparison, 'markdown')).rstrip()}\n"


def with_grid(readme: str, study: str, comparison: Comparison) -> str:
    """Return README with the grid of a study as it is today, where it has one."""
    dataset = str(comparison.arms["dataset"].iloc[0])
    titles = [DATASET[dataset], "no encoding", *(ENCODING[name] for name in ENCODINGS if name != "none")]
    rows = [[row.label, *(_told(row.cells.get(name)) for name in ENCODINGS)] for row in grid(comparison)]
    lines = [titles, ["---", *["---:"] * len(ENCODINGS)], *rows]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    start = f"<!-- grid of {study} -->\n"
    return re.sub(f"{re.escape(start)}.*?\n\n", lambda _: f"{start}{table}\n\n", readme, flags=re.DOTALL)


def _told(cell: Cell | None) -> str:
    if cell is None:
        return ""
    return cell.accuracy + (f" ({cell.difference} {SIGNS[cell.verdict]})" if cell.against else "")


if __name__ == "__main__":
    for files in RESULTS.glob("*/compare.csv"):
        found = compared(files.parent)
        readme = ROOT / "README.md"
        readme.write_text(with_grid(readme.read_text(), files.parent.name, found))
        own = files.parent / "README.md"
        own.write_text(page(files.parent, found))
        print(own)
