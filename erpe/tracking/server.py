"""The tracking server, or the database that stands in for it: a client, and what is wrong with it."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import re
import sqlite3
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple
from urllib.parse import quote, urlsplit, urlunsplit

if TYPE_CHECKING:
    from mlflow import MlflowClient

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
_SEARCH = "/api/2.0/mlflow/experiments/search"


class Health(NamedTuple):
    """Whether a tracking URI answers as MLflow does."""

    state: Literal["well", "down", "refuses"]
    """Down: will mend itself. Refuses: someone must do something."""
    line: str = ""


def redact(uri: str) -> str:
    """The URI without user and password: fit for files, tags and messages."""
    parts = urlsplit(uri)
    if "@" not in parts.netloc:
        return uri
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def connect(uri: str) -> MlflowClient:
    """A quiet client that does not touch mlflow's global state; imports mlflow (about 1.5 s).

    Raises:
        mlflow.exceptions.MlflowException: a database cannot be opened.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient

    for name in ("mlflow", "alembic", "urllib3.connectionpool"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def probe(uri: str) -> str | None:
    """What is wrong with a tracking URI, in one line; nothing if it is well."""
    return examine(uri).line or None


def examine(uri: str) -> Health:
    """Ask for one experiment: /health would be green while every client gets a 403."""
    return _examine_server(uri) if uri.startswith(("http://", "https://")) else _examine_database(uri)


def _examine_server(uri: str) -> Health:
    from mlflow.exceptions import MlflowException
    from mlflow.utils.rest_utils import MlflowHostCreds, http_request

    connect(uri)
    from mlflow.tracking._tracking_service.utils import get_default_host_creds

    name = f"tracking server {redact(uri)}"
    creds: MlflowHostCreds = get_default_host_creds(uri)
    try:
        answer = http_request(
            creds, _SEARCH, "GET", params={"max_results": 1}, timeout=5, max_retries=0, raise_on_status=False
        )
    except MlflowException as error:
        if "Invalid url" in str(error):
            return Health("refuses", f"{name}: not a URL; MLFLOW_TRACKING_URI=http://HOST:PORT would do")
        return Health("down", f"{name}: no answer; events wait in the spool, `erpe sync` sends them")
    return _judge(name, answer.status_code, answer.text)


def _judge(name: str, status: int, text: str) -> Health:
    if status in (408, 429) or status >= 500:
        return Health("down", f"{name}: answers {status}; events wait in the spool, `erpe sync` sends them")
    if status == 401:
        return Health("refuses", f"{name}: wants a login (401); MLFLOW_TRACKING_USERNAME and _PASSWORD would do")
    if status == 403:
        what = "does not serve this host name" if "host" in text.lower() else "forbids it"
        return Health("refuses", f"{name}: {what} (403); its --allowed-hosts or permissions must include us")
    if status != 200 or not re.match(r'\s*\{\s*("experiments"|"next_page_token"|\})', text):
        return Health("refuses", f"{name}: answers {status}, but is not MLflow; check MLFLOW_TRACKING_URI")
    return Health("well")


def _examine_database(uri: str) -> Health:
    if uri.startswith("sqlite:///"):
        return _examine_file(Path(uri.removeprefix("sqlite:///")))
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    name = f"tracking database {redact(uri)}"
    try:
        connect(uri).search_experiments(max_results=1)
    except (MlflowException, SQLAlchemyError) as error:
        said = redact_text(str(error))
        if "out-of-date database schema" in said or "Can't locate revision" in said:
            return Health("refuses", f"{name}: of another MLflow version; `mlflow db upgrade` would do, with a backup")
        if "connect" in said:
            return Health("down", f"{name}: no answer; events wait in the spool, `erpe sync` sends them")
        return Health("refuses", f"{name}: {said.splitlines()[0]}")
    return Health("well")


def _examine_file(path: Path) -> Health:
    """An embedded database, without importing mlflow: it is made when there is none."""
    name = f"tracking database {path}"
    if not path.exists():
        return Health("well")
    try:
        with contextlib.closing(sqlite3.connect(f"file:{quote(str(path))}?mode=rw", uri=True, timeout=5)) as database:
            tables = {table for (table,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            found = database.execute("SELECT version_num FROM alembic_version") if "alembic_version" in tables else ()
            versions = {version for (version,) in found}
            database.execute("BEGIN IMMEDIATE")
    except sqlite3.Error as error:
        if "locked" in str(error):
            return Health("down", f"{name}: busy; events wait in the spool")
        return Health("refuses", f"{name}: {error}; put it right, or move it away and `erpe sync` fills a new one")
    known, newest = _schemas()
    if not tables or versions == newest:
        return Health("well")
    if versions and versions <= known:
        return Health(
            "refuses", f"{name}: an older MLflow made it; `mlflow db upgrade sqlite:///{path}` would do, with a backup"
        )
    return Health("refuses", f"{name}: not of this MLflow version; move it away, and `erpe sync` fills a new one")


def _schemas() -> tuple[set[str], set[str]]:
    """Every revision of the database that the installed MLflow knows, and the newest."""
    package = importlib.util.find_spec("mlflow")
    folder = Path(next(iter(package.submodule_search_locations or []))) if package else Path()
    known, followed = set(), set()
    for file in (folder / "store" / "db_migrations" / "versions").glob("*.py"):
        text = file.read_text()
        known.update(re.findall(r'^revision\b.*?= *["\'](\w+)', text, re.M))
        followed.update(re.findall(r'^down_revision\b.*?= *["\'](\w+)', text, re.M))
    return known, known - followed


def redact_text(text: str) -> str:
    """A message without the passwords of the URLs in it."""
    return re.sub(r"(\w+://)[^/\s@]+@", r"\1", text)
