"""What a search of several objectives ends with: the trials that no other one dominates."""

from __future__ import annotations

from rich.box import SIMPLE
from rich.table import Table

from erpe.study.objectives import Goals, shown

Front = dict[int, dict[str, float]]


def front_table(goals: Goals, fronts: dict[str, Front]) -> Table:
    """Return the front of each study or arm, a row a trial with its objectives."""
    within = f"; at most {goals.limits}" if goals.limits else ""
    table = Table(box=SIMPLE, title=f"Pareto front: {', '.join(goals.objectives)}{within}", title_justify="left")
    table.add_column("arm" if len(fronts) > 1 else "study", overflow="fold")
    for name in ("trial", *goals.objectives):
        table.add_column(name, justify="right", no_wrap=True)
    for arm, front in fronts.items():
        for trial, values in front.items():
            table.add_row(arm, str(trial), *(shown(name, values[name]) for name in goals.objectives))
    return table


def refusals(count: int, goals: Goals) -> str:
    """Return how many draws cost too much: `, 7 draws above flops 20,000,000 not trained`; or nothing."""
    return f", {count} draw{'s' * (count != 1)} above {goals.limits} not trained" if count else ""
