"""A study's experiment in MLflow: what it shows, and the calls that change it. Each may be made again.

Everything here may raise `mlflow.exceptions.MlflowException`: the server or the database does not let us.
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from erpe.errors import TrackingError
from erpe.store import Store
from erpe.text import redact
from erpe.tracking import artifacts, comparison, deletion
from erpe.tracking.comparison import BEST, PARENT, REASON, STATE, STATUS, STUDY, TRIAL, Call
from erpe.tracking.connection import connect, runs_of
from erpe.tracking.descriptions import NOTE, describe_experiment, log_data_set
from erpe.tracking.image import RunImage
from erpe.tracking.relocation import HOME, is_store
from erpe.tracking.ui_views import CONFIRMED_VIEW, EXPERIMENT_TAGS

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mlflow.entities import Experiment as Found
    from mlflow.entities import Run


class Experiment:
    """One study's experiment, made if it is not there.

    Raises:
        TrackingError: someone deleted it, or another store's artifacts lie where its own would.
    """

    def __init__(self, store: Store, study: str) -> None:
        self.store, self.study = store, study
        self.client = connect(store.tracking_uri)
        self.runs: dict[str, str] = {}
        """uid -> MLflow's id, of all that it has since it was looked at."""
        if found := self.client.get_experiment_by_name(study):
            self._check(found)
            self.id = found.experiment_id
        else:  # where no server says otherwise, its artifacts lie in the store
            location = None if deletion.is_server(store) else (store.artifacts / study).as_uri()
            self.id = str(self.client.create_experiment(study, location, EXPERIMENT_TAGS))

    def _check(self, found: Found) -> None:
        """Nothing is written outside the store, unless a server or a bucket has the artifacts."""
        if found.lifecycle_stage == "deleted":
            raise TrackingError(
                f"experiment {self.study} was deleted in MLflow; "
                f"use `MLFLOW_TRACKING_URI={shlex.quote(redact(self.store.tracking_uri))} "
                f"mlflow experiments restore -x {found.experiment_id}` to bring it back"
            )
        if deletion.is_server(self.store) or not found.artifact_location.startswith("file:"):
            return
        place = self._place(found)
        if not place.is_relative_to(self.store.root) and self._came_here(found, place):
            self.client.set_experiment_tag(found.experiment_id, HOME, str(self.store.root))
            place = self._place(found)
        if not place.is_relative_to(self.store.root):
            raise TrackingError(
                f"experiment {self.study}: its artifacts lie outside of this store ({place}); "
                "open that store, or use another MLFLOW_TRACKING_URI instead"
            )

    def _place(self, found: Found) -> Path:
        """Return where the artifacts of a run would be written."""
        from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

        from erpe.tracking.plugin import StoreArtifactRepository

        location = f"{found.artifact_location}/{'0' * 32}/artifacts"
        files = get_artifact_repository(location, tracking_uri=self.store.tracking_uri)
        if not isinstance(files, StoreArtifactRepository):
            raise TrackingError("MLflow does not find the plug-in of erpe; use `pip install` for erpe again")
        return Path(files.artifact_dir)

    def _came_here(self, found: Found, place: Path) -> bool:
        """Whether this store was moved from there, or is a copy of the one that is there."""
        if not place.match("artifacts/*/*/artifacts"):
            return False
        own = self.store.artifacts / self.study
        runs = runs_of(self.client, found.experiment_id, deleted=True)
        return not is_store(place.parents[3]) or any((own / run.info.run_id).is_dir() for run in runs)

    # What is there

    def observe(self) -> dict[str, RunImage]:
        """Return what it shows, by uid, deleted runs, too; of the measures the last values alone."""
        found: dict[str, list[Run]] = {}
        for run in runs_of(self.client, self.id, deleted=True):
            if uid := run.data.tags.get(TRIAL) or run.data.tags.get(STUDY):
                found.setdefault(uid, []).append(run)
        uids = {run.info.run_id: uid for uid, runs in found.items() for run in runs}
        images = {uid: comparison.image_of(uid, runs, uids) for uid, runs in found.items()}
        self.runs = {uid: image.run for uid, image in images.items()}
        return images

    def find(self, uid: str) -> RunImage | None:
        """Return what it shows of one run; None: there is no such run."""
        if uid not in self.runs:
            return None
        uids = {run: uid for uid, run in self.runs.items()}
        return comparison.image_of(uid, [self.client.get_run(self.runs[uid])], uids)

    # What changes it: a method for each kind of `Call`

    def create(self, call: Call) -> None:
        """Make the run."""
        want, key = call.image, TRIAL if call.image.is_trial else STUDY
        self.runs[want.uid] = self.client.create_run(self.id, want.started, {key: want.uid}, want.name).info.run_id

    def merge(self, call: Call) -> None:
        """Delete a twin of the run."""
        self.client.delete_run(call.news)

    def describe(self, call: Call) -> None:
        """Log parameters, tags, data set and configuration."""
        from mlflow.entities import Param

        want, (tags, params) = call.image, call.news
        run = self.runs[want.uid]
        parent = self.runs.get(want.parent)
        self.client.log_batch(run, params=[Param(*item) for item in params.items()])
        self._tag(run, tags | ({PARENT: parent} if parent else {}))
        if want.is_trial and "data_sha256" in want.tags:
            log_data_set(self.client, run, want.tags["dataset"], want.tags["data_sha256"])
        if not want.is_trial and "arm" in want.tags:
            self.client.set_experiment_tag(self.id, NOTE, describe_experiment(want.tags))
        if not want.is_trial and want.tags.get("phase") == "confirm":
            self.client.set_experiment_tag(self.id, *CONFIRMED_VIEW)
        name = "config.json" if want.is_trial else "study.json"
        artifacts.log_text(self.client, run, json.dumps(want.config, indent=2), name)

    def log(self, call: Call) -> None:
        """Log points: measure -> step -> point."""
        from mlflow.entities import Metric

        metrics = [
            Metric(key, point.value, point.at, step) for key, own in call.news.items() for step, point in own.items()
        ]
        self.client.log_batch(self.runs[call.image.uid], metrics)

    def file(self, call: Call) -> None:
        """Send the files that a run has at its end, and register a study's champion."""
        want, run = call.image, self.runs[call.image.uid]
        if "\n" in want.reason.strip():
            artifacts.log_text(self.client, run, want.reason, "traceback.txt")
        if want.folder and want.is_trial:
            artifacts.log_checkpoint(self.client, run, want.folder)
        if want.folder:
            notes = artifacts.log_results(self.client, run, want.folder)
            self._tag(run, artifacts.facts(want.folder) | ({"erpe.note": "; ".join(notes)} if notes else {}))
        if want.plots_of:
            artifacts.log_plots(self.client, run, self.store.storage_url, want.plots_of)
        champion = self.runs.get(want.best)
        if champion and want.model and want.folder:
            artifacts.register(self.client, want.model, champion, want.best, want.folder)

    def close(self, call: Call) -> None:
        """Say how the run ended, or that it goes on."""
        want, run = call.image, self.runs[call.image.uid]
        said: Mapping[str, str] = {STATE: want.state, REASON: (want.reason.strip().splitlines() or [""])[-1]}
        self._tag(run, {key: text for key, text in {**said, BEST: want.best}.items() if text})
        if want.ended:
            self.client.set_terminated(run, STATUS.get(want.state, "KILLED"), want.ended)
        else:
            self.client.update_run(run, status="RUNNING")

    def remove(self, call: Call) -> None:
        """Delete all runs of a trial that was given up, also those that were deleted, with their artifacts."""
        for run in (call.news.run, *call.news.twins):
            deletion.remove_run(self.client, self.store, self.study, self.client.get_run(run))

    def _tag(self, run: str, tags: Mapping[str, str]) -> None:
        from mlflow.entities import RunTag

        self.client.log_batch(run, tags=[RunTag(key, value) for key, value in tags.items()])
