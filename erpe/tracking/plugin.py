"""MLflow's plugin for artifacts in files: those of a store are looked for in the store itself, see `relocation`.

MLflow finds the class by the entry point `file` of the group `mlflow.artifact_repository`, in every process: this one,
`mlflow server`, and one that loads a registered model. Nothing may import this module before MLflow does.
"""

from __future__ import annotations

import atexit
import shutil
import tempfile
from pathlib import Path
from urllib.parse import unquote

from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository

from erpe.tracking.relocation import relocate


class StoreArtifactRepository(LocalArtifactRepository):
    """Artifacts in files, which move with their store."""

    def __init__(self, artifact_uri: str, tracking_uri: str | None = None, registry_uri: str | None = None) -> None:
        """See `mlflow.store.artifact.artifact_repo.ArtifactRepository`; default: MLflow's current tracking URI."""
        from mlflow import get_tracking_uri

        place = relocate(artifact_uri, tracking_uri or get_tracking_uri())
        super().__init__(place, tracking_uri, registry_uri)

    def download_artifacts(self, artifact_path: str, dst_path: str | None = None) -> str:
        """See `ArtifactRepository`. MLflow unquotes a path that it gets back: if that changes it, it gets a copy,
        which this process removes when it ends."""
        if dst_path is None and unquote(self.artifact_dir) != self.artifact_dir:
            dst_path = tempfile.mkdtemp(prefix="erpe-")
            atexit.register(shutil.rmtree, dst_path, ignore_errors=True)
        return str(super().download_artifacts(artifact_path, dst_path))  # type: ignore[no-untyped-call]  # MLflow's

    def delete_artifacts(self, artifact_path: str | None = None) -> None:
        """Remove files; MLflow's own method unquotes the path twice, which is another path where it has a `%`."""
        place = Path(self.artifact_dir, artifact_path or "")
        if place.is_dir():
            shutil.rmtree(place)
        else:
            place.unlink(missing_ok=True)
