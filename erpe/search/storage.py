"""The database under the ledger: opened with one line for what is wrong, waited for, and leased.

Two homes: SQLite (a file and a lock beside it) and PostgreSQL (a server and an advisory lock).
"""

from __future__ import annotations

import functools
import hashlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ParamSpec, Protocol, TypeVar

import filelock
import optuna
import sqlalchemy
from optuna.exceptions import StorageInternalError
from optuna.storages import RDBStorage
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, InterfaceError, OperationalError, SQLAlchemyError

from erpe.errors import StoreError, StudyError

P = ParamSpec("P")
R = TypeVar("R")

PATIENCE_SECONDS = 60.0
"""How long a call waits for a database that went away before the study stops, resumable."""

OPENING_SECONDS = 5.0
"""How long the first call waits: a wrong address should not take a minute to be told."""

# A peer that vanished without a word is noticed within half a minute instead of hours.
_POSTGRES = {
    "connect_timeout": 10, "keepalives_idle": 10, "keepalives_interval": 5, "keepalives_count": 3,
    "tcp_user_timeout": 30_000,
}  # fmt: skip


def parse(url: str) -> URL:
    """The address of a database.

    Raises:
        StoreError: not an address, or neither SQLite in a file nor PostgreSQL.
    """
    try:
        parsed = make_url(url)
    except ArgumentError:
        raise StoreError(f"database {url!r}: not an address; postgresql+psycopg://user@host/name would do") from None
    if parsed.get_backend_name() == "postgres":
        parsed = parsed.set(drivername="postgresql+psycopg")
    in_file = parsed.get_backend_name() == "sqlite" and parsed.database not in (None, "", ":memory:")
    if not in_file and parsed.get_backend_name() != "postgresql":
        raise StoreError(f"database {show(parsed)}: sqlite:///FILE or postgresql+psycopg://... would do")
    return parsed


def show(url: URL) -> str:
    """The address without its password."""
    return url.render_as_string(hide_password=True)


def exists(url: URL) -> bool:
    """Whether there may be something to read: looking must not make a file."""
    return url.get_backend_name() != "sqlite" or Path(str(url.database)).exists()


def connect_args(url: URL) -> dict[str, Any]:
    """Patience with locks, and notice of dead peers."""
    return {"timeout": 30} if url.get_backend_name() == "sqlite" else dict(_POSTGRES)


def open_storage(url: URL) -> RDBStorage:
    """Open Optuna's database, making its tables if it is empty.

    Raises:
        StoreError: it cannot be reached, is damaged, or belongs to another program or version.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    text = url.render_as_string(hide_password=False)
    engine = {"pool_pre_ping": True, "connect_args": connect_args(url)}
    try:
        return patient(RDBStorage, OPENING_SECONDS)(text, engine_kwargs=engine)
    except (RuntimeError, ModuleNotFoundError, AssertionError) as error:
        # Optuna compares the version in the schema with its own.
        raise StoreError(
            f"database {show(url)}: not one of Optuna {optuna.__version__} ({_line(error)}); "
            "ERPE_STORAGE_URL or --store names another"
        ) from None
    except Exception as error:
        if type(error).__module__.startswith("alembic"):
            raise StoreError(
                f"database {show(url)}: another program's tables are in it; a database of its own would do"
            ) from None
        raise


def patient(call: Callable[P, R], seconds: float | None = None) -> Callable[P, R]:
    """Repeat a call while its database is away; it must be one that may run twice.

    Args:
        seconds: how long; none: `PATIENCE_SECONDS`.
    Raises:
        StoreError: the database stayed away for longer, or is full, read-only or damaged.
    """

    @functools.wraps(call)
    def repeated(*args: P.args, **kwargs: P.kwargs) -> R:
        start, pause = time.monotonic(), 0.1
        while True:
            try:
                return call(*args, **kwargs)
            except (StorageInternalError, SQLAlchemyError) as error:
                cause = error if isinstance(error, SQLAlchemyError) else error.__cause__
                if not _may_pass(cause):
                    raise StoreError(
                        f"database: {_line(cause or error)}; nothing is lost, mend it and run again"
                    ) from error
                waited = time.monotonic() - start
                if waited > (PATIENCE_SECONDS if seconds is None else seconds):
                    raise StoreError(
                        f"database: away for {waited:.0f} s ({_line(cause or error)}); nothing is lost"
                    ) from error
            time.sleep(pause)
            pause = min(2 * pause, 5.0)

    return repeated


def _may_pass(error: BaseException | None) -> bool:
    """A server that restarts, a lock that is held; not a full disk or a wrong password."""
    if not isinstance(error, OperationalError | InterfaceError):
        return False
    text = str(error.orig).lower()
    if "sqlite" in type(error.orig).__module__:
        return "locked" in text or "busy" in text
    return not any(hint in text for hint in ("password", "authentication", "does not exist", "no space", "disk full"))


def _line(error: BaseException) -> str:
    """The first line of what a database said."""
    text = str(getattr(error, "orig", None) or error).strip()
    return (text.splitlines() or [type(error).__name__])[0][:200]


class Lease(Protocol):
    """The right to write to a study; one process has it, and a killed one loses it at once."""

    def check(self) -> None:
        """Make sure that it is still held.

        Raises:
            StudyError: somebody else took it after the database went away.
        """

    def release(self) -> None:
        """Let the next one in."""


def lease(url: URL, study: str) -> Lease:
    """Take a study's lease, or refuse.

    Raises:
        StudyError: another process has it.
    """
    return _FileLease(url, study) if url.get_backend_name() == "sqlite" else patient(_PostgresLease)(url, study)


def _taken(study: str) -> StudyError:
    return StudyError(f"study {study}: another erpe is running it; wait for it, stop it, or --new starts another")


class _FileLease:
    def __init__(self, url: URL, study: str) -> None:
        folder = Path(str(url.database)).resolve().parent / "locks"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            # Released by the kernel however the process ends.
            self._lock = filelock.FileLock(folder / f"{study}.lock")
            self._lock.acquire(blocking=False)
        except filelock.Timeout:
            raise _taken(study) from None
        except OSError as error:
            raise StoreError(f"{folder}: no lock can be made ({error.strerror})") from None

    def check(self) -> None:
        """Held as long as the process lives."""

    def release(self) -> None:
        self._lock.release()


class _PostgresLease:
    def __init__(self, url: URL, study: str) -> None:
        self._study = study
        self._key = int.from_bytes(hashlib.sha256(f"erpe:{study}".encode()).digest()[:8], signed=True)
        self._engine = sqlalchemy.create_engine(
            url, poolclass=sqlalchemy.NullPool, isolation_level="AUTOCOMMIT", connect_args=connect_args(url)
        )
        self._connection = self._engine.connect()
        self._take()

    def _take(self) -> None:
        # A dead machine's session would keep its lock until the server notices: let it notice.
        for name, value in (("idle", 30), ("interval", 10), ("count", 3)):
            self._connection.execute(sqlalchemy.text(f"SET tcp_keepalives_{name} = {value}"))
        query = sqlalchemy.text("SELECT pg_try_advisory_lock(:key)")
        if not self._connection.execute(query, {"key": self._key}).scalar():
            self._connection.close()
            raise _taken(self._study)

    def check(self) -> None:
        try:
            self._connection.execute(sqlalchemy.text("SELECT 1"))
        except SQLAlchemyError:
            # The lock went with its connection; whoever came first has it now.
            self._connection.close()
            self._connection = self._engine.connect()
            self._take()

    def release(self) -> None:
        self._connection.close()
        self._engine.dispose()
