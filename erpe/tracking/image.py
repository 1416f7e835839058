"""What MLflow should show of a study: a run for the study, and under it a run for each trial.

    for image in desired(members, store, running=False): ...

It follows from Optuna's database and the trials' folders alone, so that MLflow can always be rebuilt.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from erpe.errors import ConfigError, StoreError
from erpe.io import read_plain
from erpe.settings import flatten
from erpe.store import Store
from erpe.study.naming import model_name, trial_name
from erpe.study.records import StudyRecord, TrialRecord
from erpe.study.spec import StudySpec
from erpe.tracking.descriptions import NOTE, describe_part, describe_trial
from erpe.tracking.history import Point, Points, milliseconds, read_history
from erpe.tracking.marks import GONE, RUNNING, Mark, best_of, state_of, study_mark, trial_mark
from erpe.tracking.study_tags import made_with, study_tags

REMOVED = "erpe.removed"
"""Tag of a study's run: how many of its trials were given up."""

MOST_TAGGED = 40
"""Trials of a front in a tag, which may have 8000 characters; the best by the first objective."""

MOST_PAGE = 64 * 2**20
"""Bytes of a report's page."""


class RunImage(NamedTuple):
    """A run, as it should be, or as MLflow shows it."""

    uid: str
    """Tag `erpe.trial_uid`, or `erpe.study_uid` of a study."""
    is_trial: bool
    state: str
    """See `RUNNING`; empty: MLflow does not say."""
    tags: dict[str, str] = {}  # noqa: RUF012  never changed
    params: dict[str, str] = {}  # noqa: RUF012  never changed
    points: Points = {}  # noqa: RUF012  never changed
    ended: int = 0
    """Milliseconds since 1970; 0: it runs."""
    parent: str = ""
    """uid of the study."""

    # what should be
    above: RunImage | None = None
    """The parent as it is made for this run, if it is not there: all but its end."""
    mark: Mark = Mark(0, "")
    name: str = ""
    started: int = 0
    exact: bool = False
    """Whether the tags are those of the driver that made it, and not what the database knows in their place."""
    config: Mapping[str, Any] = {}
    reason: str = ""
    folder: Path | None = None
    """Whose files are to be there at the end."""
    plots_of: str = ""
    """Study in Optuna's database whose plots are to be there."""
    best: str = ""
    model: str = ""
    """Name under which the best trial is registered."""

    # what is there
    run: str = ""
    """MLflow's id."""
    twins: tuple[str, ...] = ()
    """Other runs of this uid, as a create that timed out leaves them."""
    deleted: bool = False
    """A user deleted it."""
    status: str = ""


def desired(
    members: list[StudyRecord], store: Store, running: bool, known: Callable[[str, Mark], bool] = lambda *_: False
) -> Iterator[RunImage]:
    """Yield what MLflow should show of an experiment: the trials of each part, then the part; the report.

    Args:
        members: all parts of the experiment.
        running: whether a driver is at work on it.
        known: whether a run is already there as far as its mark says; then it is left out.
    Raises:
        StoreError: another version of erpe wrote a study.
    """
    for member in (member for member in members if member.trials or running):
        spec = _spec(member)
        tags = made_with(member) | member.tags | _tags(member, spec)
        above = _study(member, tags, store, Mark(0, RUNNING))
        for trial in member.trials:
            if not known(trial.uid, mark := trial_mark(member, trial)):
                yield _trial(member, trial, spec, tags, store)._replace(mark=mark, above=above)
        if not known(member.about.uid, mark := study_mark(member, members, running)):
            yield _study(member, tags, store, mark)
    yield from _report(members, store, known)


def _tags(member: StudyRecord, spec: StudySpec) -> dict[str, str]:
    """Return the tags of a study; none of one whose plug-in is not here, if its driver left them."""
    try:
        return study_tags(spec, member.name, member.part_of)
    except ConfigError:
        if not member.tags:
            raise
        return {}


def _trial(member: StudyRecord, trial: TrialRecord, spec: StudySpec, tags: dict[str, str], store: Store) -> RunImage:
    if trial.removed:
        return RunImage(trial.uid, is_trial=True, state=GONE, parent=member.about.uid)
    folder = store.trial_folder(member.name, trial.number, trial.config.seed)
    own, points = read_history(trial, folder, spec)
    tags = (own or tags) | {"optuna.number": str(trial.number), "seed": str(trial.config.seed)}
    settings, state = trial.config.tree("json"), state_of(trial)
    began, ended = milliseconds(trial.started), 0
    if state != RUNNING:
        times = [point.at + 1 for steps in points.values() for point in steps.values()]
        ended = max(milliseconds(trial.ended), began + 1, *times)
        _add_ends(points, trial.verdict.metrics if trial.verdict else {}, max(trial.epochs, default=0), ended)
        if member.phase == "confirm":  # a search's best is tested for its study
            _add_ends(points, member.finals.get(trial.number, {}), max(trial.epochs, default=0), ended + 1)
    return RunImage(
        trial.uid, is_trial=True, state=state, points=points, ended=ended, parent=member.about.uid,
        tags={NOTE: describe_trial(tags, trial.number)} | tags,
        params={key: str(value) for key, value in flatten(settings).items()},
        name=trial_name(member.arm or tags["study"], member.phase, trial.number),
        started=began, exact=bool(own), config=settings,
        reason=(trial.verdict.reason if trial.verdict else None) or "",
        folder=folder if state == "COMPLETE" else None,
    )  # fmt: skip


def _add_ends(points: Points, measures: dict[str, float], epoch: int, at: int) -> None:
    """Add the measures of an end: those that differ from what is shown, behind the last epoch if they replace any."""
    news = {
        key: value for key, value in measures.items()
        if key not in points or not same(max(points[key].items())[1].value, value)
    }  # fmt: skip
    step = epoch + bool(news.keys() & points.keys())
    for key, value in news.items():
        points.setdefault(key, {})[step] = Point(at, value)


def same(one: float, other: float) -> bool:
    """Whether two measures are equal; NaN does not differ from NaN."""
    return repr(float(one)) == repr(float(other))


def _study(member: StudyRecord, tags: dict[str, str], store: Store, mark: Mark) -> RunImage:
    """A search has the measures of its best trial; a confirmation their means over seeds, and its champion is seed 0:
    no test score chooses it.
    """
    confirm, best, over = member.phase == "confirm", best_of(member), mark.state in ("COMPLETE", "FAIL")
    removed = sum(trial.removed for trial in member.trials)
    times = [time for trial in member.trials for time in (trial.started, trial.ended) if time]
    ended = 0 if mark.state == RUNNING else max(map(milliseconds, times), default=0) + 1
    of = [trial for trial in member.trials if trial.state == "COMPLETE" and (confirm or trial == best)]
    at = max((milliseconds(trial.ended) for trial in of), default=0) + 1  # the same whatever else is trained later
    front = dict(list(member.front.items())[:MOST_TAGGED]) if ended else {}
    # what is not over may change yet
    points = {key: {0: Point(at, value)} for key, value in _means(member, of).items()} if ended else {}
    model = model_name(member.experiment, member.arm) if over and (confirm or not member.arm) else ""
    return RunImage(
        member.about.uid, is_trial=False, state=mark.state, points=points, ended=ended, mark=mark,
        exact=bool(member.tags),
        tags={NOTE: describe_part(tags)} | tags | ({REMOVED: str(removed)} if removed else {})
        | ({"front": json.dumps(front)} if front else {}),
        name=member.shown.removeprefix(f"{member.experiment}/"),
        started=min(map(milliseconds, times), default=0), config=member.about.spec,
        folder=store.trial_folder(member.name, best.number, best.config.seed) if best and over else None,
        plots_of=member.name if ended else "", best=best.uid if best and ended else "", model=model,
    )  # fmt: skip


def _means(member: StudyRecord, of: list[TrialRecord]) -> dict[str, float]:
    """Return the mean over trials of every measure that each of them has; of a confirmation also how many they are."""
    measured = [(trial.verdict.metrics if trial.verdict else {}) | member.finals.get(trial.number, {}) for trial in of]
    shared = [name for name in measured[0] if all(name in own for own in measured)] if measured else []
    found = {name: math.fsum(own[name] for own in measured) / len(measured) for name in shared}
    return found | ({"seeds": float(len(measured))} if measured and member.phase == "confirm" else {})


def _report(members: list[StudyRecord], store: Store, known: Callable[[str, Mark], bool]) -> Iterator[RunImage]:
    """Yield the run of a study's page, if `erpe report` or `erpe study run` wrote one."""
    part_of = members[-1].part_of if members else None
    if not part_of or not (page := store.root / "reports" / part_of.study / "report.html").is_file():
        return
    written, uid = int(page.stat().st_mtime * 1000), f"report of {part_of.study}"
    if known(uid, mark := Mark(0, str(written))):
        return
    tags = {"study": part_of.study, "dataset": str(part_of.plan["dataset"]), "phase": "report"}
    yield RunImage(
        uid, is_trial=False, state="COMPLETE", ended=written, exact=True, mark=mark, name=f"{part_of.study} report",
        tags=tags | {"report_sha256": hashlib.sha256(read_plain(page, MOST_PAGE)).hexdigest()},
        started=written, config=part_of.plan, folder=page.parent,
    )  # fmt: skip


def _spec(member: StudyRecord) -> StudySpec:
    try:
        return StudySpec(**member.about.spec)
    except (ConfigError, TypeError) as error:
        raise StoreError(f"study {member.shown}: {error}; another version of erpe wrote it") from None
