"""Use a trained model: find it by the name a user knows, and show it a picture."""

from __future__ import annotations

import os
from pathlib import Path

from erpe.errors import StoreError, StudyError
from erpe.store import Store
from erpe.text import first_line


def find_folder(run: str, store: Store) -> Path:
    """Return the folder of a finished trial.

    Args:
        run: see `erpe.study.lookup.find_trial`; or a trial's folder, or the id of an MLflow run.
    Raises:
        StudyError: nothing of that name, or the trial is not finished.
    """
    from erpe.study.lookup import find_trial, studies_of
    from erpe.study.naming import part_name
    from erpe.study.reading import read_studies
    from erpe.tracking.waiting import is_here

    if os.path.exists(Path(run) / "model.safetensors"):  # Path.exists raises for a name that is too long
        return Path(run)
    records = read_studies(store)
    if len(run) == 32 and run.isalnum() and run not in studies_of(records):
        return download(run, store)
    part, trial = find_trial(records, run)
    lists = f"`erpe status {part_name(part.experiment, part.arm, 'search')}` lists"
    if trial is None:
        raise StudyError(f"{run}: no finished trial; {lists} them")
    if trial.removed:
        raise StudyError(f"{run}: `erpe gc` removed its model; {lists} those that stayed")
    if not is_here(store, part.name):
        raise StudyError(f"{run}: none of its trials is in this store; use --store with the one that has them")
    return store.trial_folder(part.name, trial.number, trial.config.seed)


def download(run: str, store: Store) -> Path:
    """Return the checkpoint of an MLflow run, in a temporary folder.

    Raises:
        StudyError: MLflow has no such run, or it has no checkpoint.
    """
    from mlflow.exceptions import MlflowException

    from erpe.report.sources.mlflow import fetch_checkpoint
    from erpe.tracking.connection import connect

    client = connect(store.tracking_uri)
    try:
        found = client.get_run(run)
    except (MlflowException, OSError) as error:
        raise StudyError(f"run {run}: not in MLflow ({first_line(error)})") from None
    return fetch_checkpoint(client, store.tracking_uri, found)


def predict(folder: Path, picture: str | os.PathLike[str], raw: bool = False) -> dict[str, float]:
    """Return the probability of each class, highest first.

    Args:
        picture: see `erpe.pictures.read_picture`.
        raw: leave position, contrast and polarity of a digit alone.
    Raises:
        StoreError: the model is missing or damaged.
        DataError: the picture cannot be read, or shows nothing.
    """
    from erpe.pictures import read_picture
    from erpe.training.checkpoint import load_model

    if not folder.is_dir():
        raise StoreError(f"{folder}: no such folder; was the checkpoint removed?")
    model, config = load_model(folder)
    found = model.predict(read_picture(picture, config.data.dataset, raw)[None])[0]
    shares = zip(config.data.facts.names, found.tolist(), strict=True)
    return dict(sorted(shares, key=lambda share: -share[1]))
