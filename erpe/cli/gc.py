"""What `erpe gc` says: what goes of each study, what stays and why."""

from __future__ import annotations

from typing import Any

from rich.box import SIMPLE
from rich.table import Table

from erpe.retention.gc import Sweep, Swept
from erpe.store import Store
from erpe.text import Terminal, printable


def sweep_table(found: Sweep, store: Store, dry_run: bool) -> None:
    """For people."""
    console = Terminal()
    if found.studies:
        table = Table(box=SIMPLE, title="what goes, and what stays and why", title_justify="left")
        table.add_column("study", overflow="fold")
        for name in ("trials", "checkpoints", "artifacts"):
            table.add_column(name, justify="right")
        table.add_column("stays")
        for swept in found.studies:
            table.add_row(*_cells(swept), style="" if swept.going else "dim")
        console.print_table(table)
    for experiment in found.running:
        print(f"{printable(experiment)}: another erpe is running it, so it was left alone")
    words = "belongs to nothing" if dry_run else "belonged to nothing, removed"
    for path, mib in found.strays:
        print(f"{printable(str(path.relative_to(store.root)))}: {words}, {_mib(mib)}")
    for line in _end(found, dry_run):
        print(printable(line))


def _cells(swept: Swept) -> list[str]:
    stays = ", ".join(f"{len(numbers)} {why}" for why, numbers in swept.staying.items())
    sizes = (_mib(size) if swept.going else "" for size in (swept.checkpoints_mib, swept.artifacts_mib))
    return [swept.study, str(len(swept.going)), *sizes, stays]


def _mib(size: float) -> str:
    return f"{size:,.1f} MiB"


def _end(found: Sweep, dry_run: bool) -> list[str]:
    """The sum, and what is left to others."""
    trials = sum(len(swept.going) for swept in found.studies)
    freed = sum(swept.checkpoints_mib + swept.artifacts_mib for swept in found.studies)
    freed += sum(stray.mib for stray in found.strays)
    what = f"{trials} trials" + (f" and {len(found.strays)} things that belong to nothing" if found.strays else "")
    lines = [f"{what}, {_mib(freed)}: " + ("would go; nothing was changed" if dry_run else "removed")]
    if found.on_server and trials:
        lines.append("rows of deleted runs stay in the tracking server's database until its own `mlflow gc`")
    if found.lag:
        why = f" ({found.problem})" if found.problem else ""
        lines.append(f"{found.lag} events wait for MLflow; erpe sync sends them{why}")
    return lines


def sweep_json(found: Sweep, store: Store, dry_run: bool) -> dict[str, Any]:
    """For scripts."""
    return {
        "dry_run": dry_run,
        "studies": [swept._asdict() for swept in found.studies],
        "running": found.running,
        "strays": [{"path": str(path.relative_to(store.root)), "mib": mib} for path, mib in found.strays],
        "lag": found.lag, "problem": found.problem, "on_server": found.on_server,
    }  # fmt: skip
