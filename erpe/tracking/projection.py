"""MLflow as the image of an outbox's events: every event may be applied again, and changes nothing then."""

from __future__ import annotations

import json
import shlex
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

from erpe.errors import TrackingError
from erpe.settings import flatten
from erpe.store import Store
from erpe.study.naming import shown
from erpe.text import redact
from erpe.tracking import artifacts, deletion
from erpe.tracking.connection import connect
from erpe.tracking.descriptions import NOTE, describe_experiment, describe_part, describe_trial, log_data_set
from erpe.tracking.logged_metrics import Points
from erpe.tracking.outbox import Event
from erpe.tracking.ui_views import CONFIRMED_VIEW, EXPERIMENT_TAGS

if TYPE_CHECKING:
    from mlflow.entities import Metric

STATUS = {"COMPLETE": "FINISHED", "PRUNED": "KILLED", "FAIL": "FAILED"}
"""A run's status in MLflow; any other state ends it as KILLED. The exact state is the tag `state`."""

STUDY, TRIAL = "erpe.study_uid", "erpe.trial_uid"
"""Tags that say whose run it is."""
PARENT = "mlflow.parentRunId"


class Projection:
    """One study's experiment in MLflow: a run for the study, and under it a run for each trial.

    Raises:
        mlflow.exceptions.MlflowException: the server or the database does not let us.
    """

    def __init__(self, store: Store, study: str, removed: set[str]) -> None:
        """Prepare; `removed` has the uids of trials that later events remove: nothing else of them is sent."""
        self.store, self.study, self._removed = store, study, removed
        self.client = connect(store.tracking_uri)
        self.experiment = ""
        self._runs: dict[str, str] = {}
        self._points = Points(self.client)
        self._begun: set[str] = set()

    def find_experiment(self) -> bool:
        """Whether the experiment is there; if not, all events must be applied from the first.

        Raises:
            TrackingError: someone deleted it.
        """
        found = self.client.get_experiment_by_name(self.study)
        if found and found.lifecycle_stage == "deleted":
            raise TrackingError(
                f"experiment {self.study} was deleted in MLflow; "
                f"use `MLFLOW_TRACKING_URI={shlex.quote(redact(self.store.tracking_uri))} "
                f"mlflow experiments restore -x {found.experiment_id}` to bring it back"
            )
        if found:
            self._check_place(found.artifact_location)
        self.experiment = found.experiment_id if found else ""
        return found is not None

    def _check_place(self, location: str) -> None:
        """Nothing is written outside the store, unless a server or a bucket has the artifacts.

        Raises:
            TrackingError: another store's artifacts lie where the experiment's would.
        """
        from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

        from erpe.tracking.plugin import StoreArtifactRepository

        if deletion.is_server(self.store) or not location.startswith("file:"):
            return
        files = get_artifact_repository(f"{location}/{'0' * 32}/artifacts", tracking_uri=self.store.tracking_uri)
        if isinstance(files, StoreArtifactRepository):
            place, advice = files.artifact_dir, "open that store, or use another MLFLOW_TRACKING_URI instead"
        else:
            place, advice = location, "MLflow does not find the plugin of erpe, use `pip install` again"
        if not Path(place).is_relative_to(self.store.root):
            raise TrackingError(f"experiment {self.study}: its artifacts lie outside of this store ({place}); {advice}")

    def create_experiment(self) -> None:
        """Make the experiment; where no server says otherwise, its artifacts lie in the store."""
        server = self.store.tracking_uri.startswith(("http://", "https://"))
        location = None if server else (self.store.artifacts / self.study).as_uri()
        self.experiment = self.client.create_experiment(self.study, location, EXPERIMENT_TAGS)

    def apply(self, events: list[Event]) -> None:
        """Bring MLflow to where these events lead. The epochs of a run travel together."""
        try:
            epochs: dict[str, list[Metric]] = defaultdict(list)
            for event in events:
                if event.kind == "remove_trial":
                    epochs.pop(self._runs.pop(event.uid, ""), None)
                    self._remove_trial(event)
                run = "" if event.uid in self._removed else self._run_of(event)
                if not run:
                    continue
                news = self._points.news(event, run)
                if event.kind == "epoch":
                    epochs[run] += news
                    continue
                self.client.log_batch(run, epochs.pop(run, []) + news)
                getattr(self, f"_{event.kind}")(event, run)
            for run, metrics in epochs.items():
                self.client.log_batch(run, metrics)
        except Exception:
            self._runs.clear()  # one of them may have been deleted
            self._points.forget()
            raise

    def _run_of(self, event: Event) -> str:
        """Return the event's run, made if it is not there; empty if a user deleted it.

        A run that has ended is looked for once more: a create that timed out may have made it twice.
        """
        if event.kind in ("end_trial", "end_study"):
            self._runs.pop(event.uid, None)
        key = STUDY if event.kind.endswith("study") else TRIAL
        run = self._find(key, event.uid)
        if run is None:
            made = self.client.create_run(self.experiment, event.ts, {key: event.uid}, self._name(event))
            run = self._runs[event.uid] = made.info.run_id
            self._points.open_run(run, {})
        return run

    def _find(self, key: str, uid: str) -> str | None:
        """Return the run with this tag; nothing if there is none, empty if it was deleted."""
        from mlflow.entities import ViewType

        if uid in self._runs:
            return self._runs[uid]
        found = self.client.search_runs([self.experiment], f"tags.`{key}` = '{uid}'", ViewType.ALL)
        alive = [run for run in found if run.info.lifecycle_stage == "active"]
        alive.sort(key=lambda run: (-len(run.data.metrics), -len(run.data.params), run.info.run_id))
        for twin in alive[1:]:
            self.client.delete_run(twin.info.run_id)
        if found:
            self._runs[uid] = alive[0].info.run_id if alive else ""
        if alive:
            self._points.open_run(alive[0].info.run_id, alive[0].data.metrics)
        return self._runs.get(uid)

    def _name(self, event: Event) -> str:
        """Behind the experiment's, it is the name that users type: `digits-nine` and `favor/seed-2`."""
        if event.kind.endswith("study"):
            return shown(event.name or self.study).removeprefix(f"{self.study}/")
        return event.name or (event.uid if event.number is None else f"trial {event.number}")

    def _start_study(self, event: Event, run: str) -> None:
        if event.tags.get("phase") == "confirm":
            self.client.set_experiment_tag(self.experiment, *CONFIRMED_VIEW)
        self.client.set_experiment_tag(self.experiment, NOTE, describe_experiment(event.tags))
        self._start(event, run, {NOTE: describe_part(event.tags)} | event.tags, "study.json")

    def _start_trial(self, event: Event, run: str) -> None:
        parent = self._find(STUDY, event.parent) if event.parent else None
        note = {NOTE: describe_trial(event.tags, event.number)} if event.number is not None else {}
        tags = note | event.tags | {"optuna.number": str(event.number)} | ({PARENT: parent} if parent else {})
        self._begun.add(event.uid)
        self._start(event, run, tags, "config.json")

    def _start(self, event: Event, run: str, tags: dict[str, str], config: str) -> None:
        tags, status = tags | {"state": "RUNNING"}, "RUNNING"
        if event.rebuilt:  # what the run has is from when it really started, or from its end
            there = self.client.get_run(run)
            tags = {key: value for key, value in tags.items() if key == PARENT or key not in there.data.tags}
            status = there.info.status
        self._tag(run, tags)
        if event.kind == "start_trial":
            from mlflow.entities import Param

            self.client.log_batch(run, params=[Param(key, str(value)) for key, value in flatten(event.config).items()])
            if "data_sha256" in event.tags:
                log_data_set(self.client, run, event.tags["dataset"], event.tags["data_sha256"])
        self.client.update_run(run, status=status, name=self._name(event))
        artifacts.log_text(self.client, run, json.dumps(event.config, indent=2), config)

    def _end_trial(self, event: Event, run: str) -> None:
        """End a trial, perhaps once more, with measures that were taken later: it took no longer for that."""
        ended = self.client.get_run(run).info.end_time
        first = event.uid in self._begun and not event.rebuilt
        self._begun.discard(event.uid)
        if event.state == "COMPLETE" and event.folder and not ended:
            artifacts.log_checkpoint(self.client, run, folder_of(event, self.store))
            self._log_results(event, run)
        self._end(event, run, {}, None if first else ended)

    def _end_study(self, event: Event, run: str) -> None:
        if event.folder:
            self._log_results(event, run)
        artifacts.log_plots(self.client, run, self.store.storage_url, event.name or self.study)
        champion = self._find(TRIAL, event.best) if event.best else None
        if champion and event.folder and event.model:
            artifacts.register(self.client, event.model, champion, str(event.best), folder_of(event, self.store))
        ended = self.client.get_run(run).info.end_time if event.rebuilt else None
        self._end(event, run, event.tags | ({"best_trial_uid": event.best} if event.best else {}), ended)

    def _remove_trial(self, event: Event) -> None:
        """Delete the trial's runs, also those that were deleted; their number is a tag of the study's run."""
        self._removed.add(event.uid)
        for run in deletion.find_runs(self.client, self.experiment, f"tags.`{TRIAL}` = '{event.uid}'"):
            deletion.remove_run(self.client, self.store, self.study, run)
        if event.parent and (parent := self._find(STUDY, event.parent)):
            gone = sum(uid.startswith(f"{event.parent}-") for uid in tuple(self._removed))
            self._tag(parent, {deletion.REMOVED: str(gone)})

    def _log_results(self, event: Event, run: str) -> None:
        """Log what a trial's folder holds; a damaged file is named in a tag, and the others go their way."""
        folder = folder_of(event, self.store)
        notes = artifacts.log_results(self.client, run, folder)
        self._tag(run, artifacts.facts(folder) | ({"erpe.note": "; ".join(notes)} if notes else {}))

    def _end(self, event: Event, run: str, tags: dict[str, str], ended: int | None = None) -> None:
        state = event.state or "COMPLETE"
        if event.reason:
            lines = event.reason.strip().splitlines() or [""]
            tags = tags | {"reason": lines[-1]}
            if len(lines) > 1:
                artifacts.log_text(self.client, run, event.reason, "traceback.txt")
        self._tag(run, tags | {"state": state})
        self.client.set_terminated(run, STATUS.get(state, "KILLED"), ended or event.ts)
        self._points.forget(run)

    def _tag(self, run: str, tags: dict[str, str]) -> None:
        from mlflow.entities import RunTag

        self.client.log_batch(run, tags=[RunTag(key, value) for key, value in tags.items()])


def folder_of(event: Event, store: Store) -> Path:
    """Where the results of an event lie.

    Raises:
        ValueError: not in the store; an outbox that someone else wrote could send any folder's files to MLflow.
    """
    folder = store.root / str(event.folder)
    if not folder.resolve().is_relative_to(store.root.resolve()):
        raise ValueError(f"event {event.seq}: its folder {event.folder} is not in the store")
    return folder
