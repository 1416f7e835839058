"""From a tracking server to outcomes: what MLflow has of the studies of `erpe study run`, wherever they ran."""

from __future__ import annotations

import atexit
import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from erpe.errors import ConfigError, StudyError, TrackingError, nearest
from erpe.report.outcomes import GIVEN, Outcomes, Rows, describe
from erpe.store import FILES
from erpe.study.objectives import MEASURES, Goals
from erpe.study.openings import Openings
from erpe.study.plan import Compare
from erpe.study.search_space import NO_AXES
from erpe.study.spec import check_name
from erpe.tracking.artifacts import CHECKPOINT
from erpe.tracking.comparison import STUDY
from erpe.tracking.connection import connect, examine, files_of, runs_of
from erpe.tracking.image import REMOVED

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

_FILES = ("predictions.npz", "attention.npz")
_PLACES, _SERVED = ("", "file", "s3", "gs", "wasbs", "abfss"), ("http", "https", "mlflow-artifacts")
"""Where artifacts of a run may lie; and where they may lie if the tracking server itself has them."""
_STATES = {"FINISHED": "COMPLETE", "KILLED": "PRUNED", "FAILED": "FAIL", "RUNNING": "RUNNING"}


def read(uri: str, studies: Sequence[str] = ()) -> Outcomes:
    """Return the studies of these names; default: all that `erpe study run` logged there.

    Args:
        uri: of a tracking server, or of its database.
    Raises:
        TrackingError: it does not answer, refuses, or is not MLflow.
        StudyError: there is none of a name.
    """
    health = examine(uri)
    if health.state != "well":
        raise TrackingError(health.fact)
    client, rows = connect(uri), Rows()
    known = {found.name: found.experiment_id for found in client.search_experiments()}
    for name in dict.fromkeys(studies):
        if name not in known:
            there = [other for other in sorted(known) if _of_a_study(client, known[other])]
            raise StudyError(f"study {name}: not on this server; " + (nearest(name, there) if there else "it has none"))
    for name in list(dict.fromkeys(studies)) or sorted(known):
        runs = [
            run for run in runs_of(client, known[name]) if "arm" in run.data.tags and "seeds_planned" in run.data.tags
        ]
        if not runs and studies:
            raise StudyError(f"study {name}: not one of `erpe study run`, so it has no confirmed runs")
        if runs:
            with _distrust(name):
                _read_study(rows, client, uri, check_name(name), runs)
    return rows.outcomes()


@contextlib.contextmanager
def _distrust(study: str) -> Iterator[None]:
    """Tags that erpe would not write are the fault of who wrote them, and one line."""
    try:
        yield
    except (ConfigError, KeyError, ValueError, TypeError, OverflowError) as error:
        said = f"no {error}" if isinstance(error, KeyError) else str(error).partition("\n")[0]
        raise StudyError(f"study {study}: its runs on the server are not as erpe logs them ({said})") from None


def download_checkpoint(uri: str, study: str, uid: str, names: Sequence[str] = CHECKPOINT) -> Path:
    """Weights and configuration of a complete trial, in a folder that this process removes when it ends.

    Args:
        names: which files of it.

    Raises:
        StudyError: the server has no such trial, or no checkpoint of it.
    """
    from mlflow.exceptions import MlflowException

    client = connect(uri)
    try:
        experiments = [known.experiment_id for known in client.search_experiments() if known.name == study]
        runs = client.search_runs(experiments, f"tags.`erpe.trial_uid` = '{uid}'") if experiments else []
    except (MlflowException, OSError) as error:
        raise StudyError(f"{study}: no checkpoint of {uid} to be had ({str(error).partition(chr(10))[0]})") from None
    if not runs:
        raise StudyError(f"{study}: no run {uid} on the server")
    return fetch_checkpoint(client, uri, runs[0], names)


def fetch_checkpoint(client: MlflowClient, uri: str, run: Run, names: Sequence[str] = CHECKPOINT) -> Path:
    """Weights and configuration of a run, in a temporary folder.

    Raises:
        StudyError: it has none, or see `fetch`.
    """
    folder = fetch(client, uri, run, [f"checkpoint/{name}" for name in names]) / "checkpoint"
    if not any(folder.iterdir()):
        raise StudyError(f"run {run.info.run_id}: it has no checkpoint in MLflow")
    return folder


def fetch(client: MlflowClient, uri: str, run: Run, names: Sequence[str]) -> Path:
    """Return the artifacts of these names, as far as a run has them, in a folder that this process removes when it
    ends.

    Raises:
        StudyError: they lie on another server, which would be sent our credentials, are larger than they may be, or
            do not come.
    """
    from mlflow.exceptions import MlflowException

    who, place = f"run {run.info.run_id}", urlsplit(run.info.artifact_uri)
    if place.scheme not in _PLACES and (place.scheme not in _SERVED or place.netloc not in ("", urlsplit(uri).netloc)):
        raise StudyError(f"{who}: its artifacts lie elsewhere ({place.scheme}://{place.netloc})")
    folder = Path(tempfile.mkdtemp(prefix="erpe-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    try:
        files = files_of(client, run.info.run_id)
        for above in {name.rpartition("/")[0] for name in names}:
            (folder / above).mkdir(exist_ok=True)
            for file in files.list_artifacts(above or None):
                if file.path not in names:
                    continue
                if (file.file_size or 0) > (most := FILES[Path(file.path).name]):
                    raise StudyError(f"{who}: {file.path} has {file.file_size} bytes, more than {most}")
                with tempfile.TemporaryDirectory(dir=folder) as landing:  # below it, where the kind of store likes
                    os.replace(files.download_artifacts(file.path, landing), folder / file.path)
    except (MlflowException, OSError) as error:
        raise StudyError(f"{who}: artifacts do not come ({str(error).partition(chr(10))[0]})") from None
    return folder


def _of_a_study(client: MlflowClient, experiment: str) -> bool:
    """Whether `erpe study run` logged something to it."""
    return bool(client.search_runs([experiment], "tags.seeds_planned LIKE '%'", max_results=1))


def _read_study(rows: Rows, client: MlflowClient, uri: str, study: str, runs: list[Run]) -> None:
    arms = list(dict.fromkeys(run.data.tags["arm"] for run in runs))
    for arm in sorted(arms, key=lambda arm: _place(runs, arm)):
        own = [run for run in runs if run.data.tags["arm"] == arm]
        tags = own[-1].data.tags
        attention, _, encoding = tags["variant"].partition("_")  # perhaps of a plug-in that is not here
        who = {"study": study, "arm": arm, "variant": tags["variant"]}
        what = {"dataset": tags["dataset"], "attention": attention, "encoding": encoding or "none"}
        trials, confirmed = _trials(own, "search"), _confirmed(own)
        planned = int(tags["seeds_planned"])
        said = next((each.data.tags for each in trials), {})
        rows.tables["arms"].append(
            who | what | {"budget": tags["budget"], "trials_planned": int(tags["trials_planned"])}
            | {"trials": sum(run.data.tags.get("state") != "RUNNING" for run in trials) + _removed(own)}
            | {"seeds_planned": planned, "seeds": len(confirmed), "finished": len(confirmed) >= planned}
            | {"openings": (opened := len(_tested(own))), "abandoned": opened - len(confirmed)}
            | {"own_axes": trials[0].data.tags.get("own_axes", NO_AXES) if trials else NO_AXES} | Goals.of(said).tags
        )  # fmt: skip
        for run in trials:
            found = _epochs(client, run, "search", Goals.of(said))
            rows.tables["trials"].append(who | _trial_row(run, len(found), Goals.of(said)))
            rows.tables["epochs"] += [who | row for row in found]
        for run in confirmed:
            uid = run.data.tags["erpe.trial_uid"]
            own_tags = {"seed": int(run.data.tags["seed"]), "uid": uid, "version": run.data.tags["version.erpe"]}
            device = {"device": run.data.tags.get("device", "unknown")}
            rows.add_run(run.data.metrics | who | what | own_tags | device)
            rows.tables["epochs"] += [who | row for row in _epochs(client, run, "confirm", Goals())]
            try:
                rows.add_folder(uid, what["dataset"], fetch(client, uri, run, _FILES))
            except StudyError as error:
                rows.notes.append(f"{uid}: no predictions ({error})")
    opened, shown = len(_tested(runs)), sum(run["study"] == study for run in rows.tables["runs"])
    rows.notes.append(f"{study}: {Openings(opened, opened - shown).told()}")
    rows.found.made_with[study] = describe(runs[-1].data.tags)
    ended = [run.info.end_time for run in runs if run.info.end_time]
    if ended:
        rows.found.dates[study] = datetime.fromtimestamp(max(ended) / 1000, UTC).date().isoformat()
    marked = [run.data.tags for run in runs if "margin" in run.data.tags]
    margins = [tags["margin"] for tags in sorted(marked, key=lambda tags: STUDY in tags)]  # it may change after a trial
    rows.found.margins[study] = Compare(margin=float(margins[-1])).margin if margins else Compare().margin


def _place(runs: list[Run], arm: str) -> tuple[int, int]:
    """Arms in the order of the table, then as they were started."""
    from erpe.variants import VARIANTS

    first = next(i for i, run in enumerate(runs) if run.data.tags["arm"] == arm)
    variant = runs[first].data.tags["variant"]
    return VARIANTS.index(variant) if variant in VARIANTS else len(VARIANTS), first


def _trials(runs: list[Run], phase: str) -> list[Run]:
    return [run for run in runs if run.data.tags.get("phase") == phase and "erpe.trial_uid" in run.data.tags]


def _removed(runs: list[Run]) -> int:
    """Trials that `erpe gc` removed: they were searched, and no longer have a run."""
    return sum(int(run.data.tags.get(REMOVED, 0)) for run in runs if run.data.tags.get("phase") == "search")


def _tested(runs: list[Run]) -> list[Run]:
    """Return the runs that met the test split: each complete one of a confirmation."""
    return [run for run in _trials(runs, "confirm") if run.data.tags.get("state") == "COMPLETE"]


def _confirmed(runs: list[Run]) -> list[Run]:
    """Return the runs of the last confirmation: an earlier one is of a configuration that is no longer the best."""
    complete = _tested(runs)
    parents = [run.data.tags.get("mlflow.parentRunId") for run in complete]
    return [run for run, parent in zip(complete, parents, strict=True) if parent == parents[-1]]


def _trial_row(run: Run, epochs: int, goals: Goals) -> dict[str, Any]:
    tags, info = run.data.tags, run.info
    seconds = (info.end_time - info.start_time) / 1000 if info.end_time else None
    own = {"number": int(tags["optuna.number"]), "uid": tags["erpe.trial_uid"], "seed": int(tags["seed"])}
    costs = {name: run.data.metrics.get(MEASURES[name].key) for name in goals.at_most}
    sought = {name: MEASURES[name].sign * run.data.metrics[MEASURES[name].key] for name in goals.objectives
              if MEASURES[name].key in run.data.metrics}  # fmt: skip
    value = None if goals.over(costs) else sought.get(goals.objectives[0])
    found = {"state": tags.get("state", _STATES[info.status]), "value": value} | (sought if goals.several else {})
    told = {name: text for name, text in run.data.params.items() if name.startswith(("model.", "train."))}
    settings = {name: _value(text) for name, text in told.items() if name not in GIVEN}
    return own | found | {"epochs": epochs, "seconds": seconds} | settings


def _value(text: str) -> Any:
    """MLflow keeps parameters as text."""
    if re.fullmatch(r"-?\d+", text):
        return int(text)
    try:
        return float(text)
    except ValueError:
        return {"True": True, "False": False, "None": None}.get(text, text)


def _epochs(client: MlflowClient, run: Run, phase: str, goals: Goals) -> list[dict[str, Any]]:
    _, measure = goals.reported(phase)
    who = {"phase": phase, "uid": run.data.tags["erpe.trial_uid"], "seed": int(run.data.tags["seed"])}
    history = client.get_metric_history(run.info.run_id, measure)
    return [who | {"epoch": point.step, measure: point.value} for point in sorted(history, key=lambda p: p.step)]
