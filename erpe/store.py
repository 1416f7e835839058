"""Where things lie: the store folder, and the addresses of the databases. No torch, ray or mlflow in here."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from erpe.errors import StoreError

LAYOUT = 1
"""Version of the folder's layout; a store of another version is refused."""


@dataclass(frozen=True)
class Store:
    """A folder with `optuna.db`, `mlflow.db`, `artifacts/`, `spool/` and `checkpoints/`.

    `ERPE_STORAGE_URL` and `MLFLOW_TRACKING_URI` put the two databases elsewhere.
    """

    root: Path

    @classmethod
    def open(cls, root: str | Path) -> Store:
        """Make the folder if need be and check that it can be written.

        Raises:
            StoreError: it is not a folder, cannot be written, or has another layout.
        """
        try:
            store = cls(Path(root).expanduser().resolve())
        except RuntimeError as error:  # ~nobody, or a link to itself
            raise StoreError(f"store {root}: no such place ({error}); --store names another") from None
        version = store.root / "erpe.json"
        try:
            for folder in (store.artifacts, store.spool, store.checkpoints):
                folder.mkdir(parents=True, exist_ok=True)
            if not version.exists():
                write_atomic(version, json.dumps({"layout": LAYOUT}))
            with tempfile.TemporaryFile(dir=store.root):
                pass
            found = json.loads(version.read_text())
        except OSError as error:
            raise StoreError(
                f"store {store.root}: cannot be written ({error.strerror}); --store names another"
            ) from None
        except ValueError:
            raise StoreError(f"store {store.root}: erpe.json is damaged; it should hold {LAYOUT=}") from None
        if not isinstance(found, dict) or found.get("layout") != LAYOUT:
            raise StoreError(
                f"store {store.root}: layout {found!r}, this erpe reads layout {LAYOUT}; --store names another"
            )
        return store

    @classmethod
    def existing(cls, root: str | Path) -> Store:
        """The store, which must be there already: looking at one does not make it.

        Raises:
            StoreError: there is none, or see `open`.
        """
        if not (Path(root) / "erpe.json").exists():
            raise StoreError(f"store {root}: nothing there; `erpe tune` makes one, --store names another")
        return cls.open(root)

    @property
    def artifacts(self) -> Path:
        """What MLflow's embedded server keeps."""
        return self.root / "artifacts"

    @property
    def spool(self) -> Path:
        """Events on their way to MLflow."""
        return self.root / "spool"

    @property
    def checkpoints(self) -> Path:
        """One folder a trial, `checkpoints/STUDY/NUMBER-SEED`."""
        return self.root / "checkpoints"

    @property
    def storage_url(self) -> str:
        """SQLAlchemy URL of the Optuna database."""
        return os.environ.get("ERPE_STORAGE_URL") or f"sqlite:///{self.root / 'optuna.db'}"

    @property
    def tracking_uri(self) -> str:
        """MLflow tracking URI."""
        return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{self.root / 'mlflow.db'}"

    def trial_folder(self, study: str, number: int, seed: int) -> Path:
        """Checkpoints and results of one trial; the same after every restart."""
        return self.checkpoints / study / f"{number:04d}-{seed}"


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write a file whole or not at all: temporary file, fsync, rename.

    Raises:
        OSError: the disk is full or the folder is gone; the old file is intact.
    """
    data = content.encode() if isinstance(content, str) else content
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            os.fchmod(handle, 0o644)  # a temporary file is its owner's alone
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def read_json(path: Path) -> Any:
    """A JSON file of the store.

    Raises:
        StoreError: it is missing or damaged.
    """
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise StoreError(f"{path}: cannot be read ({error}); the file is missing or damaged") from None


def is_own(folder: Path) -> bool:
    """Whether there is a folder to remove.

    Raises:
        StoreError: it is a link or lies behind one: what nobody follows, nobody removes.
    """
    if folder.resolve() != folder:
        raise StoreError(f"{folder}: a link, or behind one, which is not followed; put the folder itself there")
    return folder.exists()


def remove_folder(folder: Path) -> None:
    """Remove a folder with all that is in it; one that is gone, or half gone, is no mistake.

    Raises:
        StoreError: it is a link, or cannot be removed.
    """
    try:
        if is_own(folder):
            shutil.rmtree(folder)
    except OSError as error:
        place = error.filename or folder
        raise StoreError(f"{place}: cannot be removed ({error.strerror}); the same command goes on") from None


def size_mib(path: Path) -> float:
    """What a file or folder takes, in MiB."""
    return sum(each.lstat().st_size for each in [path, *path.rglob("*")] if each.is_file()) / 2**20
