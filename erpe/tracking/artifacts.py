"""Files of a run: what a trial's folder holds, figures of it, Optuna's plots, and the registered champion.

Only plain files with known names are read; a link in a store could point anywhere.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import erpe
from erpe.errors import ErpeError, StoreError
from erpe.io import read_arrays, read_json
from erpe.tracking.connection import files_of

if TYPE_CHECKING:
    import optuna
    from matplotlib.figure import Figure
    from mlflow import MlflowClient

CHECKPOINT = ("model.safetensors", "config.json", "outcome.json")
RESULTS = (
    "report.html", "test.json", "per_class.json", "confusion.json", "confusion_test.json", "predictions.npz",
    "attention.npz",
)  # fmt: skip
FACTS = ("data_sha256", "split_sha256", "device", "threads", "precision")
ALIAS = "champion"
MOST_PANELS = 100
"""Classes or blocks of a figure; a file that asks for more is not ours, and would be drawn for hours."""


def log_checkpoint(client: MlflowClient, run: str, folder: Path) -> None:
    """Send a trial's weights and configuration: safetensors and JSON."""
    files = files_of(client, run)
    for name in filter(lambda name: _is_plain(folder / name), CHECKPOINT):
        files.log_artifact(str(folder / name), "checkpoint")


def log_results(client: MlflowClient, run: str, folder: Path) -> list[str]:
    """Send a trial's results and figures, as far as they are there.

    Returns:
        A line for each file that is damaged.
    """
    files = files_of(client, run)
    for name in filter(lambda name: _is_plain(folder / name), RESULTS):
        files.log_artifact(str(folder / name))
    with tempfile.TemporaryDirectory() as drawn:
        notes = draw(folder, Path(drawn))
        files.log_artifacts(drawn, "figures")
    return notes


def log_text(client: MlflowClient, run: str, text: str, name: str) -> None:
    """Send a text as a file."""
    with tempfile.TemporaryDirectory() as written:
        path = Path(written) / name
        path.write_text(text, encoding="utf-8")
        files_of(client, run).log_artifact(str(path))


def facts(folder: Path) -> dict[str, str]:
    """Return what a worker knows and the driver does not: hashes of data and split, device, threads, precision."""
    try:
        outcome = read_json(folder / "outcome.json")
    except StoreError:
        return {}
    return {key: str(outcome[key])[:500] for key in FACTS if key in outcome} if isinstance(outcome, dict) else {}


def draw(folder: Path, into: Path) -> list[str]:
    """Draw the figures of a trial's folder as PNG files; a line for each one that cannot be drawn."""
    from erpe.tracking import figures

    sources: dict[str, tuple[str, Callable[[Path], Figure]]] = {
        "learning_curves": ("outcome.json", lambda path: figures.learning_curves(read_json(path)["history"])),
        "confusion": ("confusion.json", _confusion),
        "confusion_test": ("confusion_test.json", _confusion),
        "attention": ("attention.npz", _attention),
    }
    notes = []
    for name, (source, picture) in sources.items():
        if not _is_plain(folder / source):
            continue
        try:
            figures.save(picture(folder / source), into / f"{name}.png")
        except (ErpeError, ValueError, LookupError, TypeError, ArithmeticError, AttributeError) as error:
            notes.append(f"{source}: no figure, the file is damaged ({' '.join(str(error).split())[:200]})")
    return notes


def _confusion(path: Path) -> Figure:
    from erpe.tracking import figures

    found = read_json(path)
    if len(found["classes"]) > MOST_PANELS:
        raise StoreError(f"{len(found['classes'])} classes, and at most {MOST_PANELS} are drawn")
    return figures.confusion(found["matrix"], found["classes"], found["split"])


def _attention(path: Path) -> Figure:
    from erpe.tracking import figures

    found = read_arrays(path)
    if found["image"].ndim != 3 or len(found["maps"]) > MOST_PANELS:
        raise StoreError(f"no image, or too many blocks: {found['image'].shape}, {len(found['maps'])}")
    return figures.attention_maps(found["image"], found["maps"], tuple(found["grid"]))


def _is_plain(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()


def log_plots(client: MlflowClient, run: str, storage_url: str, study: str) -> None:
    """Pictures of a search, see `erpe.tracking.search_plots`.

    There are none of what is not in the database, a page for one, nor where the database cannot be read.
    """
    import optuna
    from optuna.exceptions import StorageInternalError
    from sqlalchemy.exc import SQLAlchemyError

    with contextlib.suppress(KeyError, SQLAlchemyError, StorageInternalError):
        storage = optuna.storages.RDBStorage(storage_url)
        try:
            _log_plots(client, run, optuna.load_study(study_name=study, storage=storage))
        finally:
            storage.remove_session()
            storage.engine.dispose()


def _log_plots(client: MlflowClient, run: str, found: optuna.Study) -> None:
    from erpe.tracking import figures
    from erpe.tracking.search_plots import draw_search

    with tempfile.TemporaryDirectory() as drawn:
        for name, figure in draw_search(found).items():
            figures.save(figure, Path(drawn) / f"{name}.png")
        files_of(client, run).log_artifacts(drawn, "optuna")


def register(client: MlflowClient, name: str, run: str, uid: str, folder: Path) -> None:
    """Make a trial's checkpoint the champion of the registered model `name`; the same trial is registered once."""
    from mlflow.exceptions import MlflowException

    if not all(_is_plain(folder / file) for file in CHECKPOINT[:2]):
        return
    versions = client.search_model_versions(f"name='{name}'")
    found = next((known for known in versions if known.tags.get("erpe.trial_uid") == uid), None)
    if found is None:
        with tempfile.TemporaryDirectory() as saved:
            save_model(folder, Path(saved) / "model")  # beside the weights, which are there already
            files_of(client, run).log_artifacts(str(Path(saved) / "model"), "checkpoint")
        try:
            client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        source = f"{client.get_run(run).info.artifact_uri}/checkpoint"
        found = client.create_model_version(name, source, run, {"erpe.trial_uid": uid}, await_creation_for=0)
    client.set_registered_model_alias(name, ALIAS, found.version)


def save_model(folder: Path, path: Path) -> None:
    """Write what makes the folder of a checkpoint an MLflow pyfunc model: a loader module, no pickle, no weights."""
    import mlflow.pyfunc
    import numpy as np
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    model = read_json(folder / "config.json")["model"]
    signature = ModelSignature(
        inputs=Schema([TensorSpec(np.dtype("uint8"), (-1, *model["image"]))]),
        outputs=Schema([TensorSpec(np.dtype("float32"), (-1, model["classes"]))]),
    )
    mlflow.pyfunc.save_model(
        path,
        loader_module="erpe.tracking.pyfunc",
        signature=signature,
        input_example=np.zeros((1, *model["image"]), np.uint8),
        pip_requirements=[f"erpe=={erpe.__version__}"],  # which names its own
    )
