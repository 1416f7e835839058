"""The figures of a study, as matplotlib objects without pyplot, and as files for a paper.

Each function of `CHARTS` takes the outcomes of one study on one data set and their comparison (see `parts`), and
returns None where there is nothing to draw.
"""

from __future__ import annotations

import functools
import io
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from erpe.io import write_atomic
from erpe.report.charts import costs, curves, effort, forest, fronts, intervals, tokens
from erpe.report.charts.style import COLUMN, FONTS, FULL, INK, SMALL, blank, dress, marks
from erpe.report.comparison import Comparison
from erpe.report.outcomes import Outcomes
from erpe.report.ranks import nemenyi_matrix
from erpe.report.statistics import ALPHA

MOST_RANKED = 12
Chart = Callable[[Outcomes, Comparison], Figure | None]


def critical_difference(outcomes: Outcomes, comparison: Comparison) -> Figure | None:
    """Mean rank over seeds of each arm by test accuracy (1: the best); a bar joins arms that Nemenyi's test cannot tell
    apart. A block is a seed. None for fewer than three arms or five common seeds, or more arms than names have room.

    Source: Demšar 2006 (JMLR 7); scikit-posthocs.
    """
    if comparison.nemenyi.empty:
        return None
    import scikit_posthocs  # brings the whole of seaborn: seconds

    p, table = nemenyi_matrix(comparison.nemenyi), comparison.ranks.set_index("arm")["rank"]
    if p.empty or len(p) > MOST_RANKED:
        return None
    ranks, shown = table.loc[p.index], marks(outcomes.arms)
    figure = blank(FULL, 1.2 + 0.3 * math.ceil(len(ranks) / 2))
    axes = figure.add_subplot()
    drawn = scikit_posthocs.critical_difference_diagram(
        ranks, p, alpha=ALPHA, ax=axes, text_h_margin=0.02 * len(ranks),
        label_fmt_left="{label} ({rank:.1f})", label_fmt_right="({rank:.1f}) {label}",
        label_props={"fontsize": SMALL}, color_palette={arm: shown[arm].colour for arm in ranks.index},
        crossbar_props={"color": INK, "linewidth": 2.2, "solid_capstyle": "butt"}, elbow_props={"linewidth": 1.0},
    )  # fmt: skip
    for (bar,) in drawn["crossbars"]:
        bar.set_data([bar.get_xdata().min(), bar.get_xdata().max()], bar.get_ydata()[:2])  # there and back is thicker
    for elbow in drawn["elbows"]:
        elbow.set_clip_on(False)  # they reach beyond the first and the last rank
    for name in drawn["labels"]:
        name.set_color(INK)  # small text in a colour is hard to read
        for arm in sorted(ranks.index, key=len, reverse=True):
            if arm in name.get_text():
                name.set_text(name.get_text().replace(arm, shown[arm].label))
                break
    for round_marker in drawn["markers"]:
        round_marker.remove()
    for arm, rank in ranks.items():
        axes.plot(rank, 0, clip_on=False, zorder=4, **shown[str(arm)].dot(7))
    dress(axes, grid="none")
    axes.spines["bottom"].set_visible(False)
    axes.spines["left"].set_visible(False)
    axes.spines["top"].set(visible=True, color=INK)
    axes.set_xlim(1, len(ranks))
    axes.set_xticks(range(1, len(ranks) + 1, math.ceil(len(ranks) / 14)))
    axes.xaxis.set_label_position("top")
    axes.set_xlabel("mean rank by test accuracy (1 is the best)")
    return figure


CHARTS: dict[str, Chart] = {
    "differences": forest.differences,
    "accuracy": intervals.accuracy,
    "tradeoffs": costs.tradeoffs,
    "gap_closed": intervals.gap_closed,
    "critical_difference": critical_difference,
    "learning_curves": lambda outcomes, comparison: curves.learning_curves(outcomes),
    "criteria": intervals.criteria,
    "attention_maps": lambda outcomes, comparison: curves.attention_maps(outcomes),
    "fronts": fronts.fronts,
    "search_effort": lambda outcomes, comparison: effort.search_effort(outcomes),
    "cost_against_tokens": tokens.cost_against_tokens,
}
"""In the order of the page."""

NARROW = {"differences": forest.differences, "accuracy": intervals.accuracy, "gap_closed": intervals.gap_closed}
"""Those which one column of a paper has room for; the others have a panel for each attention and take both."""


def parts(outcomes: Outcomes, comparison: Comparison) -> dict[str, tuple[Outcomes, Comparison]]:
    """Each study on each data set by itself, as the charts want it, under its name: "STUDY" or "STUDY-DATASET".

    Figures never mix studies: their seeds are no pairs and their budgets differ.
    """
    found = {}
    for study, dataset in outcomes.arms[["study", "dataset"]].drop_duplicates().itertuples(index=False):
        several = outcomes.arms.loc[outcomes.arms["study"] == study, "dataset"].nunique() > 1
        name = f"{study}-{dataset}" if several else str(study)
        found[name] = (outcomes.only(str(study), str(dataset)), comparison.only(str(study), str(dataset)))
    return found


def save_all(
    outcomes: Outcomes,
    comparison: Comparison,
    folder: Path,
    formats: Sequence[str] = ("pdf", "svg"),
    font: str = "sans",
) -> list[Path]:
    """Write every figure that can be drawn as `folder/NAME.FORMAT`, of several studies as `folder/STUDY/NAME.FORMAT`.

    Those of `NARROW` are there a second time, as wide as one column of a paper, as `NAME_column.FORMAT`.

    Equal outcomes give equal files: no dates, no random names inside.
    Args:
        font: one of `FONTS`.
    Raises:
        OSError: the folder cannot be written.
    """
    written = []
    studies = parts(outcomes, comparison)
    for study, part in studies.items():
        place = folder / re.sub(r"[^\w-]", "_", study) if len(studies) > 1 else folder
        place.mkdir(parents=True, exist_ok=True)
        narrow = {f"{name}_column": functools.partial(chart, width=COLUMN) for name, chart in NARROW.items()}
        for name, chart in (CHARTS | narrow).items():
            with matplotlib.rc_context({"font.family": FONTS[font], "mathtext.fontset": "stix"}):
                figure = chart(*part)
                if figure:
                    for kind in formats:
                        written.append(place / f"{name}.{kind}")
                        write(figure, written[-1])
    return written


def write(figure: Figure, path: Path) -> None:
    """Write a figure by the end of its name, the same bytes for the same figure."""
    drawn = io.BytesIO()
    dated = {"pdf": {"CreationDate": None}, "svg": {"Date": None}}
    with matplotlib.rc_context({"svg.hashsalt": "erpe", "pdf.fonttype": 42}):
        figure.savefig(drawn, format=path.suffix[1:], dpi=150, metadata=dated.get(path.suffix[1:]))
    write_atomic(path, drawn.getvalue())
