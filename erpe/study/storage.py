"""The database under the session: opened with one line for what is wrong, and waited for when it goes away.

Two homes: SQLite, a file, and PostgreSQL, a server.
"""

from __future__ import annotations

import functools
import re
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import optuna
from optuna.exceptions import StorageInternalError
from optuna.storages import RDBStorage
from sqlalchemy import exc
from sqlalchemy.engine import URL, make_url

from erpe.errors import StoreError
from erpe.text import redact

P = ParamSpec("P")
R = TypeVar("R")

PATIENCE_SECONDS = 60.0
"""How long a call waits for a database that went away before the study stops, resumable."""

OPENING_SECONDS = 5.0
"""How long the first call waits: a wrong address should not take a minute to be told."""

RESTORE = "checkpoints and MLflow are untouched, and `erpe restore` brings back a backup of the database"
_DAMAGED = re.compile("malformed|not a database|disk image|file is encrypted|corrupt", re.I)

# A peer that vanished without a word is noticed within half a minute instead of hours.
_POSTGRES = {
    "connect_timeout": 10, "keepalives_idle": 10, "keepalives_interval": 5, "keepalives_count": 3,
    "tcp_user_timeout": 30_000,
}  # fmt: skip


def parse(address: str) -> URL:
    """Return the address of a database.

    Raises:
        StoreError: not an address, or neither SQLite in a file nor PostgreSQL.
    """
    try:
        url = make_url(address)
    except (exc.ArgumentError, ValueError):  # a password with a slash, and its rest is no port
        raise StoreError(
            "database: ERPE_STORAGE_URL is no address; use postgresql+psycopg://USER@HOST/NAME instead"
        ) from None
    if url.get_backend_name() == "postgres":
        url = url.set(drivername="postgresql+psycopg")
    in_file = is_file(url) and url.database not in (None, "", ":memory:")
    if not in_file and url.get_backend_name() != "postgresql":
        raise StoreError(f"database {show(url)}: use sqlite:///FILE or postgresql+psycopg://USER@HOST/NAME instead")
    return url


def is_file(url: URL) -> bool:
    """Whether it is SQLite."""
    return url.get_backend_name() == "sqlite"


def show(url: URL) -> str:
    """Return the address without its secrets."""
    return redact(url.set(password=None).render_as_string())


def connect_args(url: URL) -> dict[str, Any]:
    """Patience with locks, and notice of dead peers."""
    return {"timeout": 30} if is_file(url) else dict(_POSTGRES)


def exists(url: URL) -> bool:
    """Whether there may be something to read: looking must not make a file.

    Raises:
        StoreError: see `check_lost`.
    """
    check_lost(url)
    return not is_file(url) or Path(str(url.database)).exists()


def check_lost(url: URL) -> None:
    """Refuse an empty file: it would become an empty database, and what was in it would not be missed.

    Raises:
        StoreError: the database is missing or empty, and its store shows that there was one.
    """
    path = Path(str(url.database))
    if not is_file(url) or (path.exists() and path.stat().st_size):
        return
    saved, trained = path.parent / "backups" / "optuna-newest.db", path.parent / "checkpoints"
    if saved.exists() or (path.exists() and trained.is_dir() and any(trained.iterdir())):
        raise StoreError(f"database {path}: {'empty' if path.exists() else 'missing'}; {RESTORE}")


def retry_while_unavailable(call: Callable[P, R], seconds: float | None = None) -> Callable[P, R]:
    """Repeat a call while its database is away; it must be one that may run twice.

    Args:
        seconds: how long; default: `PATIENCE_SECONDS`.
    Raises:
        StoreError: the database stayed away for longer, or is full, read-only or damaged.
    """

    @functools.wraps(call)
    def repeated(*args: P.args, **kwargs: P.kwargs) -> R:
        start, pause = time.monotonic(), 0.1
        while True:
            try:
                return call(*args, **kwargs)
            except (StorageInternalError, exc.SQLAlchemyError) as error:
                cause = error if isinstance(error, exc.SQLAlchemyError) else error.__cause__
                said, waited = first_line(cause or error), time.monotonic() - start
                if isinstance(cause, exc.DatabaseError) and _DAMAGED.search(said):
                    raise StoreError(f"database: damaged ({said}); {RESTORE}") from error
                if not _may_pass(cause):
                    raise StoreError(f"database: {said}; nothing is lost, repair it and run again") from error
                if waited > (PATIENCE_SECONDS if seconds is None else seconds):
                    raise StoreError(f"database: no answer for {waited:.0f} s ({said}); nothing is lost") from error
            time.sleep(pause)
            pause = min(2 * pause, 5.0)

    return repeated


_MADE = re.compile(r"(?:table|relation) \W?(?!ix_)\w+\W? already exists|pg_type|alembic_version|version_info")
"""Of an error while another process, which opened the new database at the same time, makes its tables; an index that is
there without its table is of a damaged one."""


def _may_pass(error: BaseException | None) -> bool:
    """Whether waiting may help: a server that restarts, a lock that is held; not a full disk or a wrong password."""
    if isinstance(error, exc.PendingRollbackError):  # the connection went away in the middle of a transaction
        return True
    if isinstance(error, exc.DatabaseError) and _MADE.search(str(error.orig)):
        return True
    if not isinstance(error, exc.OperationalError | exc.InterfaceError):
        return False
    text = str(error.orig).lower()
    if "sqlite" in type(error.orig).__module__:
        return "locked" in text or "busy" in text
    return not any(hint in text for hint in ("password", "authentication", "does not exist", "no space", "disk full"))


def first_line(error: BaseException) -> str:
    """Return the first line of what a database said."""
    text = str(getattr(error, "orig", None) or error).strip()
    return redact((text.splitlines() or [type(error).__name__])[0])[:200]


class _WriteAhead(sqlite3.Connection):
    """One fsync a commit made a trial wait 0.3 s for its twenty commits.

    With a write-ahead log a kill loses nothing and a power cut the last moments, which trials and their seeds repeat
    identically.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for pragma in ("journal_mode = WAL", "synchronous = NORMAL"):
            self.execute(f"PRAGMA {pragma}").close()


class Database:
    """Optuna's tables; made if they are not there.

    Raises:
        StoreError: it cannot be reached, is damaged, or belongs to another program or version.
    """

    def __init__(self, address: str) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.url = parse(address)
        self.backend = self._open()
        """What Optuna's studies are made on."""

    def _open(self) -> RDBStorage:
        check_lost(self.url)
        text = self.url.render_as_string(hide_password=False)
        connect = connect_args(self.url) | ({"factory": _WriteAhead} if is_file(self.url) else {})
        engine = {"pool_pre_ping": not is_file(self.url), "connect_args": connect}
        try:
            return retry_while_unavailable(RDBStorage, OPENING_SECONDS)(text, engine_kwargs=engine)
        except StoreError as error:
            raise StoreError(str(error).replace("database:", f"database {show(self.url)}:", 1)) from None
        except (RuntimeError, AssertionError) as error:
            # Optuna compares the version in the schema with its own.
            raise StoreError(
                f"database {show(self.url)}: not one of Optuna {optuna.__version__} ({first_line(error)}); "
                "ERPE_STORAGE_URL or --store names another"
            ) from None
        except Exception as error:
            if type(error).__module__.startswith("alembic"):
                raise StoreError(
                    f"database {show(self.url)}: another program's tables are in it; use one of its own"
                ) from None
            raise

    def study_attrs(self, name: str) -> dict[str, Any]:
        """Return the user attributes of a study."""
        return optuna.load_study(study_name=name, storage=self.backend).user_attrs

    def names(self) -> list[str]:
        """All studies."""
        return sorted(retry_while_unavailable(optuna.get_all_study_names)(self.backend))

    def close(self) -> None:
        """Give the connections back."""
        self.backend.remove_session()
        self.backend.engine.dispose()
