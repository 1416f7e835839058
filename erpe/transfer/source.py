"""A store that was made elsewhere, read without trust: nothing in it is changed, followed, unpickled or run."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import optuna
from pydantic import StrictInt, TypeAdapter

from erpe.errors import ErpeError, StoreError, StudyError
from erpe.io import MIB, parse_json, read_json
from erpe.store import FILES, HISTORY, LAYOUT, Store, sqlite_url
from erpe.study.naming import shown
from erpe.study.plan_file import stored_plan
from erpe.study.reading import read_study
from erpe.study.records import REMOVED, StudyRecord, TrialRecord, irreplaceable
from erpe.study.spec import check_name
from erpe.study.storage import Database, first_line
from erpe.tracking.history import is_line

_DATABASE = 1024 * MIB
_RECORD, _NUMBERS = TypeAdapter(StudyRecord), TypeAdapter(list[StrictInt])


class Member(NamedTuple):
    """A study of the foreign store, as Optuna has it and as erpe understands it."""

    study: optuna.Study
    record: StudyRecord

    @property
    def experiment(self) -> str:
        """See `StudyRecord.experiment`."""
        return self.record.experiment


class Foreign:
    """A foreign store, open.

    Raises:
        StoreError: something in it is not what erpe writes; the line says what.
    """

    def __init__(self, root: Path, database: Database) -> None:
        self.root, self.database = root, database
        self.members = {name: self._read(name) for name in database.names()}

    @classmethod
    @contextlib.contextmanager
    def open(cls, folder: Path) -> Iterator[Foreign]:
        """Read its studies from a copy of its database.

        Raises:
            StoreError: it is no store, or damaged, or has links.
            StudyError: a study is running there.
        """
        root = folder.resolve()
        with contextlib.ExitStack() as opened:
            if not plain(root, root / "erpe.json", MIB) or read_json(root / "erpe.json") != {"layout": LAYOUT}:
                raise StoreError(f"{folder}: not a store of this version of erpe (erpe.json is missing or another)")
            if not plain(root, root / "optuna.db", _DATABASE):
                raise StoreError(f"{folder}: has no optuna.db, so no study was run into it")
            for lock in sorted((root / "locks").glob("*.lock")):
                opened.enter_context(_idle(root, lock))
            copy = Path(opened.enter_context(tempfile.TemporaryDirectory(prefix="erpe-"))) / "optuna.db"
            for end in ("", "-wal"):  # what was not yet moved from the log to the database is there, too
                if plain(root, root / f"optuna.db{end}", _DATABASE):
                    shutil.copyfile(root / f"optuna.db{end}", f"{copy}{end}")
            _check_tables(copy, root / "optuna.db")
            with _distrust(root / "optuna.db", copy):
                database = Database(sqlite_url(copy))
                opened.callback(database.close)
                found = cls(root, database)
            yield found

    def _read(self, name: str) -> Member:
        study = optuna.load_study(study_name=check_name(name), storage=self.database.backend)
        found = Member(study, read_study(study))
        numbers = [trial.number for trial in study.get_trials(deepcopy=False)]
        if not re.fullmatch("[0-9a-f]{12}", found.record.about.uid) or numbers != list(range(len(numbers))):
            raise ValueError(f"study {shown(name)}: uid {found.record.about.uid!r}, trials {numbers}")
        _RECORD.validate_python(found.record)
        removed = _NUMBERS.validate_python(study.user_attrs.get(REMOVED, []))
        if gone := irreplaceable(found.record).keys() & set(removed):
            raise ValueError(f"study {shown(name)}: trials {sorted(gone)} were removed, which erpe never does")
        if part_of := found.record.part_of:
            check_name(part_of.arm)
            if stored_plan(part_of.plan).name != check_name(part_of.study):
                raise ValueError(f"study {shown(name)}: its plan names another study")
        return found

    def files(self, member: Member, trial: TrialRecord) -> dict[str, Path]:
        """Return what lies in a trial's folder, every file looked into; nothing, if the trial was removed.

        Raises:
            StoreError: a link, a file that is damaged or too large, or a complete trial without its outcome.
        """
        if trial.removed:
            return {}
        folder = Store(self.root).trial_folder(member.record.name, trial.number, trial.config.seed)
        found = {name: folder / name for name, most in FILES.items() if plain(self.root, folder / name, most)}
        for path in found.values():
            _look_into(path)
        if trial.state == "COMPLETE" and "outcome.json" not in found:
            raise StoreError(f"{folder}: the trial is complete and its outcome.json is missing; copy the store whole")
        return found


@contextlib.contextmanager
def _distrust(database: Path, copy: Path) -> Iterator[None]:
    """Whatever goes wrong is the fault of who wrote the database, and one line."""
    try:
        yield
    except ErpeError as error:
        said = str(error).replace(f"database {sqlite_url(copy)}: ", "")
        raise type(error)(f"{database}: {said}") from None
    except Exception as error:
        raise StoreError(f"{database}: damaged, or not written by erpe ({first_line(error)})") from None


def plain(root: Path, path: Path, most: int) -> bool:
    """Whether there is a file; then it is no link, on no linked path, no device, and not too large.

    Raises:
        StoreError: it is.
    """
    if not os.path.lexists(path):
        return False
    if path.resolve() != path or not path.is_relative_to(root) or not path.is_file():
        raise StoreError(f"{path}: a link or not a plain file; a store has none")
    if path.stat().st_size > most:
        raise StoreError(f"{path}: {path.stat().st_size} bytes, more than the {most} that it may have")
    return True


@contextlib.contextmanager
def _idle(root: Path, lock: Path) -> Iterator[None]:
    """Lock a study, so that no process runs it while we read."""
    plain(root, lock, MIB)
    with lock.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StudyError(f"study {lock.stem}: is running in {root}; wait for it, or stop it") from None
        yield


def _check_tables(copy: Path, shown: Path) -> None:
    """Only tables, none virtual: a view or a trigger could compute for ever."""
    try:
        with contextlib.closing(sqlite3.connect(copy)) as database:
            other = "SELECT count(*) FROM sqlite_master WHERE type NOT IN ('table', 'index') OR sql LIKE '%VIRTUAL%'"
            if database.execute(other).fetchone()[0] or database.execute("PRAGMA quick_check").fetchone() != ("ok",):
                raise StoreError(f"{shown}: damaged, or not Optuna's tables")
    except sqlite3.Error as error:
        raise StoreError(f"{shown}: not a database, or damaged ({error})") from None


def _look_into(path: Path) -> None:
    """Refuse a file that was copied by half; it is found before anything is written."""
    from erpe.io import read_arrays

    try:
        if path.suffix == ".json":
            read_json(path)
        elif path.name == HISTORY:
            if not all(is_line(parse_json(line)) for line in path.read_bytes().splitlines() if line):
                raise ValueError("a line of another program")
        elif path.suffix == ".npz":
            read_arrays(path)
        elif path.suffix == ".safetensors":
            from safetensors import SafetensorError, safe_open

            try:
                with safe_open(path, framework="np"):
                    pass
            except SafetensorError as error:
                raise ValueError(error) from None
    except (StoreError, ValueError) as error:
        raise StoreError(f"{path}: damaged ({error}); copy the store again") from None
