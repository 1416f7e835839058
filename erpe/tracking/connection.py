"""The tracking server, or the database that stands in for it: a client, and what is wrong with it."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple
from urllib.parse import urlsplit

from filelock import FileLock

from erpe.credentials import read_secret_files
from erpe.store import sqlite_path, sqlite_url
from erpe.surroundings import bypass_proxies, proxy_of
from erpe.text import first_line, redact

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run
    from mlflow.store.artifact.artifact_repo import ArtifactRepository

# Read by mlflow at every call. Its own retries would repeat create_run, and hold a call for minutes.
_ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_UV_AUTO_DETECT": "false",
    "MLFLOW_LOGGING_LEVEL": "CRITICAL",
}
WAITING = "it waits in the store, `erpe sync` sends it"
_MOST_RUNS = 100_000
"""More come from no study of ours."""


class Health(NamedTuple):
    """Whether a tracking URI answers as MLflow does."""

    state: Literal["well", "down", "refuses", "missing"]
    """down: it may come back by itself; refuses: the user must act; missing: MLflow is not installed, which stops
    nothing, and nothing waits for it."""
    fact: str = ""
    """What is the matter; empty if well."""
    advice: str = ""
    """What becomes of what is logged, or what would help; of no use to who only reads."""

    @property
    def line(self) -> str:
        """Fact and advice."""
        return f"{self.fact}; {self.advice}" if self.advice else self.fact


def connect(uri: str) -> MlflowClient:
    """Return a quiet client that does not touch mlflow's global state; imports mlflow (about 1.5 s).

    Raises:
        mlflow.exceptions.MlflowException: a database cannot be opened.
        ConfigError: the environment names a file with a password that is not there.
    """
    read_secret_files()
    bypass_proxies()
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient

    for name in ("mlflow", "alembic", "urllib3.connectionpool", "psycopg"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    if path := sqlite_path(uri):
        _make_database(path)
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def runs_of(client: MlflowClient, experiment: str, *, deleted: bool = False) -> Iterator[Run]:
    """All runs of an experiment, page by page, in the order of their start.

    Args:
        deleted: those that are deleted, too.
    """
    from mlflow.entities import ViewType

    view, token, seen = ViewType.ALL if deleted else ViewType.ACTIVE_ONLY, None, 0
    while True:
        page = client.search_runs([experiment], "", view, order_by=["attributes.start_time ASC"], page_token=token)
        yield from page
        token, seen = page.token, seen + len(page)
        if not token or not page or seen > _MOST_RUNS:
            return


def files_of(client: MlflowClient, run: str) -> ArtifactRepository:
    """Return the artifacts of a run.

    MLflow's client would remember them by the run's id alone, and a copy of a store has runs of the same ids.
    """
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    return get_artifact_repository(client.get_run(run).info.artifact_uri, tracking_uri=client.tracking_uri)


def _make_database(path: Path) -> None:
    """MLflow's tables in a new file, there whole or not at all: making them takes seconds, and a kill may come."""
    if path.exists() or not path.parent.is_dir():
        return
    from mlflow import MlflowClient

    with FileLock(path.with_suffix(".making")):
        if path.exists():
            return  # another process was first
        draft = path.with_suffix(".draft")
        draft.unlink(missing_ok=True)  # of one that was killed
        MlflowClient(tracking_uri=sqlite_url(draft)).search_experiments(max_results=1)
        draft.rename(path)


def probe(uri: str) -> str | None:
    """Return what is wrong with a tracking URI, in one line; nothing if it is well."""
    return examine(uri).line or None


def examine(uri: str) -> Health:
    """Ask for one experiment: /health would be green while every client gets a 403."""
    if find_spec("mlflow") is None:
        return Health("missing", "MLflow is not installed; pip install 'erpe[mlflow]'", "`erpe sync` sends what waits")
    return _examine_server(uri) if uri.startswith(("http://", "https://")) else _examine_database(uri)


def _examine_server(uri: str) -> Health:
    client = connect(uri)
    from mlflow.exceptions import MlflowException

    proxy = proxy_of(uri)
    name = f"tracking server {redact(uri)}" + (f" through the proxy {proxy}" if proxy else "")
    try:
        client.search_experiments(max_results=1)
    except MlflowException as error:
        said = str(error)
        tried = re.search(r"too many (\d{3}) error responses", said)
        if tried or not isinstance(error.__cause__ or error.__context__, OSError):  # of requests: no answer
            user = os.environ.get("MLFLOW_TRACKING_USERNAME") or (
                "this token" if "MLFLOW_TRACKING_TOKEN" in os.environ else ""
            )
            return _judge(name, int(tried[1]) if tried else error.get_http_status_code(), said, user)
        if "Invalid url" in said:
            return Health("refuses", f"{name}: not a URL; set MLFLOW_TRACKING_URI=http://HOST:PORT")
        if "SOCKS" in said:
            return Health("refuses", f"{name}: this Python knows no SOCKS; use NO_PROXY=HOST, or pysocks, instead")
        if "SSLError" in said or "CERTIFICATE" in said:
            return Health("refuses", f"{name}: certificate not trusted; set MLFLOW_TRACKING_SERVER_CERT_PATH")
        why = re.search(
            r"Tunnel connection failed: [^'\"]+|Connection refused|timed out|timeout|Name or service not known|resolve",
            said,
        )
        hint = f"NO_PROXY={urlsplit(uri).hostname} goes past the proxy; " if proxy else ""
        return Health("down", f"{name}: no answer ({why[0] if why else 'connection broken'})", hint + WAITING)
    return Health("well")


def _judge(name: str, status: int, text: str, user: str) -> Health:
    if status == 404 or "not in a valid JSON format" in text:
        return Health("refuses", f"{name}: answers, but is not MLflow; check MLFLOW_TRACKING_URI")
    if status == 401:
        what = f"does not know {user} with this password" if user else "wants a login"
        return Health("refuses", f"{name}: {what} (401); set MLFLOW_TRACKING_USERNAME and _PASSWORD(_FILE)")
    if status == 403:
        what = "does not serve this host name" if "host" in text.lower() else "forbids it"
        return Health("refuses", f"{name}: {what} (403); its --allowed-hosts or permissions must include us")
    return Health("down", f"{name}: answers {status}", WAITING)


def _examine_database(uri: str) -> Health:
    """Examine a database in place of a server: first without mlflow, whose own attempts take minutes."""
    from sqlalchemy import create_engine, inspect
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import SQLAlchemyError

    name, kind = f"tracking database {redact(uri)}", uri.partition(":")[0].partition("+")[0]
    if kind not in ("sqlite", "postgresql", "mysql", "mssql"):
        return Health("refuses", f"{name}: use http://HOST:PORT, postgresql://HOST/NAME or sqlite:///FILE instead")
    try:
        path = Path(make_url(uri).database or "")
        if kind == "sqlite" and not path.exists() and path.parent.is_dir():
            return Health("well")
        patience = {"timeout" if kind in ("sqlite", "mssql") else "connect_timeout": 5}
        engine = create_engine(uri, connect_args=patience)
        tables = inspect(engine).get_table_names()
        engine.dispose()
    except (SQLAlchemyError, ImportError, ValueError) as error:
        said = redact(first_line(getattr(error, "orig", None) or error))
        if "locked" in said or re.search(r"connect(?!.*(authentication|denied|does not exist))", said):
            return Health("down", f"{name}: no answer ({said})", WAITING)
        lost = "malformed" in said or "not a database" in said
        if lost and (path.parent / "erpe.json").exists():
            return Health("refuses", f"{name}: {said}", "`erpe sync` puts it aside and fills a new one")
        return Health("refuses", f"{name}: {said}", "put it right, or move it away and `erpe sync` fills a new one")
    return _examine_schema(uri, name) if tables else Health("well")


def _examine_schema(uri: str, name: str) -> Health:
    """Return what MLflow says of its tables: it refuses those of another version."""
    from mlflow.exceptions import MlflowException

    try:
        connect(uri).search_experiments(max_results=1)
        return Health("well")
    except MlflowException as error:
        said = first_line(error).partition(" Take a backup")[0]
    return Health(
        "refuses",
        f"{name}: not of this MLflow version ({redact(said)})",
        "back it up and run `mlflow db upgrade`, or move it away and `erpe sync` fills a new one",
    )
