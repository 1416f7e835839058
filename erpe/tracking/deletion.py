"""Runs that are given up: what MLflow has of them, and how they leave it.

The row of a run goes last, for it alone says what else there is: killed before, the same call finishes.
"""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

from erpe._upstream import delete_run_row
from erpe.errors import TrackingError
from erpe.io import remove_folder, size_mib
from erpe.store import Store, sqlite_path
from erpe.tracking.connection import connect, examine, files_of, runs_of

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

_RUN_ID = re.compile("[0-9a-f]{32}")


def is_server(store: Store) -> bool:
    """Whether MLflow is a server, which keeps the artifacts and the rows of deleted runs; or just a database."""
    return store.tracking_uri.startswith(("http://", "https://"))


def remove_run(client: MlflowClient, store: Store, study: str, run: Run) -> None:
    """Delete a run and its artifacts, unless a registered model came from it. Doing it again changes nothing.

    A database loses the row, too; a server keeps it until its own `mlflow gc`.

    Raises:
        StoreError: the artifacts cannot be removed.
    """
    name = run.info.run_id
    if client.search_model_versions(f"run_id='{name}'"):
        return
    if run.info.lifecycle_stage == "active":
        client.delete_run(name)
    if is_server(store):
        _remove_remote(store, run)
        return
    # not where the row says: a copied store would remove the artifacts of the original
    remove_folder(_folder(store, study, name))
    delete_run_row(client, name)


def _folder(store: Store, study: str, run: str) -> Path:
    return store.artifacts / study / run


def _remove_remote(store: Store, run: Run) -> None:
    """Through the server, or straight in the bucket it names; only what is called as MLflow calls it."""
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    place, _, last = run.info.artifact_uri.rpartition("/")
    if last == "artifacts" and _RUN_ID.fullmatch(run.info.run_id) and place.endswith(f"/{run.info.run_id}"):
        get_artifact_repository(place, tracking_uri=store.tracking_uri).delete_artifacts()


class Logged:
    """What MLflow has of a store's studies, looked at and not changed; nothing, if it was never told anything.

    Raises:
        TrackingError: it does not answer, or refuses; so what is registered cannot be known.
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        self.client: MlflowClient | None = None
        self.registered: set[str] = set()
        """Ids of runs and uids of trials that registered models came from."""
        if not _is_there(store.tracking_uri):
            return
        health = examine(store.tracking_uri)
        if health.state != "well":
            why = health.line.partition(";")[0]
            raise TrackingError(f"{why}; without it the registered models are unknown, so nothing is removed")
        self.client = connect(store.tracking_uri)
        self.registered = _registered(self.client)

    def study(self, name: str) -> LoggedStudy:
        """Return what it has of one study."""
        found = self.client.get_experiment_by_name(name) if self.client else None
        runs = runs_of(self.client, found.experiment_id, deleted=True) if self.client and found else ()
        return LoggedStudy(self, name, list(runs), exists=found is not None)


class LoggedStudy:
    """What MLflow has of a study, deleted runs, too."""

    def __init__(self, logged: Logged, name: str, runs: list[Run], exists: bool) -> None:
        self._logged, self._name = logged, name
        self.exists = exists
        """Whether there is an experiment of the study."""
        self._runs: dict[str, set[str]] = defaultdict(set)
        for run in runs:
            self._runs[run.data.tags.get("erpe.trial_uid", "")].add(run.info.run_id)

    def is_registered(self, uid: str) -> bool:
        """Whether a model in the registry is a trial's."""
        return not self._logged.registered.isdisjoint({uid, *self._runs.get(uid, ())})

    def size_mib(self, uid: str) -> float:
        """Return what the artifacts of a trial take."""
        runs = self._runs.get(uid, set())
        if is_server(self._logged.store):
            return sum(self._remote_bytes(run) for run in runs) / 2**20
        folders = (_folder(self._logged.store, self._name, run) for run in runs)
        return sum(size_mib(folder) for folder in folders)

    def _remote_bytes(self, run: str, path: str | None = None) -> int:
        assert self._logged.client is not None
        files = files_of(self._logged.client, run).list_artifacts(path)
        return sum(self._remote_bytes(run, file.path) if file.is_dir else file.file_size or 0 for file in files)

    def knows(self, run: str) -> bool:
        """Whether there is a run of this id."""
        return any(run in runs for runs in self._runs.values())


def stray_artifacts(logged: Logged, study: str) -> list[Path]:
    """Folders of artifacts in the store, called as a run's, that belong to none: of a database that was lost."""
    place = logged.store.artifacts / study
    if logged.client is None or is_server(logged.store) or not place.is_dir():
        return []
    # listed first: a run that is made meanwhile has its row before its folder
    found = [path for path in sorted(place.iterdir()) if _RUN_ID.fullmatch(path.name) and _is_folder(path)]
    known = logged.study(study)
    return [path for path in found if known.exists and not known.knows(path.name)]


def _is_there(uri: str) -> bool:
    """Whether MLflow may have something: looking must not make a database."""
    path = sqlite_path(uri)
    return path is None or path.exists()


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _registered(client: MlflowClient) -> set[str]:
    """Ids of runs and uids of trials that registered models came from."""
    found: set[str] = set()
    token = None
    while True:
        page = client.search_model_versions(max_results=1000, page_token=token)
        for version in page:
            found |= {version.run_id or "", version.tags.get("erpe.trial_uid", "")}
            found |= set(_RUN_ID.findall(version.source or ""))
        token = page.token
        if not token:
            return found - {""}
