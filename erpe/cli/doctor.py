"""`erpe doctor`: what is there, what is wrong, how to fix it."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, NamedTuple

from erpe.credentials import read_secret_files
from erpe.datasets import DATASETS
from erpe.errors import ErpeError, TrackingError
from erpe.store import Store
from erpe.surroundings import cores, require_loopback
from erpe.text import changes_wait, counted, redact

PACKAGES = ("torch", "torchvision", "ray", "optuna", "mlflow", "scikit-learn", "sqlalchemy")
EXTRAS = {"ray": "trials in processes of their own", "mlflow": "runs to look at and compare"}
"""Packages that one can do without, and what they are for."""

NEEDED_MIB = 500
"""Free space a study of small models wants."""


class Finding(NamedTuple):
    """One thing that was looked at."""

    what: str
    state: Literal["well", "note", "wrong"]
    text: str


def examine(data_dir: Path | None, store: Path) -> list[Finding]:
    """Look at everything a search needs; no finding stops the others."""
    return [*packages(), *devices(), *data(data_dir), *storage(store), *services(store)]


def packages() -> Iterator[Finding]:
    """Python and the packages of the project."""
    yield Finding("python", "well" if sys.version_info >= (3, 11) else "wrong", sys.version.split()[0])
    for name in PACKAGES:
        try:
            yield Finding(name, "well", version(name))
        except PackageNotFoundError:
            if name in EXTRAS:
                yield Finding(name, "note", f"not installed; pip install 'erpe[{name}]' for {EXTRAS[name]}")
            else:
                yield Finding(name, "wrong", "not installed; infra/run installs what is missing")


def devices() -> Iterator[Finding]:
    """Processors, what torch can use, and the network within this machine."""
    import torch

    from erpe.model.kernels import gpu
    from erpe.model.kernels.cpu import LIBRARY
    from erpe.training.devices import pick_device
    from erpe.training.precision import explain_auto
    from erpe.training.vision import torchvision

    yield Finding("cpu", "well", f"{counted(cores(), 'core')}, torch uses {counted(torch.get_num_threads(), 'thread')}")
    if LIBRARY:
        yield Finding("kernels", "well", "compiled: linear attention of CPUs in C")
    else:
        text = "not compiled, CPUs take torch's operators, slower; " + (
            "install a C compiler, then erpe again"
            if sys.platform == "linux"
            else "compilers of macOS and Windows lack -fopenmp or vector extensions"
        )
        yield Finding("kernels", "note", text)
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            facts = torch.cuda.get_device_properties(number)
            yield Finding(f"cuda:{number}", "well", f"{facts.name}, {facts.total_memory / 2**30:.0f} GiB")
        taken = "Triton's serve linear attention with model.method auto"
        text = taken if gpu.AVAILABLE else "Triton is not installed: torch's operators, slower"
        yield Finding("gpu kernels", "well" if gpu.AVAILABLE else "note", text)
    elif torch.backends.mps.is_available():
        yield Finding("mps", "well", "Apple GPU")
    else:
        yield Finding("gpu", "note", "none; trials run on the CPU")
    yield Finding("precision", "well", f"auto is {explain_auto(pick_device())}")
    patched = hasattr(torchvision(), "erpe_operators")
    text = "compiled part does not fit this torch; data sets and transforms work" if patched else "complete"
    yield _asked("loopback", _loopback)
    yield Finding("torchvision", "note" if patched else "well", text)


def data(data_dir: Path | None) -> Iterator[Finding]:
    """Files of the data sets, checked by MD5; nothing is downloaded."""
    from erpe.training import download

    try:
        root = download.find_data_dir(data_dir)
    except ErpeError as error:
        yield Finding("data", "wrong", str(error))
        return
    for dataset in DATASETS:
        missing = download.missing_files(dataset, root)
        if missing:
            text = f"{counted(len(missing), 'file')} not in {root}; downloaded when needed, or see --data-dir"
            yield Finding(dataset, "note", text)
            continue
        try:
            download.prepare(dataset, root)
            yield Finding(dataset, "well", "scikit-learn's" if dataset == "digits" else f"verified in {root}")
        except ErpeError as error:
            yield Finding(dataset, "wrong", str(error))


def storage(folder: Path) -> Iterator[Finding]:
    """Yield findings on the store, and on what waits in it."""
    from erpe.tracking.waiting import lags

    if not (folder / "erpe.json").exists():
        above = next(parent for parent in [folder, *folder.resolve().parents] if parent.exists())
        if above.is_dir() and os.access(above, os.W_OK):
            yield Finding("store", "note", f"none at {folder}; `erpe tune` makes it")
        else:
            yield Finding("store", "wrong", f"none at {folder}, and {above} does not let us make it")
        return
    try:
        store = Store.open(folder)
        free = shutil.disk_usage(store.root).free / 2**20
        yield Finding("store", "well" if free > NEEDED_MIB else "wrong", f"{store.root}, {free / 1024:.1f} GiB free")
        waiting = sum(lags(store).values())
        text = f"{changes_wait(waiting)}; `erpe sync` sends them" if waiting else "has everything"
        yield Finding("mlflow", "note" if waiting else "well", text)
    except ErpeError as error:
        yield Finding("store", "wrong", str(error))


def services(folder: Path) -> Iterator[Finding]:
    """Both databases, or their servers, the Ray cluster, the place for checkpoints: each asked as a study would."""
    store = Store(folder.expanduser().resolve())
    try:
        read_secret_files()
    except ErpeError as error:
        yield Finding("sign-in", "wrong", str(error))
    if (folder / "erpe.json").exists() or "ERPE_STORAGE_URL" in os.environ:
        yield _asked("studies", lambda: _studies(store))
    if "MLFLOW_TRACKING_URI" in os.environ or ((folder / "erpe.json").exists() and find_spec("mlflow")):
        yield _asked("tracking", lambda: _tracking(store))
    if address := os.environ.get("ERPE_RAY_ADDRESS"):
        cluster = _asked("ray cluster", lambda: _cluster(address))
        yield cluster
        if cluster.state == "well":
            yield from _checkpoints(store, address)
    elif "ERPE_CHECKPOINTS" in os.environ:
        yield from _checkpoints(store, None)
    if head := os.environ.get("ERPE_RAY_JOBS"):
        yield _asked("ray jobs", lambda: _jobs(head))


def _asked(what: str, ask: Callable[[], str]) -> Finding:
    try:
        return Finding(what, "well", ask())
    except ErpeError as error:
        return Finding(what, "wrong", str(error))


def _loopback() -> str:
    require_loopback()
    return "127.0.0.1 works"


def _studies(store: Store) -> str:
    from erpe.study.lookup import studies_of
    from erpe.study.reading import read_studies

    return f"{len(studies_of(read_studies(store)))} in {redact(store.storage_url)}"


def _tracking(store: Store) -> str:
    from erpe.tracking.connection import examine as examine_tracking

    health = examine_tracking(store.tracking_uri)
    if health.state != "well":
        raise TrackingError(health.line)
    return redact(store.tracking_uri)


def _cluster(address: str) -> str:
    from erpe.execution.ray_tune.cluster import joined

    with joined(address) as room:
        return f"{room.nodes} nodes, {room.cpus:g} CPUs, {room.gpus:g} GPUs at {address}"


def _jobs(address: str) -> str:
    from erpe.execution.ray_tune.jobs import Jobs

    jobs = Jobs(address)
    return f"{len(jobs.all())} at {redact(jobs.address)}"


def _checkpoints(store: Store, address: str | None) -> Iterator[Finding]:
    """Yield what each node that runs trials, or this machine alone, says of the place for checkpoints."""
    from erpe.checkpoints import RemoteCheckpoints, find_remote
    from erpe.execution.ray_tune.cluster import joined
    from erpe.execution.ray_tune.storage_check import find_blind

    what = "checkpoints"
    try:
        place = find_remote() or RemoteCheckpoints(str(store.checkpoints))
        if place.url == str(store.checkpoints) and not store.checkpoints.exists():
            yield Finding(what, "note", f"no {place} yet; `erpe tune` makes it, and tries it on every node")
            return
        with joined(address) if address else nullcontext():
            wrong = find_blind(place)
    except ErpeError as error:
        yield Finding(what, "wrong", str(error))
        return
    for node, said in wrong.items():
        yield Finding(what, "wrong", f"node {node}: {said}")
    if not wrong:
        yield Finding(what, "well", f"{place}, written and read {'by every node' if address else 'from here'}")
