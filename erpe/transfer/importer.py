"""Take over what another store holds: a study that was run elsewhere without MLflow arrives here, once.

    adopt(Path("from-the-gpu-box"), Store.open("runs"))

Everything is read and checked first; what is refused is refused before a byte is written. Then, in this order,

1. files: results and checkpoints, each whole or not at all. They are not read before the database names them.
2. the Optuna database, a study after the other. From now on the trials are known here, with their files.
3. what `erpe gc` removed, here or there: those trials are removed in both, and do not return.

Killed in between, the same call starts from the first step and finds what it did: a file of equal content, a study
that is already the same. So each arrives once, also when the other store has gone on and is taken over again.
What went on in both places is refused: neither may be lost. `erpe.tracking.tracker.sync` then brings MLflow up to date.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import NamedTuple

import optuna

from erpe.errors import StoreError, StudyError
from erpe.io import remove_folder, write_atomic
from erpe.store import STATE, Store
from erpe.study import storage
from erpe.study.backup import backed_up
from erpe.study.lock import acquire
from erpe.study.lookup import studies_of
from erpe.study.naming import shown
from erpe.study.reading import mark_removed, read_about, read_studies
from erpe.study.records import EPOCH, REMOVED
from erpe.transfer.optuna_copy import continues, copy, facts
from erpe.transfer.source import Foreign, Member


class Adopted(NamedTuple):
    """What arrived of a study of `erpe study run` or `erpe tune`."""

    study: str
    trials: int
    """New ones, and those that went on."""


@backed_up
def adopt(folder: Path, store: Store) -> list[Adopted]:
    """Take over all studies of the store in `folder`, or what is new of them.

    Raises:
        StoreError: `folder` is no store, is damaged, or holds what erpe does not write; or this store cannot be
            written.
        StudyError: a different study here has that name, or it continued here, too, or is running.
    """
    with contextlib.ExitStack() as opened:
        foreign = opened.enter_context(Foreign.open(folder))
        if foreign.root == store.root:
            raise StoreError(f"{folder}: is this store itself; --store names another")
        experiments = dict.fromkeys(member.record.experiment for member in foreign.members.values())
        files = {
            name: [(trial, foreign.files(member, trial)) for trial in member.record.trials]
            for name, member in foreign.members.items()
        }
        with contextlib.closing(storage.Database(store.storage_url)) as here:
            for name in foreign.members:
                opened.callback(acquire(here.url, name).release)
            _check_experiments(foreign, store)
            news = {name: _compare(member, here) for name, member in foreign.members.items()}
            folders = {
                name: {trial.number: store.trial_folder(name, trial.number, trial.config.seed) for trial, _ in found}
                for name, found in files.items()
            }
            for name, found in files.items():
                for trial, paths in found if news[name].files else ():
                    if trial.number not in news[name].removed:
                        _copy(paths, folders[name][trial.number])
            for name, new in news.items():
                if new.rows:
                    copy(foreign.database, here, name, new.removed)
                mark_removed(here, name, new.removed)
            for name, new in news.items():
                for number in new.removed & folders[name].keys():
                    remove_folder(folders[name][number])
        return [
            Adopted(
                experiment,
                sum(news[name].trials for name, member in foreign.members.items() if member.experiment == experiment),
            )
            for experiment in experiments
        ]


class _News(NamedTuple):
    """What of a study is to be written here."""

    trials: int
    """New ones, and those that went on."""
    rows: bool
    files: bool
    removed: set[int]
    """Numbers of the trials that were given up, here or there."""


def _check_experiments(foreign: Foreign, store: Store) -> None:
    """Refuse a study file's study that both sides have parts of which the other has not; raises StudyError."""
    known = {study: {part.name for part in parts} for study, parts in studies_of(read_studies(store)).items()}
    for experiment in {member.experiment for member in foreign.members.values()} & set(known):
        theirs = {name for name, member in foreign.members.items() if member.experiment == experiment}
        if not (theirs <= known[experiment] or known[experiment] <= theirs):
            own = ", ".join(map(shown, sorted(known[experiment] - theirs)[:3]))
            raise StudyError(
                f"study {experiment}: a different one here has this name, or it continued here, too ({own}); {_REMEDY}"
            )


_REMEDY = "use --store NEW to import it into a new store"


def _compare(member: Member, here: storage.Database) -> _News:
    """Return what a study has that it does not have here; raises StudyError if it is another one, or both continued."""
    name, later = member.record.name, member.study.get_trials(deepcopy=False)
    removed = {trial.number for trial in member.record.trials if trial.removed}
    if name not in here.names():
        return _News(len(later), rows=True, files=True, removed=removed)
    known = storage.retry_while_unavailable(optuna.load_study)(study_name=name, storage=here.backend)
    if not known.user_attrs and not known.get_trials(deepcopy=False):  # its making was killed
        return _News(len(later), rows=True, files=True, removed=removed)
    if read_about(name, known.user_attrs).uid != member.record.about.uid:
        raise StudyError(f"study {shown(name)}: a different study here has this name; {_REMEDY}")
    removed |= set(known.user_attrs.get(REMOVED, ()))
    newer, older = continues(member.study, known), continues(known, member.study)
    if not newer and not older:
        raise StudyError(f"study {shown(name)}: it continued here and there since it was imported; {_REMEDY}")
    if not newer:
        return _News(0, rows=False, files=False, removed=removed)
    earlier = [facts(trial) for trial in known.get_trials(deepcopy=False)]
    changed = sum(facts(trial) not in earlier[trial.number : trial.number + 1] for trial in later)
    drivers, here_too = (study.user_attrs.get(EPOCH, 0) for study in (member.study, known))
    return _News(changed, not older or drivers > here_too, not older or drivers >= here_too, removed)


def _copy(paths: dict[str, Path], folder: Path) -> None:
    """Bring a trial's folder to what it is elsewhere; other files stay. Raises StoreError."""
    try:
        for name, path in paths.items():
            data = path.read_bytes()
            if not (folder / name).exists() or (folder / name).read_bytes() != data:
                folder.mkdir(parents=True, exist_ok=True)
                write_atomic(folder / name, data)
        if paths and STATE not in paths:
            (folder / STATE).unlink(missing_ok=True)
    except OSError as error:
        raise StoreError(f"{error.filename or folder}: {error.strerror or error}; the same call goes on") from None
