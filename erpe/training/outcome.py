"""Read the result of a trial that was finished."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from erpe.config import TrialConfig, is_history, is_measures
from erpe.errors import StoreError
from erpe.io import parse_json, read_json


def read_outcome(config: TrialConfig, folder: Path) -> dict[str, Any] | None:
    """`outcome.json`, if this very trial was finished before the driver could write it down."""
    try:
        found = read_json(folder / "outcome.json")
        same = TrialConfig(**parse_json(found["config"])) == config
        whole = is_history(found["history"], config) and is_measures(found["metrics"])
        return found if same and whole else None
    except (StoreError, ValueError, KeyError, TypeError):
        return None
