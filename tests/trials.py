"""Trials small enough to train in a test, on real digits."""

import json
from pathlib import Path

from erpe.config import TrialConfig, defaults
from erpe.execution.callbacks import Progress

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


class Notes(Progress):
    """Keep what the user is warned of."""

    def __init__(self):
        self.said = []

    def on_warning(self, text):
        self.said.append(text)


def tiny(variant="relu_general", settings=None, seed=0) -> TrialConfig:
    """Five steps an epoch, less than a tenth of a second."""
    return defaults(variant, "digits", seed).replace(TINY | (settings or {}))


def objective(config, report, folder, **how):
    """Train a whole trial -> its measures; None if `report`, called with each epoch and its measures, asks to stop."""
    from erpe.training.trial import Trial

    trial = Trial(config, folder, **how)
    for past in trial.history:
        report(int(past["epoch"]), past)
    while not trial.done:
        measured = trial.epoch()
        if report(int(measured["epoch"]), measured) and not trial.done:
            return None
    return trial.finish()


def curve(history) -> list[dict[str, float]]:
    """A history without what the clock says."""
    return [{name: value for name, value in epoch.items() if not name.startswith("time/")} for epoch in history]


STUDIES = Path(__file__).parent.parent / "studies"
ARMS = ("softmax", "relu", "relu_rope")


def small_study(root, *changes, arms=ARMS):
    """`studies/digits_nine.toml`, so small that it trains in seconds: two trials and two seeds an arm.

    Returns:
        its store; nothing is sent to MLflow.
    """
    from erpe.search.run_study import run
    from erpe.store import Store
    from erpe.study.plan_file import load_plan

    small = ["search.trials=2", "search.epochs=2", "search.pruner=none", "confirm.seeds=2", "compare.margin=0.4"]
    small += [f"variants={json.dumps(arms)}", 'settings."data.train_limit"=300', 'settings."model.mlp_ratio"=2']
    small += [f'space."model.{name}"={value}' for name, value in (("width", 16), ("depth", 2), ("heads", 2))]
    store = Store.open(root)
    run(load_plan(STUDIES / "digits_nine.toml", [*small, *changes]), store, executor="inline", offline=True)
    return store
