"""From a tracking server to outcomes: what MLflow has of the studies of `erpe study run`, wherever they ran."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from erpe.config import split_variant
from erpe.errors import ErpeError, StudyError, TrackingError, nearest
from erpe.report.outcomes import GIVEN, Outcomes, Rows, describe
from erpe.tracking.server import connect, examine, runs_of

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

_FILES = ("predictions.npz", "attention.npz")
_STATES = {"FINISHED": "COMPLETE", "KILLED": "PRUNED", "FAILED": "FAIL", "RUNNING": "RUNNING"}


def read(uri: str, studies: Sequence[str] = ()) -> Outcomes:
    """The studies of these names; none: all that `erpe study run` logged there.

    Args:
        uri: of a tracking server, or of its database.
    Raises:
        TrackingError: it does not answer, refuses, or is not MLflow.
        StudyError: there is none of a name.
    """
    health = examine(uri)
    if health.state != "well":
        raise TrackingError(health.line)
    client, rows = connect(uri), Rows()
    known = {found.name: found.experiment_id for found in client.search_experiments()}
    for name in dict.fromkeys(studies):
        if name not in known:
            raise StudyError(f"study {name}: not on this server; {nearest(name, list(known))}")
    for name in list(dict.fromkeys(studies)) or sorted(known):
        runs = [
            run for run in runs_of(client, known[name]) if "arm" in run.data.tags and "seeds_planned" in run.data.tags
        ]
        if not runs and studies:
            raise StudyError(f"study {name}: not one of `erpe study run`, so it has no confirmed runs")
        if runs:
            _read_study(rows, client, name, runs)
    return rows.outcomes()


def download_checkpoint(uri: str, study: str, uid: str) -> Path:
    """Weights and configuration of a complete trial, in a temporary folder.

    Raises:
        StudyError: the server has no such trial, or no checkpoint of it.
    """
    from mlflow.exceptions import MlflowException

    client = connect(uri)
    try:
        experiments = [known.experiment_id for known in client.search_experiments() if known.name == study]
        runs = client.search_runs(experiments, f"tags.`erpe.trial_uid` = '{uid}'") if experiments else []
        if not runs:
            raise StudyError(f"{study}: no run {uid} on the server")
        return Path(client.download_artifacts(runs[0].info.run_id, "checkpoint", tempfile.mkdtemp(prefix="erpe-")))
    except (MlflowException, OSError) as error:
        why = str(error).partition("\n")[0]
        raise StudyError(f"{study}: no checkpoint of {uid} to be had from the server ({why})") from None


def _read_study(rows: Rows, client: MlflowClient, study: str, runs: list[Run]) -> None:
    arms = list(dict.fromkeys(run.data.tags["arm"] for run in runs))
    for arm in sorted(arms, key=lambda arm: _place(runs, arm)):
        own = [run for run in runs if run.data.tags["arm"] == arm]
        tags = own[-1].data.tags
        attention, encoding = split_variant(tags["variant"])
        who = {"study": study, "arm": arm, "variant": tags["variant"]}
        what = {"dataset": tags["dataset"], "attention": attention, "encoding": encoding}
        trials, confirmed = _trials(own, "search"), _confirmed(own)
        planned = int(tags["seeds_planned"])
        rows.tables["arms"].append(
            who | what | {"budget": tags["budget"], "trials_planned": int(tags["trials_planned"])}
            | {"trials": sum(run.data.tags.get("state") != "RUNNING" for run in trials)}
            | {"seeds_planned": planned, "seeds": len(confirmed), "finished": len(confirmed) >= planned}
        )  # fmt: skip
        for run in trials:
            found = _epochs(client, run, "search")
            rows.tables["trials"].append(who | _trial_row(run, len(found)))
            rows.tables["epochs"] += [who | row for row in found]
        for run in confirmed:
            uid = run.data.tags["erpe.trial_uid"]
            own_tags = {"seed": int(run.data.tags["seed"]), "uid": uid, "version": run.data.tags["version.erpe"]}
            device = {"device": run.data.tags.get("device", "unknown")}
            rows.tables["runs"].append(who | what | own_tags | device | dict(run.data.metrics))
            rows.tables["epochs"] += [who | row for row in _epochs(client, run, "confirm")]
            rows.add_folder(uid, what["dataset"], _download(client, run))
    rows.made_with[study] = describe(runs[-1].data.tags)


def _place(runs: list[Run], arm: str) -> tuple[int, int]:
    """Arms in the order of the table, then as they were started."""
    from erpe.config import VARIANTS

    first = next(i for i, run in enumerate(runs) if run.data.tags["arm"] == arm)
    return VARIANTS.index(runs[first].data.tags["variant"]), first


def _trials(runs: list[Run], phase: str) -> list[Run]:
    return [run for run in runs if run.data.tags.get("phase") == phase and "erpe.trial_uid" in run.data.tags]


def _confirmed(runs: list[Run]) -> list[Run]:
    """The runs of the last confirmation: an earlier one is of a configuration that is no longer the best."""
    complete = [run for run in _trials(runs, "confirm") if run.data.tags.get("state") == "COMPLETE"]
    parents = [run.data.tags.get("mlflow.parentRunId") for run in complete]
    return [run for run, parent in zip(complete, parents, strict=True) if parent == parents[-1]]


def _trial_row(run: Run, epochs: int) -> dict[str, Any]:
    tags, info = run.data.tags, run.info
    seconds = (info.end_time - info.start_time) / 1000 if info.end_time else None
    own = {"number": int(tags["optuna.number"]), "uid": tags["erpe.trial_uid"], "seed": int(tags["seed"])}
    found = {"state": tags.get("state", _STATES[info.status]), "value": run.data.metrics.get("val/accuracy")}
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


def _epochs(client: MlflowClient, run: Run, phase: str) -> list[dict[str, Any]]:
    measure = "val/accuracy" if phase == "search" else "train/loss"
    who = {"phase": phase, "uid": run.data.tags["erpe.trial_uid"], "seed": int(run.data.tags["seed"])}
    history = client.get_metric_history(run.info.run_id, measure)
    return [who | {"epoch": point.step, measure: point.value} for point in sorted(history, key=lambda p: p.step)]


def _download(client: MlflowClient, run: Run) -> Path:
    """What a page needs of a run, in a temporary folder; what is not there is missed later."""
    from mlflow.exceptions import MlflowException

    folder = Path(tempfile.mkdtemp(prefix="erpe-"))
    for name in _FILES:
        try:
            client.download_artifacts(run.info.run_id, name, str(folder))
        except (MlflowException, OSError, ErpeError):
            continue
    return folder
