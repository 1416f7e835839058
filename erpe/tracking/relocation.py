"""MLflow's plugin for artifacts in files: those of a store are looked for in the store itself.

MLflow writes absolute addresses into its database and has no call that changes them. So a store that was moved would
still write where it was, and a copy where the original is. In the database of a store, an address of the form
`file://.../artifacts/EXPERIMENT/RUN/...` is therefore taken as `artifacts/EXPERIMENT/RUN/...` of the folder that the
database lies in. All other addresses stay MLflow's.

MLflow finds the class by the entry point `file` of the group `mlflow.artifact_repository`, in every process: this one,
`mlflow server`, and one that loads a registered model.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from urllib.parse import unquote, urlsplit

from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository

from erpe.store import sqlite_path

_OF_A_RUN = re.compile(r"file:.*/artifacts/([^/]+/(?:models/m-)?[0-9a-f]{32}(?:/.*)?)", re.S)


class StoreArtifactRepository(LocalArtifactRepository):
    """Artifacts in files, which move with their store."""

    def __init__(self, artifact_uri: str, tracking_uri: str | None = None, registry_uri: str | None = None) -> None:
        """See `mlflow.store.artifact.artifact_repo.ArtifactRepository`; default: MLflow's current tracking URI."""
        from mlflow import get_tracking_uri

        place = relocate(artifact_uri, tracking_uri or get_tracking_uri())
        super().__init__(place, tracking_uri, registry_uri)

    def delete_artifacts(self, artifact_path: str | None = None) -> None:
        """Remove files; MLflow's own method unquotes the path twice, which is another path where it has a `%`."""
        place = Path(self.artifact_dir, artifact_path or "")
        if place.is_dir():
            shutil.rmtree(place)
        else:
            place.unlink(missing_ok=True)


def relocate(artifact_uri: str, tracking_uri: str) -> str:
    """The address of artifacts as it is now, if the database at `tracking_uri` lies in a store."""
    database = sqlite_path(tracking_uri)
    found = _OF_A_RUN.fullmatch(artifact_uri)
    if database is None or found is None or not (database.parent / "erpe.json").is_file():
        return artifact_uri
    inside = Path(unquote(urlsplit(found[1]).path))
    return artifact_uri if ".." in inside.parts else (database.parent.resolve() / "artifacts" / inside).as_uri()
