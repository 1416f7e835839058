"""The end of a study: its page beside the store's other things, and in MLflow."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from erpe.store import Store
from erpe.study.plan import Plan

if TYPE_CHECKING:
    from erpe.report.comparison import Comparison
    from erpe.report.outcomes import Outcomes


def publish(plan: Plan, store: Store, outcomes: Outcomes, comparison: Comparison) -> tuple[Path, int]:
    """Write `reports/STUDY/report.html` of a study's confirmed runs and log it to MLflow, once for each content.

    Returns:
        The page, and how many changes MLflow does not show yet.
    Raises:
        StoreError: it cannot be written.
    """
    from erpe.report.page import write_report
    from erpe.study.reading import read_studies
    from erpe.tracking.tracker import Tracker, is_running

    folder = store.root / "reports" / plan.name
    folder.mkdir(parents=True, exist_ok=True)
    page = write_report(outcomes, comparison, folder / "report.html")
    parts = [part for part in read_studies(store) if part.experiment == plan.name]
    return page, Tracker(store, plan.name, elsewhere=is_running(store, parts)).close(60)
