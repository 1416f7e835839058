"""Outcomes as files: what `compare --format csv` and `parquet` write beside their table, and `compare --from` reads.

Of `TABLE.csv` these are `TABLE_arms.csv`, `TABLE_runs.csv` (a row a seed), `TABLE_trials.csv` (a row a trial),
`TABLE_epochs.csv`, `TABLE_images.npz` (which test images each run classified correctly, a bit an image) and
`TABLE_study.json`. All statistics can be computed again from them; figures of attention need the store.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from erpe.datasets import Dataset
from erpe.errors import StoreError
from erpe.io import read_arrays, read_json
from erpe.report.outcomes import COLUMNS, Outcomes
from erpe.report.tables import as_csv
from erpe.text import first_line

WORDS = ("made_with", "margins", "dates", "files")
"""Fields of `Outcomes` that are in the JSON file as they are."""


def exports(outcomes: Outcomes, format: str) -> Iterator[tuple[str, str | bytes]]:
    """Yield the end of a file's name, and its content.

    Args:
        format: csv or parquet.
    """
    for name in COLUMNS:
        given = getattr(outcomes, name)
        table = given.convert_dtypes().assign(**given.select_dtypes("float"))  # 1.0 s stays a number with a point
        yield f"_{name}.{format}", as_csv(table) if format == "csv" else table.to_parquet(index=False)
    yield "_images.npz", _images(outcomes)
    words: dict[str, Any] = {name: getattr(outcomes, name) for name in WORDS}
    words["datasets"] = {name: facts.model_dump(mode="json") for name, facts in outcomes.datasets.items()}
    yield "_study.json", json.dumps(words | {"notes": outcomes.notes}, indent=1, ensure_ascii=False) + "\n"


def _images(outcomes: Outcomes) -> bytes:
    """uid -> (test images,) packed bits: 1 where the run is right; `uid.count` -> how many images there are."""
    found: dict[str, Any] = {}
    for uid, dataset in outcomes.runs[["uid", "dataset"]].itertuples(index=False, name=None):
        labels, predicted = outcomes.labels.get(dataset), outcomes.predictions.get(uid)
        if labels is not None and predicted is not None and len(labels) == len(predicted):
            found |= {uid: np.packbits(predicted == labels), f"{uid}.count": np.array(len(labels))}
    file = io.BytesIO()
    np.savez_compressed(file, **found)
    return file.getvalue()


def read(paths: Sequence[Path]) -> Outcomes:
    """Return the outcomes that stand beside each of these tables.

    A prediction is 1 where the run was right, else 0, and every label is 1: which class it was is not kept.
    Raises:
        StoreError: a file is missing or damaged.
    """
    parts = [_read(path) for path in paths]
    frames = {name: pd.concat([getattr(part, name) for part in parts], ignore_index=True) for name in COLUMNS}
    named: dict[str, Any] = {
        field: {key: value for part in parts for key, value in getattr(part, field).items()}
        for field in ("predictions", "labels", "datasets", *WORDS)
    }
    return Outcomes(**frames, **named, notes=tuple(note for part in parts for note in part.notes))


def _read(path: Path) -> Outcomes:
    if path.suffix not in (".csv", ".parquet"):
        raise StoreError(f"{path}: not a table of `erpe compare --format csv --output FILE.csv`")
    place = path.with_suffix("")
    try:
        frames = {name: _table(Path(f"{place}_{name}{path.suffix}"), columns) for name, columns in COLUMNS.items()}
        words, right = read_json(Path(f"{place}_study.json")), read_arrays(Path(f"{place}_images.npz"))
        counts = {uid: int(right[f"{uid}.count"]) for uid in frames["runs"]["uid"] if uid in right}
        predictions = {uid: np.unpackbits(right[uid], count=count).astype(int) for uid, count in counts.items()}
        sizes = {data: counts[uid] for uid, data in frames["runs"][["uid", "dataset"]].values if uid in counts}
        datasets = {name: Dataset(**facts) for name, facts in words["datasets"].items()}
        kept = {name: dict(words[name]) for name in WORDS}
        notes = tuple(map(str, words["notes"]))
    except FileNotFoundError as error:
        raise StoreError(f"{error.filename}: missing; `erpe compare --format csv --output` writes it") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise StoreError(f"{place}_*: damaged ({first_line(error)})") from None
    labels = {name: np.ones(count, int) for name, count in sizes.items()}
    return Outcomes(**frames, predictions=predictions, labels=labels, datasets=datasets, notes=notes, **kept)


def _table(path: Path, columns: str) -> pd.DataFrame:
    """Return a table with missing values as NaN, and `none` as the word that it is."""
    if path.suffix == ".parquet":
        table = pd.read_parquet(path)
    else:
        table = pd.read_csv(path, keep_default_na=False, na_values=[""], low_memory=False)
    if missing := set(columns.split()) - set(table.columns):
        raise ValueError(f"{path.name} has no column {min(missing)}")
    return table
