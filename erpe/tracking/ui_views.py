"""How MLflow shows a study: one row a run, best first; and its confirmed runs, grouped by arm, to be compared."""

from __future__ import annotations

import json
from typing import Any

MEASURES = (
    "val/accuracy", "val/loss", "test/accuracy", "params", "flops/forward",
    "time/train_seconds_per_epoch", "memory/peak_mib",
)  # fmt: skip
"""Columns of all runs."""
CONFIRMED_MEASURES = (
    "test/accuracy", "test/loss", "aic", "bic", "time/inference_ms_per_image", "time/train_seconds_per_epoch",
    "memory/peak_mib", "params", "flops/forward",
)  # fmt: skip
"""Columns of the confirmed runs, and of each arm's mean."""

_SETTINGS = ("train.lr", "model.width", "model.depth")
_ALL, _CONFIRMED = "erpe", "confirmed"
_KEY = "mlflow.sharedViewState."
_RUN = "attributes.`Run Name`"
_TRIALS = "tags.`erpe.trial_uid` LIKE '%'"
"""Parents have no such tag."""


def _state(names: dict[str, str], widths: dict[str, int] | None = None, **more: Any) -> str:
    """Return a view as MLflow's page writes it; `names` is column -> what its header says."""
    pixels = {column: min(220, max(95, 8 * len(name) + 20)) for column, name in names.items()}
    return json.dumps(
        {
            "searchFilter": "",
            "startTime": "ALL",
            "lifecycleFilter": "Active",
            "datasetsFilter": [],
            "modelVersionFilter": "All Runs",
            "selectedColumns": list(names),
            "columnOrder": [_RUN, *names],
            "columnWidths": pixels | (widths or {}),
            "viewMaximized": True,
        }
        | more
    )


def _columns(measures: tuple[str, ...], settings: tuple[str, ...] = ()) -> dict[str, str]:
    return {
        "tags.`state`": "state",
        **{f"metrics.`{name}`": name for name in measures},
        **{f"params.`{name}`": name for name in settings},
    }


EXPERIMENT_TAGS = {
    "mlflow.experimentKind": "custom_model_development",
    # a parent has the measures of its best trial, which would be there twice
    _KEY + _ALL: _state(
        _columns(MEASURES, _SETTINGS),
        {_RUN: 280},
        searchFilter=_TRIALS,
        orderByKey=f"metrics.`{MEASURES[0]}`",
        orderByAsc=False,
    ),
}
"""An experiment with these tags opens as a study at `runs_page`. Source: MLflow 3.17, the button "Share view"."""

CONFIRMED_VIEW = (
    _KEY + _CONFIRMED,
    json.dumps(
        {
            "name": "confirmed runs by arm",
            "createdAt": 0,
            "state": _state(
                _columns(CONFIRMED_MEASURES),
                {_RUN: 360},
                searchFilter=f"tags.phase = 'confirm' AND {_TRIALS}",
                # MLflow loads 100 runs at a time and averages what it has loaded: whole arms, in this order
                orderByKey="tags.`arm`",
                orderByAsc=True,
                # another best configuration is confirmed anew; its runs and the earlier ones have no common mean
                groupBy={
                    "aggregateFunction": "average",
                    "groupByKeys": [{"mode": "tag", "groupByData": tag} for tag in ("arm", "configuration")],
                },
            ),
        }
    ),
)
"""The tag that puts `confirmed_page` among the views of an experiment. Source: MLflow 3.17, "Save as new view"."""


def runs_page(experiment: str, view: str = _ALL) -> str:
    """Return the page of an experiment's runs, to be put behind the address of an MLflow UI."""
    return f"/#/experiments/{experiment}/runs?viewStateShareKey={view}&workflowType=machine_learning"


def confirmed_page(experiment: str) -> str:
    """Return the page of a study's confirmed runs: select all, press Compare."""
    return runs_page(experiment, _CONFIRMED)
