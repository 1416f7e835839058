"""The right to write to a study: one process has it, and a killed one loses it at once."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Concatenate, NamedTuple, ParamSpec, TypeVar

import filelock
import sqlalchemy
from sqlalchemy.engine import URL
from sqlalchemy.exc import SQLAlchemyError

from erpe.errors import BusyError, StoreError
from erpe.study.naming import shown
from erpe.study.storage import connect_args, is_file, retry_while_unavailable

if TYPE_CHECKING:
    from erpe.study.session import StudySession


def _taken(study: str) -> BusyError:
    return BusyError(f"study {shown(study)}: another erpe is running it; wait for it, or stop it")


class Lease(NamedTuple):
    """Held from its making until `release` or the end of the process."""

    release: Callable[[], None]
    """Let the next one in."""
    check: Callable[[], None] = lambda: None
    """Make sure that it is still held; raises BusyError."""


def _lock_file(url: URL, study: str) -> Lease:
    """Lock a file beside the database; the kernel releases it however the process ends."""
    folder = Path(str(url.database)).resolve().parent / "locks"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(folder / f"{study}.lock", is_singleton=False)
        lock.acquire(blocking=False)
    except filelock.Timeout:
        raise _taken(study) from None
    except OSError as error:
        raise StoreError(f"{folder}: no lock can be made ({error.strerror})") from None
    return Lease(lock.release)


class _PostgresLease:
    """An advisory lock on a connection of its own; the server releases it when the connection ends."""

    def __init__(self, url: URL, study: str) -> None:
        self._study = study
        self._key = int.from_bytes(hashlib.sha256(f"erpe:{study}".encode()).digest()[:8], signed=True)
        self._engine = sqlalchemy.create_engine(
            url, poolclass=sqlalchemy.NullPool, isolation_level="AUTOCOMMIT", connect_args=connect_args(url)
        )
        self._take()

    def _take(self) -> None:
        self._connection = self._engine.connect()
        # A dead machine's session would keep its lock until the server notices: let it notice.
        for name, value in (("idle", 30), ("interval", 10), ("count", 3)):
            self._connection.execute(sqlalchemy.text(f"SET tcp_keepalives_{name} = {value}"))
        query = sqlalchemy.text("SELECT pg_try_advisory_lock(:key)")
        if not self._connection.execute(query, {"key": self._key}).scalar():
            self.release()
            raise _taken(self._study)

    def check(self) -> None:
        """Make sure that it is still held.

        Raises:
            BusyError: somebody else took it after the database went away.
        """
        try:
            self._connection.execute(sqlalchemy.text("SELECT 1"))
        except SQLAlchemyError:
            # The lock went with its connection; the first process to ask has it now.
            self.release()
            self._take()

    def release(self) -> None:
        """Let the next one in."""
        self._connection.close()
        self._engine.dispose()


def acquire(url: URL, study: str) -> Lease:
    """Take a study's lease, or refuse.

    Raises:
        BusyError: another process has it.
        StoreError: no lock can be made.
    """
    if is_file(url):
        return _lock_file(url, study)
    held = retry_while_unavailable(_PostgresLease)(url, study)
    return Lease(held.release, held.check)


P = ParamSpec("P")
R = TypeVar("R")


def fenced(write: Callable[Concatenate[StudySession, P], R]) -> Callable[Concatenate[StudySession, P], R]:
    """Make a method a write of the driver: it waits for a database that is away; once another took over, it fails."""

    @retry_while_unavailable
    @functools.wraps(write)
    def guarded(self: StudySession, /, *args: P.args, **kwargs: P.kwargs) -> R:
        self.guard()
        try:
            return write(self, *args, **kwargs)
        except Exception:
            self.guard()  # another driver in between explains whatever failed
            raise

    return guarded
