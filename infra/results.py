"""Write the tables of each study in `studies/results` from the files beside them: `python infra/results.py`.

`erpe compare STUDY --format csv --output studies/results/STUDY/compare.csv` writes these files.
"""

from __future__ import annotations

from pathlib import Path

from erpe.report.comparison import compare
from erpe.report.sources.files import read
from erpe.report.tables import render

RESULTS = Path(__file__).parent.parent / "studies" / "results"
BEGIN = "\n### "
"""A page's own words end where the first table begins."""


def rewritten(folder: Path) -> str:
    """Return the page of a study with today's tables below its own words."""
    head, _, _ = (folder / "README.md").read_text().partition(BEGIN)
    tables = render(compare(read([folder / "compare.csv"])), "markdown")
    return f"{head.rstrip()}\n\n{str(tables).rstrip()}\n"


if __name__ == "__main__":
    for files in RESULTS.glob("*/compare.csv"):
        page = files.parent / "README.md"
        page.write_text(rewritten(files.parent))
        print(page)
