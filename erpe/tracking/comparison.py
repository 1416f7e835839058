"""What MLflow shows of a study, and what is left to do until it shows what it should.

seen = image_of(uid, runs, uids)                       # what its runs show
calls = diff(want, read_points(client, want, seen))    # empty where all is there; each call may be repeated
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from erpe.tracking.artifacts import FACTS
from erpe.tracking.descriptions import NOTE
from erpe.tracking.history import Point, Points
from erpe.tracking.image import RunImage, same
from erpe.tracking.marks import GONE, RUNNING

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

STATUS = {"COMPLETE": "FINISHED", "PRUNED": "KILLED", "FAIL": "FAILED", RUNNING: "RUNNING"}
"""A run's status in MLflow; any other state ends it as KILLED. The exact state is the tag `state`."""

STUDY, TRIAL = "erpe.study_uid", "erpe.trial_uid"
"""Tags that say whose run it is."""
PARENT = "mlflow.parentRunId"
STATE, REASON, BEST = "state", "reason", "best_trial_uid"

UNREAD = -1
"""The step of a last value whose history was not read."""


class Call(NamedTuple):
    """Something to do: `Experiment` has a method of this name."""

    what: str
    image: RunImage
    news: Any = None


def image_of(uid: str, runs: list[Run], uids: Mapping[str, str]) -> RunImage:
    """Return what the runs of one uid show, of several that are active that which has most; the last values alone.

    Args:
        uids: MLflow's id -> uid of runs that may be parents.
    """
    runs.sort(key=lambda run: (-len(run.data.metrics), -len(run.data.params), run.info.run_id))
    active = [run for run in runs if run.info.lifecycle_stage == "active"]
    run, *others = active or runs
    tags, above = run.data.tags, run.data.tags.get(PARENT, "")
    return RunImage(
        uid, is_trial=TRIAL in tags, state=tags.get(STATE, ""), tags=dict(tags), params=dict(run.data.params),
        points={key: {UNREAD: Point(0, value)} for key, value in run.data.metrics.items()},
        ended=run.info.end_time or 0, parent=uids.get(above, above), run=run.info.run_id,
        twins=tuple(other.info.run_id for other in others), deleted=not active, status=run.info.status,
    )  # fmt: skip


def read_points(client: MlflowClient, want: RunImage, seen: RunImage | None) -> RunImage | None:
    """Return what is there with the histories that `diff` needs: one, unless a last value differs or it has gaps."""
    if seen is None or seen.deleted or not any(UNREAD in steps for steps in seen.points.values()):
        return seen
    if all(_shows(seen.points.get(key), steps[max(steps)]) for key, steps in want.points.items()):
        key, curve = max(want.points.items(), key=lambda item: len(item[1]), default=("", {}))
        if len(curve) < 2 or curve.keys() <= _history(client, seen.run, key).keys():
            return seen._replace(points=want.points)
    unread = [key for key in want.points if UNREAD in seen.points.get(key, {})]
    return seen._replace(points=seen.points | {key: _history(client, seen.run, key) for key in unread})


def _shows(there: dict[int, Point] | None, point: Point) -> bool:
    if not there:
        return False
    value = max(there.items())[1].value
    return same(value, point.value) or math.isinf(point.value)  # a database may have no infinity


def _history(client: MlflowClient, run: str, key: str) -> dict[int, Point]:
    found = [(metric.step, Point(metric.timestamp, metric.value)) for metric in client.get_metric_history(run, key)]
    return dict(sorted(found))


def diff(want: RunImage, seen: RunImage | None) -> list[Call]:
    """Return what brings a run from what is there to what should be; nothing for one that a user deleted.

    Args:
        seen: with its histories, see `read_points`; None: there is no such run.
    """
    if want.state == GONE:
        return [Call("remove", want, seen)] if seen else []
    if seen and seen.deleted:
        return []
    calls = [] if seen else [Call("create", want)]
    seen = seen or RunImage(want.uid, want.is_trial, "")
    calls += [Call("merge", want, twin) for twin in seen.twins]
    tags = {key: text for key, text in want.tags.items() if _is_news(key, text, seen.tags, want)}
    params = {key: text for key, text in want.params.items() if key not in seen.params}
    if tags or params or want.parent != seen.parent:
        calls.append(Call("describe", want, (tags, params)))
    if points := _news(want.points, seen.points):
        calls.append(Call("log", want, points))
    if _is_open(want, seen) or (points and want.ended and not want.is_trial):
        if want.ended and (not want.is_trial or seen.status in ("", "RUNNING")):
            calls.append(Call("file", want))
        calls.append(Call("close", want))
    return calls


def _is_open(want: RunImage, seen: RunImage) -> bool:
    """Whether a run has not ended as it should, or goes on; a study goes on after a pause, and so ends later."""
    differs = (want.state, STATUS.get(want.state, "KILLED")) != (seen.state, seen.status)
    later = not want.is_trial and (want.ended, want.best) != (seen.ended, seen.tags.get(BEST, ""))
    return differs or bool(want.ended and (later or not seen.ended))


def _is_news(key: str, text: str, there: dict[str, str], want: RunImage) -> bool:
    """Whether a tag is to be written: once, where users edit it, the results know better, or it stands for a better."""
    return key not in there or (want.exact and key not in (NOTE, *FACTS) and there[key] != text)


def _news(want: Points, seen: Points) -> Points:
    """Return the points that are lacking: steps, and a last value that is another."""
    news: Points = {}
    for key, steps in want.items():
        there = seen.get(key, {})
        lacking = {step: point for step, point in steps.items() if step not in there}
        last, point = max(steps.items())
        if there and last >= max(there) and not _shows(there, point):
            # Of one step and time MLflow shows the largest value, not the newest.
            lacking[last] = point._replace(at=max(point.at, there[last].at + 1)) if last in there else point
        if lacking:
            news[key] = lacking
    return news
