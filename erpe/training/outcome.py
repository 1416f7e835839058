"""Read the result of a trial that was finished."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from erpe.config import TrialConfig
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


def is_history(found: Any, config: TrialConfig) -> bool:
    """Whether it is what a trial of this configuration writes of its epochs: an entry each, counted from 1."""
    needed = {"epoch", "train/loss"} | ({"val/accuracy"} if config.data.validation else set())
    return (
        isinstance(found, list)
        and len(found) <= config.train.epochs
        and all(is_measures(e) and needed <= e.keys() and e["epoch"] == n for n, e in enumerate(found, 1))
    )


def is_measures(found: Any) -> bool:
    """Whether it is names and numbers."""
    return isinstance(found, dict) and all(isinstance(value, int | float) for value in found.values())
