"""The end of a study: its page beside the store's other things, and in MLflow."""

from __future__ import annotations

import hashlib
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
        The page, and how many events MLflow has not got yet.
    Raises:
        StoreError: it cannot be written.
    """
    from erpe.report.page import write_report
    from erpe.tracking.tracker import Tracker

    folder = store.root / "reports" / plan.name
    folder.mkdir(parents=True, exist_ok=True)
    page = write_report(outcomes, comparison, folder / "report.html")
    tracker = Tracker(store, plan.name)
    uid, digest = f"report of {plan.name}", hashlib.sha256(page.read_bytes()).hexdigest()
    tags = {"study": plan.name, "dataset": str(plan.dataset), "phase": "report", "report_sha256": digest}
    tracker.start_study(uid, plan.model_dump(mode="json"), tags, name=f"{plan.name} report")
    tracker.end_study(uid, None, {}, folder, "COMPLETE", name=f"{plan.name} report")
    return page, tracker.close(60)
