"""Use a trained model: find it by the name a user knows, and show it a picture."""

from __future__ import annotations

import os
import struct
from pathlib import Path

from erpe.config import DATASETS
from erpe.errors import DataError, StoreError, StudyError, nearest
from erpe.io import open_plain
from erpe.store import Store

FORMATS = ("PNG", "JPEG", "GIF", "BMP", "PPM", "TIFF", "WEBP")
"""Of pictures; Pillow would give a PostScript file to another program, which runs it."""

MOST_PIXELS = 50_000_000


def find_folder(run: str, store: Store) -> Path:
    """The folder of a finished trial.

    Args:
        run: a study (its best trial), STUDY/NUMBER, a trial's folder, or the id of an MLflow run.
    Raises:
        StudyError: nothing of that name, or the trial is not finished.
    """
    from erpe.study.records import read_studies

    if os.path.exists(Path(run) / "model.safetensors"):  # Path.exists raises for a name that is too long
        return Path(run)
    study, _, number = run.partition("/")
    known = {found.name: found for found in read_studies(store)}
    if study in known:
        trials = [trial for trial in known[study].trials if str(trial.number) == number]
        trial = trials[0] if trials else known[study].best if not number else None
        if trial is None or trial.state != "COMPLETE":
            raise StudyError(f"{run}: no finished trial; `erpe status {study}` lists them")
        if trial.removed:
            raise StudyError(f"{run}: `erpe gc` removed its model; `erpe status {study}` lists those that stayed")
        return store.trial_folder(study, trial.number, trial.config.seed)
    if len(run) == 32 and run.isalnum():
        return download(run, store)
    raise StudyError(
        f"{run}: no study, trial folder or MLflow run; {nearest(run, known) if known else 'the store is empty'}"
    )


def download(run: str, store: Store) -> Path:
    """The checkpoint of an MLflow run, in a temporary folder.

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
        raise StudyError(f"run {run}: not in MLflow ({str(error).partition(chr(10))[0]})") from None
    return fetch_checkpoint(client, store.tracking_uri, found)


def predict(folder: Path, picture: str | os.PathLike[str]) -> dict[str, float]:
    """The probability of each class, highest first.

    The picture is made grey or coloured and scaled as the training images were. Digits are white on black: a
    picture with bright corners is inverted for them.

    Raises:
        StoreError: the model is missing or damaged.
        DataError: the picture cannot be read.
    """
    import torch
    from PIL import Image, ImageOps

    from erpe.training.checkpoint import load_model
    from erpe.training.data import normalise

    if not folder.is_dir():
        raise StoreError(f"{folder}: no such folder; was the checkpoint removed?")
    model, config = load_model(folder)
    channels, height, width = config.model.image
    try:
        os.close(open_plain(Path(picture), os.O_RDONLY))
        with Image.open(picture, formats=FORMATS) as opened:
            if opened.width * opened.height > MOST_PIXELS:
                raise ValueError(f"{opened.width} x {opened.height} pixels are too many")
            image = opened.convert("L" if channels == 1 else "RGB").resize((width, height), Image.Resampling.BOX)
    except OSError as error:
        raise DataError(f"{picture}: cannot be read as a picture ({error.strerror or error})") from None
    except (
        ValueError,
        SyntaxError,
        LookupError,
        EOFError,
        struct.error,
        Image.DecompressionBombError,
        Warning,
    ) as error:
        raise DataError(f"{picture}: cannot be read as a picture ({error})") from None
    if channels == 1:
        grey = image.tobytes()
        if grey[0] + grey[width - 1] + grey[-width] + grey[-1] > 2 * 255:
            image = ImageOps.invert(image)
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(height, width, channels)
    with torch.no_grad():
        logits = model(normalise(pixels.permute(2, 0, 1)[None], config.data.dataset))[0]
    shares = zip(DATASETS[config.data.dataset].names, logits.softmax(dim=0).tolist(), strict=True)
    return dict(sorted(shares, key=lambda share: -share[1]))
