"""`erpe doctor`: what is there, what is wrong, what would do."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal, NamedTuple

from erpe.config import DATASETS
from erpe.errors import ErpeError
from erpe.store import Store

PACKAGES = ("torch", "torchvision", "ray", "optuna", "mlflow", "fvcore", "scikit-learn", "sqlalchemy")
NEEDED_MIB = 500
"""Free space a study of small models wants."""


class Finding(NamedTuple):
    """One thing that was looked at."""

    what: str
    state: Literal["well", "note", "wrong"]
    text: str


def examine(data_dir: Path | None, store: Path) -> list[Finding]:
    """Look at everything a search needs; no finding stops the others."""
    return [*packages(), *devices(), *data(data_dir), *storage(store)]


def packages() -> Iterator[Finding]:
    """Python and the packages of the project."""
    yield Finding("python", "well" if sys.version_info >= (3, 11) else "wrong", sys.version.split()[0])
    for name in PACKAGES:
        try:
            yield Finding(name, "well", version(name))
        except PackageNotFoundError:
            yield Finding(name, "wrong", "not installed; infra/run installs what is missing")


def devices() -> Iterator[Finding]:
    """Processors, and what torch can use."""
    import torch

    from erpe.training.vision import torchvision

    yield Finding("cpu", "well", f"{os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads")
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            facts = torch.cuda.get_device_properties(number)
            yield Finding(f"cuda:{number}", "well", f"{facts.name}, {facts.total_memory / 2**30:.0f} GiB")
    elif torch.backends.mps.is_available():
        yield Finding("mps", "well", "Apple GPU")
    else:
        yield Finding("gpu", "note", "none; trials run on the CPU")
    patched = hasattr(torchvision(), "erpe_operators")
    text = "compiled part does not fit this torch; data sets and transforms work" if patched else "complete"
    yield Finding("torchvision", "note" if patched else "well", text)


def data(data_dir: Path | None) -> Iterator[Finding]:
    """Files of the data sets, checked by MD5; nothing is downloaded."""
    from erpe.training import data as sets

    root = sets.find_data_dir(data_dir)
    for dataset in DATASETS:
        missing = sets.missing_files(dataset, root)
        if missing:
            text = (
                f"{len(missing)} files not in {root}; they are downloaded when needed, --data-dir names another folder"
            )
            yield Finding(dataset, "note", text)
            continue
        try:
            sets.prepare(dataset, root)
            yield Finding(dataset, "well", "scikit-learn's" if dataset == "digits" else f"verified in {root}")
        except ErpeError as error:
            yield Finding(dataset, "wrong", str(error))


def storage(folder: Path) -> Iterator[Finding]:
    """The store, its databases, and the tracking server."""
    from erpe.search.records import read_studies
    from erpe.telling import redact
    from erpe.tracking.server import examine as examine_tracking
    from erpe.tracking.tracker import lags

    if not (folder / "erpe.json").exists() and "MLFLOW_TRACKING_URI" not in os.environ:
        above = next(parent for parent in [folder, *folder.resolve().parents] if parent.exists())
        if above.is_dir() and os.access(above, os.W_OK):
            yield Finding("store", "note", f"none at {folder}; `erpe tune` makes it")
        else:
            yield Finding("store", "wrong", f"none at {folder}, and {above} does not let us make it")
        return
    try:
        store = Store.open(folder)
        free = shutil.disk_usage(store.root).free / 2**20
        state: Literal["well", "wrong"] = "well" if free > NEEDED_MIB else "wrong"
        yield Finding("store", state, f"{store.root}, {free / 1024:.1f} GiB free")
        studies = read_studies(store)
        yield Finding("studies", "well", f"{len(studies)} in {redact(store.storage_url)}")
        waiting = sum(lags(store).values())
        text = f"{waiting} events wait; `erpe sync` sends them" if waiting else "empty"
        yield Finding("spool", "note" if waiting else "well", text)
    except ErpeError as error:
        yield Finding("store", "wrong", str(error))
        return
    health = examine_tracking(store.tracking_uri)
    yield Finding("tracking", "well" if health.state == "well" else "wrong", health.line or redact(store.tracking_uri))
