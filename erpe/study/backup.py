"""Backups of the embedded database, the one truth about trials: two of them, made as a command begins and ends."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, ParamSpec, TypeVar

import optuna
from filelock import FileLock, Timeout
from optuna.exceptions import StorageInternalError
from sqlalchemy.exc import SQLAlchemyError

from erpe.errors import BusyError, StoreError, StudyError, nearest
from erpe.store import Store, sqlite_path
from erpe.study.naming import shown
from erpe.text import first_line, last_line

P = ParamSpec("P")
R = TypeVar("R")

WORDS = ("newest", "older")
"""What the backups are called; the files are `backups/optuna-newest.db` and `backups/optuna-older.db`."""


class Copy(NamedTuple):
    """A database, looked into."""

    path: Path
    modified: float
    """Seconds since 1970."""
    studies: int
    trials: int
    damage: str = ""
    """What is wrong with it; empty if it is whole."""


def backed_up(command: Callable[P, R]) -> Callable[P, R]:
    """Back up the database of the store that a command is given, before and after it, whatever its end."""

    @functools.wraps(command)
    def kept(*args: P.args, **kwargs: P.kwargs) -> R:
        with keeping(next(given for given in (*args, *kwargs.values()) if isinstance(given, Store))):
            return command(*args, **kwargs)

    return kept


@contextlib.contextmanager
def keeping(store: Store) -> Iterator[None]:
    """Back up the database before and after what is done inside.

    Raises:
        StoreError: the database is damaged.
    """
    keep(store)
    try:
        yield
    finally:
        with contextlib.suppress(StoreError):  # the next command says so
            keep(store)


def keep(store: Store) -> None:
    """Make the database's copy the newest backup, unless it is that already or someone else is about it.

    Raises:
        StoreError: the database is damaged; the backups stay as they are.
    """
    path = embedded(store)
    if path is None or not path.exists() or not path.stat().st_size:
        return
    newest, older = backup_files(store)
    draft = newest.with_name("draft.db")
    with contextlib.suppress(OSError, Timeout):  # a full disk stops the command itself
        newest.parent.mkdir(exist_ok=True)
        with FileLock(newest.with_name("lock"), timeout=0):
            draft.unlink(missing_ok=True)
            damage = _copy(path, draft)
            if damage:
                draft.unlink(missing_ok=True)
                raise StoreError(f"{path}: damaged ({damage}); `erpe restore` shows what is left of it")
            if newest.exists() and newest.read_bytes() == draft.read_bytes():
                draft.unlink()
                return
            if newest.exists():
                os.replace(newest, older)
            os.replace(draft, newest)


def _copy(path: Path, into: Path) -> str:
    """Copy a database that others may write to; what is wrong with it, or nothing."""
    try:
        with contextlib.closing(_open(path, "rw")) as source, contextlib.closing(sqlite3.connect(into)) as target:
            source.backup(target)
            target.execute("PRAGMA journal_mode = DELETE")  # one file, without a log beside it
        return damage_of(into)
    except sqlite3.DatabaseError as error:
        return str(error)


def _open(path: Path, mode: str = "ro") -> sqlite3.Connection:
    """Connect to a file; the last process with write access removes the log beside it, one that reads leaves it."""
    return sqlite3.connect(f"{path.as_uri()}?mode={mode}", uri=True, timeout=30)


def damage_of(path: Path) -> str:
    """Return what is wrong with a SQLite file; empty if it is whole, or someone holds it."""
    try:
        with contextlib.closing(_open(path)) as database:
            said = str(database.execute("PRAGMA quick_check").fetchone()[0])
        return "" if said == "ok" else last_line(said)
    except sqlite3.OperationalError as error:
        return str(error) if "disk image" in str(error) else ""
    except sqlite3.DatabaseError as error:
        return str(error)


def _look(path: Path) -> Copy:
    """Return what a database of trials has, or what is wrong with it."""
    if not path.exists() or not path.stat().st_size:
        return Copy(path, 0.0, 0, 0, "empty" if path.exists() else "missing")
    studies, trials, damage = 0, 0, damage_of(path)
    if not damage:
        try:
            studies, trials = _count(path)
        except StoreError as error:
            damage = str(error)
    return Copy(path, path.stat().st_mtime, studies, trials, damage)


def _count(path: Path) -> tuple[int, int]:
    """Count the studies and trials of a database that nobody may change; raises StoreError if it is not Optuna's."""
    try:
        database = optuna.storages.RDBStorage("sqlite://", engine_kwargs={"creator": functools.partial(_open, path)})
    except (StorageInternalError, SQLAlchemyError, RuntimeError, AssertionError) as error:
        raise StoreError(first_line(error)) from None
    try:
        found = optuna.get_all_study_summaries(database, include_best_trial=False)
    finally:
        database.remove_session()
        database.engine.dispose()
    studies = {shown(each.study_name).partition("/")[0] for each in found}
    return len(studies), sum(each.n_trials for each in found)


def embedded(store: Store) -> Path | None:
    """Return the database, if it lies in the store."""
    path = sqlite_path(store.storage_url)
    return path if path and path.is_relative_to(store.root) else None


def backup_files(store: Store) -> tuple[Path, Path]:
    """Where the newest backup and the older one lie."""
    newest, older = (store.root / "backups" / f"optuna-{word}.db" for word in WORDS)
    return newest, older


def survey(store: Store) -> tuple[Copy, dict[str, Copy]]:
    """Return the database as it is, and the backups by their names.

    Raises:
        StoreError: the database does not lie in the store.
    """
    path = embedded(store)
    if path is None:
        raise StoreError("restore: the database lies outside of the store; use the backups of its server instead")
    found = dict(zip(WORDS, backup_files(store), strict=True))
    return _look(path), {word: _look(file) for word, file in found.items() if file.exists()}


def restore(store: Store, word: str) -> Path:
    """Put a backup in the place of the database.

    Returns:
        Where the former database is kept.
    Raises:
        BusyError: a study is running.
        StudyError: there is no such backup.
        StoreError: it is damaged, too; or see `survey`.
    """
    now, backups = survey(store)
    if word not in backups:
        raise StudyError(f"restore: no backup {word!r}; {nearest(word, list(backups)) if backups else 'there is none'}")
    if damage := backups[word].damage:
        raise StoreError(f"{backups[word].path}: damaged ({damage}); use the other backup instead")
    with contextlib.ExitStack() as held:
        for file in sorted((store.root / "locks").glob("*.lock")):
            try:
                held.enter_context(FileLock(file, timeout=0, is_singleton=False))
            except Timeout:
                raise BusyError(
                    f"study {shown(file.stem)}: another erpe is running it; wait for it, or stop it"
                ) from None
        return _exchange(backups[word].path, now.path)


def _exchange(backup: Path, path: Path) -> Path:
    draft = path.with_name("optuna.draft.db")
    shutil.copyfile(backup, draft)
    kept = move_aside(path, "before-restore")
    os.replace(draft, path)
    return kept


def move_aside(path: Path, word: str) -> Path:
    """Rename a SQLite file and its logs -> where it is now: NAME.WORD-1, or a higher number that is free."""
    number = 1
    while (kept := path.with_name(f"{path.name}.{word}-{number}")).exists():
        number += 1
    for end in ("-wal", "-shm", ""):  # a killed call is repeated: its logs belong to no other database
        if (file := path.with_name(path.name + end)).exists():
            os.replace(file, kept.with_name(kept.name + end))
    return kept
