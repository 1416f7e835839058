"""What `erpe gc` says: what goes of each study, what stays and why."""

from __future__ import annotations

from collections import Counter
from typing import Any

from rich.box import SIMPLE
from rich.table import Table

from erpe.retention.gc import Sweep, Swept
from erpe.store import Store, store_flag
from erpe.study.naming import part_name
from erpe.text import Terminal, changes_wait, counted, printable


def sweep_table(found: Sweep, store: Store, dry_run: bool) -> None:
    """For people."""
    console = Terminal()
    if found.studies:
        table = Table(box=SIMPLE, title="what goes, and what stays and why", title_justify="left")
        table.add_column("study", overflow="fold")
        for name in ("trials", "checkpoints", "artifacts"):
            table.add_column(name, justify="right")
        table.add_column("stays")
        for name, parts in _folded(found.studies).items():
            table.add_row(name, *_cells(parts), style="" if any(part.going for part in parts) else "dim")
        console.print_table(table)
    for experiment in found.running:
        print(f"{printable(experiment)}: another erpe is running it, so it was left alone")
    words = "belongs to nothing" if dry_run else "belonged to nothing, removed"
    for path, mib in found.strays:
        print(f"{printable(str(path.relative_to(store.root)))}: {words}, {_mib(mib)}")
    for line in _end(found, store, dry_run):
        print(printable(line))


def _folded(studies: list[Swept]) -> dict[str, list[Swept]]:
    """Row -> its parts: a study, or an arm where only one study is looked at."""
    one = len({swept.study for swept in studies}) == 1
    found: dict[str, list[Swept]] = {}
    for swept in studies:
        found.setdefault(part_name(swept.study, swept.arm if one else "", "search"), []).append(swept)
    return found


def _cells(parts: list[Swept]) -> list[str]:
    going, stays = sum(len(part.going) for part in parts), Counter[str]()
    for part in parts:
        stays.update({why: len(numbers) for why, numbers in part.staying.items()})
    sizes = (sum(part.checkpoints_mib for part in parts), sum(part.artifacts_mib for part in parts))
    told = ", ".join(f"{count} {why}" for why, count in stays.items())
    return [str(going), *(_mib(size) if going else "" for size in sizes), told]


def _mib(size: float) -> str:
    return f"{size:,.1f} MiB"


def _end(found: Sweep, store: Store, dry_run: bool) -> list[str]:
    """Return the sum, and what is left to others."""
    trials = sum(len(swept.going) for swept in found.studies)
    freed = sum(swept.checkpoints_mib + swept.artifacts_mib for swept in found.studies)
    freed += sum(stray.mib for stray in found.strays)
    what = counted(trials, "trial")
    if found.strays:
        what += f" and {counted(len(found.strays), 'thing')} of no trial and no run"
    lines = [f"{what}, {_mib(freed)}: " + ("would go; nothing was changed" if dry_run else "removed")]
    if found.on_server and trials:
        lines.append("rows of deleted runs stay in the tracking server's database until its own `mlflow gc`")
    if found.lag:
        why = f" ({found.problem})" if found.problem else ""
        lines.append(f"{changes_wait(found.lag)} for MLflow; erpe sync{store_flag(store.root)} sends them{why}")
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
