"""Has MLflow what it acknowledged? Its database may be an older copy, have lost rows, or have been edited.

A few pages of runs tell most: which runs there are, their states, tags, parameters and last measures. Of runs that
look whole, one learning curve each is counted. Results and figures are not looked at.
"""

from __future__ import annotations

import math
from collections import defaultdict
from typing import TYPE_CHECKING, NamedTuple

from erpe.tracking.connection import runs_of
from erpe.tracking.projection import STATUS, STUDY, TRIAL
from erpe.tracking.run_state import MetricPoint, RunState, same

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run


class Lacking(NamedTuple):
    """Runs, by uid, of which MLflow has not all that the events tell. What a user deleted is not among them."""

    missing: set[str]
    """Not there at all."""
    short: set[str]
    """Without some of their parameters, tags or measures, or in another state."""


def audit(client: MlflowClient, experiment: str, expected: dict[str, RunState]) -> Lacking:
    """Compare an experiment with what the events tell of its runs."""
    from mlflow.entities import ViewType

    there: defaultdict[str, list[Run]] = defaultdict(list)
    for run in runs_of(client, experiment, ViewType.ALL):
        there[run.data.tags.get(TRIAL) or run.data.tags.get(STUDY, "")].append(run)
    alive = {
        uid: active
        for uid, runs in there.items()
        if (active := [r for r in runs if r.info.lifecycle_stage == "active"])
    }
    missing = expected.keys() - there.keys()
    short = {
        uid for uid in expected.keys() & alive.keys()
        if expected[uid].parent in missing or len(alive[uid]) > 1 or _lacks(client, expected[uid], alive[uid][0], alive)
    }  # fmt: skip
    return Lacking(missing, short)


def _lacks(client: MlflowClient, known: RunState, run: Run, alive: dict[str, list[Run]]) -> bool:
    tags, parents = run.data.tags, alive.get(known.parent or "")
    return (
        not known.tags <= tags.keys()
        or not known.params <= run.data.params.keys()
        or _other_state(known.state, tags.get("state", ""), run.info.status)
        or (known.state not in ("", "RUNNING") and known.ended not in (0, run.info.end_time))
        or (parents is not None and tags.get("mlflow.parentRunId") != parents[0].info.run_id)
        or any(_behind(client, run, name, point) for name, point in known.latest.items())
        or _gaps(client, known, run.info.run_id)
    )


def _other_state(told: str, state: str, status: str) -> bool:
    """Tell whether a state is behind; an end that the outbox has lost stays."""
    if state != told and not (told == "RUNNING" and state in STATUS) and told:
        return True
    return bool(state) and status != ("RUNNING" if state == "RUNNING" else STATUS.get(state, "KILLED"))


def _behind(client: MlflowClient, run: Run, name: str, point: MetricPoint) -> bool:
    if name not in run.data.metrics:
        return True
    # a database may have no infinity
    if same(run.data.metrics[name], point.value) or math.isinf(point.value):
        return False
    return max(metric.step for metric in client.get_metric_history(run.info.run_id, name)) <= point.step


def _gaps(client: MlflowClient, known: RunState, run: str) -> bool:
    """Whether an epoch is missing; an epoch's measures are written together, so that one of them tells."""
    for name, epochs in known.curves.most_common(1):
        return len({metric.step for metric in client.get_metric_history(run, name)} & known.steps) < epochs
    return False
