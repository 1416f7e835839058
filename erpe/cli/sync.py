"""`erpe sync`: MLflow from the database and the trials' folders; a line for each study."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from erpe.errors import StoreError
from erpe.store import Store, sqlite_path
from erpe.study.backup import damage_of, move_aside
from erpe.text import changes_wait, counted
from erpe.tracking.publisher import Repaired
from erpe.tracking.tracker import sync
from erpe.transfer.importer import adopt


def is_foreign(source: str, store: Path) -> bool:
    """Whether it is a folder, and not one that happens to be named as a study."""
    return os.path.isdir(source) and (Path(source, "erpe.json").exists() or not is_study(source, store))


def is_study(name: str, store: Path) -> bool:
    """Whether the store has trials of a study of this name."""
    return any(f"{path.name}.".startswith(f"{name}.") for path in (store / "checkpoints").glob("*"))


def take_over(folder: Path, store: Path) -> tuple[Store, list[str | None]]:
    """Bring what a store has into ours; ours and the studies that came.

    Raises:
        StoreError: there is no store in the folder, or see `erpe.transfer.importer.adopt`.
    """
    if not (folder / "erpe.json").exists():
        raise StoreError(f"{folder}: a folder, but not a store; use one that `erpe study run --store` filled instead")
    opened = Store.open(store)
    found = adopt(folder, opened)
    for study, trials in found:
        print(f"{study}: {counted(trials, 'trial')} taken over" if trials else f"{study}: no news")
    return opened, [each.study for each in found]


def repair(store: Store, study: str | None, say: Callable[[str], object], warn: Callable[[str], object]) -> int:
    """Bring MLflow to what the store has.

    Args:
        study: its name; default: all.
        say: called with a line on each study.
        warn: called with a line on damage that was repaired.
    Returns:
        How many changes MLflow does not show yet.
    Raises:
        ErpeError: the database or MLflow cannot be used.
    """

    def tell(name: str, left: int, repaired: Repaired) -> None:
        say(f"{name}: {'; '.join([*_done(repaired), changes_wait(left) if left else 'everything arrived'])}")

    def mend() -> Path | None:
        if aside := set_aside(store):
            warn(f"MLflow's database was damaged and is now {aside}; a new one is filled")
        return aside

    left = sync(store, study, tell=tell, mend=mend)
    if not left:
        say("nothing to send: no study has trials in this store")
    return sum(left.values())


def set_aside(store: Store) -> Path | None:
    """Move a damaged database of MLflow out of the way, if it lies in the store; it can be filled again.

    Returns:
        Where it is now.
    """
    path = sqlite_path(store.tracking_uri)
    if path is None or not path.is_relative_to(store.root) or not path.exists() or not damage_of(path):
        return None
    return move_aside(path, "damaged")


def _done(repaired: Repaired) -> list[str]:
    """Return what was repaired."""
    found = {"missing": repaired.missing, "incomplete": repaired.short}
    runs = {how: f"{counted(n, 'run')} {'was' if n == 1 else 'were'}" for how, n in found.items() if n}
    return [f"{who} {how} in MLflow, sent again" for how, who in runs.items()]
