"""`erpe sync`: the outbox from the database and the checkpoints, MLflow from the outbox; a line for each study."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from erpe.errors import ErpeError
from erpe.store import Store, sqlite_path
from erpe.study.backup import damage_of
from erpe.tracking.backfill import Rebuilt, reconcile
from erpe.tracking.publisher import Repaired
from erpe.tracking.tracker import sync


def repair(store: Store, study: str | None, say: Callable[[str], object], warn: Callable[[str], object]) -> int:
    """Bring MLflow to what the store knows.

    Args:
        study: its name; default: all.
        say: called with a line on each study.
        warn: called with a line on damage that was repaired.
    Returns:
        How many events MLflow has not got yet.
    Raises:
        ErpeError: the database, an outbox or MLflow cannot be used; what could be sent was sent.
    """
    rebuilt: dict[str, Rebuilt] = {}
    broken: ErpeError | None = None
    try:
        rebuilt = {found.study: found for found in reconcile(store, study)}
    except ErpeError as error:
        broken = error  # what is in the outboxes can be sent all the same
    for found in rebuilt.values():
        if found.damage:
            warn(found.damage)
        broken = broken or found.broken

    def tell(name: str, left: int, repaired: Repaired) -> None:
        say(f"{name}: {'; '.join([*_done(rebuilt.get(name, Rebuilt(name)), repaired), _rest(left)])}")

    if aside := set_aside(store):
        warn(f"MLflow's database was damaged and is now {aside}; a new one is filled")
    left = sync(store, study, tell=tell)
    if broken:
        raise broken
    return sum(left.values())


def set_aside(store: Store) -> Path | None:
    """Move a damaged database of MLflow out of the way, if it lies in the store; it can be filled again.

    Returns:
        Where it is now.
    """
    path = sqlite_path(store.tracking_uri)
    if path is None or not path.is_relative_to(store.root) or not path.exists() or not damage_of(path):
        return None
    number = 1
    while (aside := path.with_name(f"{path.name}.damaged-{number}")).exists():
        number += 1
    for end in ("-wal", "-shm", ""):
        if (file := path.with_name(path.name + end)).exists():
            os.replace(file, aside.with_name(aside.name + end))
    return aside


def _done(rebuilt: Rebuilt, repaired: Repaired) -> list[str]:
    """Return what was repaired."""
    lines = []
    if rebuilt.events:
        lines.append(
            f"{_count(rebuilt.events, 'event was', 'events were')} told again from the database and checkpoints"
        )
    if rebuilt.running:
        lines.append("an erpe is running it and tells the rest itself")
    if repaired.missing:
        lines.append(f"{_count(repaired.missing, 'run was', 'runs were')} missing in MLflow, sent again")
    if repaired.short:
        lines.append(f"{_count(repaired.short, 'run was', 'runs were')} incomplete in MLflow, sent again")
    return lines


def _rest(left: int) -> str:
    return "everything arrived" if not left else f"{_count(left, 'event waits', 'events wait')}"


def _count(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"
