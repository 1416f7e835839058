"""Where artifacts of a store are: in the store, wherever it was made.

MLflow writes absolute addresses into its database and has no call that changes them. So a store that was moved would
still write where it was, and a copy where the original is. In the database of a store, an address of the form
`file://.../artifacts/EXPERIMENT/RUN/...` is therefore taken as `artifacts/EXPERIMENT/RUN/...` of the folder that the
database lies in. All other addresses stay MLflow's.
"""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

from erpe.store import sqlite_path

_OF_A_RUN = re.compile(r"file:.*/artifacts/([^/]+/(?:models/m-)?[0-9a-f]{32}(?:/.*)?)", re.S)


def relocate(artifact_uri: str, tracking_uri: str) -> str:
    """Return the address of artifacts as it is now, if the database at `tracking_uri` lies in a store."""
    database = sqlite_path(tracking_uri)
    found = _OF_A_RUN.fullmatch(artifact_uri)
    if database is None or found is None or not (database.parent / "erpe.json").is_file():
        return artifact_uri
    inside = Path(unquote(urlsplit(found[1]).path))
    return artifact_uri if ".." in inside.parts else (database.parent.resolve() / "artifacts" / inside).as_uri()
