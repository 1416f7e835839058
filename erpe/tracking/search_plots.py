"""A search in pictures, for the MLflow UI: its history, what mattered, which settings went with which value, its front.

Optuna's own come with all of plotly in each (5 MB), or draw by pyplot, whose style and figures are of the process.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import optuna
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
from optuna.distributions import CategoricalDistribution
from optuna.trial import FrozenTrial

from erpe.store import Store
from erpe.study import storage
from erpe.study.objectives import MEASURES
from erpe.study.records import STUDY

MARK = "tab:blue"


def draw_search(study: optuna.Study) -> dict[str, Figure]:
    """Name -> figure; those that compare trials only where there are two or more, none where there is none."""
    complete = study.get_trials(deepcopy=False, states=[optuna.trial.TrialState.COMPLETE])
    compares: dict[str, Callable[[], Figure]] = {
        "importances": lambda: importances(study),
        "parallel_coordinates": lambda: parallel_coordinates(complete),
    }
    found = {"history": history(complete)} if complete else {}
    if len(complete) > 1 and any(trial.params for trial in complete):
        found |= {name: picture() for name, picture in compares.items()}
    return found | ({"front": front(study, complete)} if complete and len(study.directions) > 1 else {})


def draw_stored(store: Store, name: str) -> dict[str, Figure]:
    """Name -> figure of a study in a store's database; see `draw_search`."""
    with contextlib.closing(storage.Database(store.storage_url)) as database:
        return draw_search(optuna.load_study(study_name=name, storage=database.backend))


def _value(trial: FrozenTrial) -> float:
    """The objective, or the first of several."""
    return trial.values[0] if trial.values else 0.0


def front(study: optuna.Study, complete: list[FrozenTrial]) -> Figure:
    """Draw the first objective of each complete trial against the second, and those that no other one dominates."""
    figure, axes = _figure(6, 3.5)
    (quality, cost), large = _labels(study), max(trial.values[1] for trial in complete) >= 1000
    best = sorted(trial.values[1::-1] for trial in study.best_trials)
    axes.plot(*zip(*(trial.values[1::-1] for trial in complete), strict=True), "o", color=MARK, label="trial")
    if best:
        axes.plot(*zip(*best, strict=True), "o", drawstyle="steps-post", linestyle="-", color="tab:red", label="front")
    axes.set(xlabel=cost, ylabel=quality, title="Pareto front")
    if large:
        axes.xaxis.set_major_formatter(EngFormatter(sep="\N{THIN SPACE}"))
    axes.legend()
    return figure


def _labels(study: optuna.Study) -> tuple[str, str]:
    """Return what the first two objectives are, with their units, where erpe made the study."""
    spec = study.user_attrs.get(STUDY, {}).get("spec", {})
    names = [MEASURES[name].label for name in str(spec.get("objective", "")).split(",") if name in MEASURES]
    return (names[0], names[1]) if len(names) > 1 else ("first objective", "second objective")


def history(trials: list[FrozenTrial]) -> Figure:
    """Draw the value of each complete trial, and the best so far."""
    numbers, values = [trial.number for trial in trials], [_value(trial) for trial in trials]
    figure, axes = _figure(6, 3.5)
    axes.plot(numbers, values, "o", color=MARK, label="trial")
    axes.step(numbers, np.maximum.accumulate(values), where="post", color="tab:red", label="best so far")
    axes.set(xlabel="trial", ylabel="objective value", title="history")
    axes.legend()
    return figure


def importances(study: optuna.Study) -> Figure:
    """How much of the variance of the values each setting explains (fANOVA); few trials make them equal."""
    warnings.filterwarnings("ignore", "Target and region quantiles|Some regimes for", UserWarning)  # few trials
    first: Any = {"target": _value, "evaluator": optuna.importance.FanovaImportanceEvaluator(seed=0)}
    try:
        found = optuna.importance.get_param_importances(study, **(first if len(study.directions) > 1 else {}))
    except RuntimeError:  # of fANOVA, where no setting tells trials apart: their values or their settings are alike
        found = dict.fromkeys(sorted({name for trial in study.trials for name in trial.params}), 0.0)
    figure, axes = _figure(6, 1.5 + 0.3 * len(found))
    axes.barh(list(found)[::-1], list(found.values())[::-1], color=MARK)
    axes.set(xlabel="importance", title="importances")
    return figure


def parallel_coordinates(trials: list[FrozenTrial]) -> Figure:
    """Draw a line a trial through its settings, each scaled to its range; the colour is the value."""
    names = sorted({name for trial in trials for name in trial.params})
    values = [_value(trial) for trial in trials]
    low, high = min(values), max(values)
    figure, axes = _figure(1.5 + 1.2 * len(names), 4.5)
    colours = axes.scatter([], [], c=[], vmin=low, vmax=high if high > low else low + 1e-9, cmap="viridis")
    for trial, value in zip(trials, values, strict=True):
        heights = [_height(trial, name) for name in names]
        axes.plot(names, heights, color=colours.to_rgba(np.array(value)), linewidth=1)  # a gap where it is not set
    axes.set(ylim=(-0.03, 1.03), yticks=(0, 1), yticklabels=("low", "high"), title="parallel coordinates")
    axes.tick_params(axis="x", labelrotation=45, labelsize=8)
    figure.colorbar(colours, ax=axes, label="objective value")
    return figure


def _height(trial: FrozenTrial, name: str) -> float:
    """Where a setting lies in its range, in [0, 1], on the scale it is sampled on."""
    if name not in trial.params:
        return float("nan")
    where: Any = trial.distributions[name]
    if isinstance(where, CategoricalDistribution):
        return where.choices.index(trial.params[name]) / max(1, len(where.choices) - 1)
    low, here, high = (np.log(x) if where.log else float(x) for x in (where.low, trial.params[name], where.high))
    return float((here - low) / (high - low)) if high > low else 0.5


def _figure(width: float, height: float) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()
