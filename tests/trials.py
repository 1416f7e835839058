"""Trials small enough to train in a test, on real digits."""

from erpe.config import TrialConfig, defaults

TINY = {
    "model.patch": 2,
    "model.width": 16,
    "model.depth": 2,
    "model.heads": 2,
    "model.mlp_ratio": 2,
    "data.validation": 0.15,
    "data.train_limit": 300,
    "data.augment": "none",
    "train.epochs": 3,
    "train.batch": 64,
    "train.lr": 2e-3,
}


def tiny(variant="relu_general", settings=None, seed=0) -> TrialConfig:
    """Five steps an epoch, less than a tenth of a second."""
    return defaults(variant, "digits", seed).replace(TINY | (settings or {}))


def curve(history) -> list[dict[str, float]]:
    """A history without what the clock says."""
    return [{name: value for name, value in epoch.items() if not name.startswith("time/")} for epoch in history]
