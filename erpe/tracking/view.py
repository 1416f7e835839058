"""How MLflow shows a study: one row a run, best first, with the measures that matter."""

from __future__ import annotations

import json

MEASURES = (
    "val/accuracy", "val/loss", "test/accuracy", "params", "flops/forward",
    "time/train_seconds_per_epoch", "memory/peak_mib",
)  # fmt: skip
_SETTINGS = ("train.lr", "model.width", "model.depth")
_NAME = "erpe"

_COLUMNS = {
    "tags.`state`": "state",
    **{f"metrics.`{name}`": name for name in MEASURES},
    **{f"params.`{name}`": name for name in _SETTINGS},
}
_STATE = {
    "searchFilter": "",
    # sorted by a measure, MLflow lists trials beside their parent; by time it would fold them away
    "orderByKey": f"metrics.`{MEASURES[0]}`",
    "orderByAsc": False,
    "startTime": "ALL",
    "lifecycleFilter": "Active",
    "datasetsFilter": [],
    "modelVersionFilter": "All Runs",
    "selectedColumns": list(_COLUMNS),
    "columnOrder": ["attributes.`Run Name`", *_COLUMNS],
    "columnWidths": {column: min(220, max(95, 8 * len(name) + 20)) for column, name in _COLUMNS.items()},
    "viewMaximized": True,
}

EXPERIMENT_TAGS = {
    "mlflow.experimentKind": "custom_model_development",
    f"mlflow.sharedViewState.{_NAME}": json.dumps(_STATE),
}
"""An experiment with these tags opens as a study at `runs_page`. Source: MLflow 3.17, the button "Share view"."""


def runs_page(experiment: str) -> str:
    """The page of an experiment's runs, to be put behind the address of an MLflow UI."""
    return f"/#/experiments/{experiment}/runs?viewStateShareKey={_NAME}&workflowType=machine_learning"
