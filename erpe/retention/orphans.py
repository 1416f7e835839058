"""What belongs to nothing in a store, as a kill or a lost database leaves it: found by its name, and removed.

    checkpoints/STUDY/NUMBER-SEED       of no trial that the database knows, and without a trial's history
    checkpoints/STUDY/*/.NAME.xxxxxxxx  a file that was being written when its writer was killed
    artifacts/STUDY/RUN                 of no run that MLflow knows

Whatever is called otherwise, or is a link, is not ours and stays.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from erpe.errors import BusyError
from erpe.io import remove_folder, size_mib
from erpe.store import FILES, HISTORY, Store
from erpe.study import storage
from erpe.study.lock import acquire
from erpe.study.reading import read_studies
from erpe.tracking.deletion import Logged, stray_artifacts

_TRIAL = re.compile(r"\d{4,}-\d+")
_DRAFT = re.compile(rf"\.({'|'.join(map(re.escape, FILES))})\.\w{{8}}")  # see `erpe.io.write_atomic`


class Stray(NamedTuple):
    """A folder or a file that belongs to nothing."""

    path: Path
    mib: float


def sweep_strays(store: Store, logged: Logged, experiments: dict[str, list[str]] | None, dry_run: bool) -> list[Stray]:
    """Find what belongs to nothing, and remove it unless it is a dry run; a study that runs is left alone.

    Args:
        experiments: experiment -> its studies, to look at; default: all there is.
    Raises:
        StoreError: the database cannot be read; or something cannot be removed.
    """
    places = (
        _names(store.checkpoints) if experiments is None else [name for each in experiments.values() for name in each]
    )
    found: list[Stray] = []
    for name in places:
        if any(_candidates(store, name, set())):
            with contextlib.suppress(BusyError), contextlib.ExitStack() as lease:
                lease.callback(acquire(storage.parse(store.storage_url), name).release)
                found += _sweep(_candidates(store, name, _counted(store, name)), dry_run)
    for experiment in _names(store.artifacts) if experiments is None else experiments:
        found += _sweep(stray_artifacts(logged, experiment), dry_run)
    return found


def _sweep(paths: Iterable[Path], dry_run: bool) -> list[Stray]:
    found = [Stray(path, size_mib(path)) for path in paths]
    for path, _ in [] if dry_run else found:
        remove_folder(path) if path.is_dir() else path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            path.parent.rmdir()  # of a study that is not there either
    return found


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.is_symlink())


def _candidates(store: Store, study: str, known: set[str]) -> Iterator[Path]:
    """Yield what is called as a trial's folder of the study and is none of those known, and half-written files."""
    place = store.checkpoints / study
    if not place.is_dir():
        return
    for path in sorted(place.iterdir()):
        if path.is_symlink() or not path.is_dir() or not _TRIAL.fullmatch(path.name):
            continue
        if f"{study}/{path.name}" not in known and not (path / HISTORY).exists():  # perhaps of another database
            yield path
        else:
            drafts = (file for file in sorted(path.iterdir()) if _DRAFT.fullmatch(file.name))
            yield from (file for file in drafts if file.is_file() and not file.is_symlink())


def _counted(store: Store, study: str) -> set[str]:
    """Return the folders of all trials that the database has of a study."""
    found = (each for each in read_studies(store) if each.name == study)
    return {f"{study}/{trial.number:04d}-{trial.config.seed}" for each in found for trial in each.trials}
