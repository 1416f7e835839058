"""Where artifacts of a store are: in the store, wherever it was made.

MLflow writes absolute addresses into its database and has no call that changes them. So a store that was moved would
still write where it was, and a copy where the original is. An address of the form `file://.../artifacts/STUDY/RUN/...`
is therefore taken as `artifacts/STUDY/RUN/...` of a store: the one that the database lies in, or, for a database
elsewhere, the one that the experiment's tag `erpe.store` names. All other addresses stay MLflow's.
"""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

from erpe.store import sqlite_path

HOME = "erpe.store"
"""Tag of an experiment in a database elsewhere: the folder of the store that published it last, if it moved."""

_OF_A_RUN = re.compile(r"file:.*/artifacts/([^/]+)(/(?:models/m-)?[0-9a-f]{32}(?:/.*)?)", re.S)


def relocate(artifact_uri: str, tracking_uri: str) -> str:
    """Return the address of artifacts as it is now, if it is one of a store."""
    if (found := _OF_A_RUN.fullmatch(artifact_uri)) is None:
        return artifact_uri
    inside = Path(unquote(urlsplit(found[1] + found[2]).path))
    root = None if ".." in inside.parts else _home(inside.parts[0], tracking_uri)
    return (root / "artifacts" / inside).as_uri() if root else artifact_uri


def _home(study: str, tracking_uri: str) -> Path | None:
    """Return the folder of the store that holds the artifacts of a study; None: it is the one of the address."""
    database = sqlite_path(tracking_uri)
    if database and is_store(database.parent):
        return database.parent.resolve()
    if tracking_uri.startswith(("http:", "https:")) or (database and not database.is_file()):
        return None  # a server has places of its own; and looking makes no database
    from mlflow import MlflowClient

    known = MlflowClient(tracking_uri).get_experiment_by_name(study)
    root = Path(known.tags[HOME]) if known and HOME in known.tags else None
    return root if root and is_store(root) else None


def is_store(folder: Path) -> bool:
    """Whether a folder is a store."""
    return (folder / "erpe.json").is_file()
