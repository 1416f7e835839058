"""Where things lie: the store folder, and the addresses of the databases. No torch, ray or mlflow in here."""

from __future__ import annotations

import json
import os
import re
import shlex
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from erpe.credentials import read_secret_files
from erpe.errors import StoreError
from erpe.io import MIB, parse_json, read_json, read_plain, write_atomic
from erpe.plugins import plugin_flags
from erpe.text import redact

DEFAULT = Path("runs")
"""The folder of results where none is named."""

LAYOUT = 1
"""Version of the folder's layout; a store of another version is refused."""

FILES = {
    "model.safetensors": 4096 * MIB, "training.safetensors": 16384 * MIB, "config.json": MIB, "outcome.json": 16 * MIB,
    "test.json": MIB, "per_class.json": MIB, "confusion.json": MIB, "confusion_test.json": MIB,
    "predictions.npz": 64 * MIB, "attention.npz": 64 * MIB, "plugins.txt": MIB, "log.txt": 32 * MIB,
    "history.jsonl": 64 * MIB,
}  # fmt: skip
"""What may lie in a trial's folder -> bytes it may have. Nothing else is taken from elsewhere."""

OUTCOME = "outcome.json"
"""Measures of a finished trial, which make its folder that of one: written last."""

HISTORY = "history.jsonl"
"""When a trial's epochs were, and what was measured: a line each, written by its driver."""

STATE = "training.safetensors"
"""A trial's checkpoint after its last epoch; a finished one has none."""

LOG = "log.txt"
"""In a trial's folder: what it printed, and how it went."""

DEVICES = "devices.json"
"""In a store: what `erpe bench device` chose on each device, by its name."""

OWNER = "owner"
"""In the folder of an unfinished trial: which process trains it. A later process takes it over."""

PROGRESS = "progress"
"""In the folder of an unfinished trial: how far its running epoch is, for who shows it."""


@dataclass(frozen=True)
class Store:
    """A folder with `optuna.db`, `mlflow.db`, `artifacts/`, `tracking/`, `checkpoints/` and `backups/`.

    `ERPE_STORAGE_URL` and `MLFLOW_TRACKING_URI` put the two databases elsewhere.
    """

    root: Path

    @classmethod
    def open(cls, root: str | Path) -> Store:
        """Make the folder if need be and check that it can be written.

        Raises:
            StoreError: it is not a folder, cannot be written, or has another layout.
            ConfigError: the environment names a file with a password that is not there.
        """
        read_secret_files()
        try:
            store = cls(Path(root).expanduser().resolve())
        except RuntimeError as error:  # ~nobody, or a link to itself
            raise StoreError(f"store {root}: no such place ({error}); --store names another") from None
        if not utf8(str(store.root)):
            raise StoreError(
                f"store {store.root}: its path is not UTF-8, as addresses of databases are; use another --store"
            )
        version = store.root / "erpe.json"
        try:
            for folder in (store.artifacts, store.tracking, store.checkpoints):
                folder.mkdir(parents=True, exist_ok=True)
            if not os.path.lexists(version):
                write_atomic(version, json.dumps({"layout": LAYOUT}))
            with tempfile.TemporaryFile(dir=store.root):
                pass
            found = parse_json(read_plain(version))
        except OSError as error:
            raise StoreError(
                f"store {store.root}: cannot be written ({error.strerror}); --store names another"
            ) from None
        except ValueError:
            wanted = json.dumps({"layout": LAYOUT})
            raise StoreError(f"store {store.root}: erpe.json is damaged; it should hold {wanted}") from None
        if not isinstance(found, dict) or found.get("layout") != LAYOUT:
            raise StoreError(
                f"store {store.root}: layout {found!r}, this erpe reads layout {LAYOUT}; --store names another"
            )
        return store

    @classmethod
    def existing(cls, root: str | Path) -> Store:
        """Open the store, which must be there already: looking at one does not make it.

        Raises:
            StoreError: there is none, or see `open`.
        """
        if not os.path.exists(Path(root) / "erpe.json"):  # Path.exists raises for a name that is too long
            raise StoreError(f"store {root}: nothing there; `erpe tune` makes one, --store names another")
        return cls.open(root)

    @property
    def devices(self) -> dict[str, Any]:
        """What was measured to be the fastest on each device, by its name; nothing before `erpe bench device`."""
        path = self.root / DEVICES
        return read_json(path) if path.exists() else {}

    def keep_device(self, name: str, chosen: dict[str, Any]) -> None:
        """Keep what was chosen on a device, in the place of what was known of it."""
        write_atomic(self.root / DEVICES, json.dumps(self.devices | {name: chosen}, indent=1))

    @property
    def artifacts(self) -> Path:
        """What MLflow's embedded server keeps."""
        return self.root / "artifacts"

    @property
    def tracking(self) -> Path:
        """How far each MLflow has each study: one small file for each of both."""
        return self.root / "tracking"

    @property
    def checkpoints(self) -> Path:
        """One folder a trial, `checkpoints/STUDY/NUMBER-SEED`."""
        return self.root / "checkpoints"

    @property
    def datasets(self) -> Path:
        """Descriptions of own data, and their images packed."""
        return self.root / "datasets"

    @property
    def storage_url(self) -> str:
        """SQLAlchemy URL of the Optuna database."""
        return os.environ.get("ERPE_STORAGE_URL") or sqlite_url(self.root / "optuna.db")

    @property
    def tracking_uri(self) -> str:
        """MLflow tracking URI."""
        return os.environ.get("MLFLOW_TRACKING_URI") or sqlite_url(self.root / "mlflow.db")

    @property
    def destination(self) -> str:
        """The tracking URI without its secrets, or relative to the store: what arrived moves along."""
        path = sqlite_path(self.tracking_uri)
        inside = path is not None and path.is_relative_to(self.root)
        return sqlite_url(path.relative_to(self.root)) if path and inside else redact(self.tracking_uri)

    def trial_folder(self, study: str, number: int, seed: int) -> Path:
        """Checkpoints and results of one trial; the same after every restart."""
        return self.checkpoints / study / f"{number:04d}-{seed}"


def store_flag(folder: Path) -> str:
    """Return what a command needs to find the store, with a blank before it; nothing for the default one."""
    return "" if folder.resolve() == DEFAULT.resolve() else f" --store {shlex.quote(str(folder))}"


def name_store(text: str, folder: Path) -> str:
    """Add --store and --plugin to the commands that a line names in backticks: they mean what the line is about."""

    def whole(found: re.Match[str]) -> str:
        store = "" if "--store" in found[1] else store_flag(folder)
        return f"`{found[1]}{store}{plugin_flags() if found[2] else ''}`"

    return _HINT.sub(whole, text)


_WITH_MODELS = "tune|study|status|predict|compare|report|plot"
_HINT = re.compile(rf"`(erpe (?:({_WITH_MODELS})|sync|gc|restore|ui|diff|logs)\b[^`]*)`")


def utf8(text: str) -> bool:
    """Return whether UTF-8 can spell a text; a file's name may be any bytes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def sqlite_url(path: Path) -> str:
    """Return the address of a SQLite file, for SQLAlchemy and MLflow.

    An unusual path is quoted whole, its slashes too: MLflow makes the folder that the address spells before it
    unquotes it, and without a slash that is the current one, which exists.
    """
    text = str(path)
    plain = re.fullmatch(r"[\w /.,:@+=~()-]*", text)
    return "sqlite:///" + (text if plain else quote(text, safe=""))


def sqlite_path(address: str) -> Path | None:
    """Return the file of a SQLite address; None if it is the address of something else."""
    if not address.startswith("sqlite:///"):
        return None
    return Path(unquote(address.removeprefix("sqlite:///").partition("?")[0]))


def tidy(folder: Path) -> None:
    """Remove the temporary files of writes that were killed; no other process may be writing to this trial's folder.

    Raises:
        OSError: the folder is gone or cannot be changed.
    """
    for name in (OWNER, *FILES):
        for left in folder.glob(f".{name}.*"):
            left.unlink(missing_ok=True)


def let_go(folder: Path) -> None:
    """Remove what only an unfinished trial needs: its last epoch's checkpoint, two notes, cut-off writes.

    Raises:
        OSError: the folder is gone or cannot be changed.
    """
    for name in (STATE, OWNER, PROGRESS):
        (folder / name).unlink(missing_ok=True)
    tidy(folder)
