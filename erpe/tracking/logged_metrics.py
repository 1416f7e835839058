"""Which measures MLflow has of its runs, so that none is logged twice, not even when the outbox was lost.

MLflow itself takes a measure again only if its time differs; an outbox that was rebuilt does not know the time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from erpe.tracking.outbox import Event
from erpe.tracking.run_state import same

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric


class Points:
    """What MLflow has; asked for a run's measure only when it has one of that name already."""

    def __init__(self, client: MlflowClient) -> None:
        self._client = client
        self._runs: dict[str, dict[str, list[Metric] | None]] = {}

    def open_run(self, run: str, names: dict[str, float]) -> None:
        """Open a run, with the measures it has by now."""
        self._runs.setdefault(run, dict.fromkeys(names))

    def forget(self, run: str | None = None) -> None:
        """Forget a run that has ended, or all runs."""
        if run is None:
            self._runs.clear()
        else:
            self._runs.pop(run, None)

    def news(self, event: Event, run: str) -> list[Metric]:
        """Return the event's measures, without those the run has.

        Of an epoch, at its step; of an end, as what it shows.
        """
        from mlflow.entities import Metric

        found = []
        # the epoch is the step; as a measure it would be the one MLflow draws first when runs are compared
        for name in (each for each in event.metrics if each != "epoch"):  # in their order, which MLflow shows
            metric, known = Metric(name, event.metrics[name], event.ts, event.step), self._known(run, name)
            if not (_has_step(known, event.step) if event.kind == "epoch" else _shows(known, metric.value)):
                known.append(metric)
                found.append(metric)
        return found

    def _known(self, run: str, name: str) -> list[Metric]:
        if run not in self._runs:
            self.open_run(run, self._client.get_run(run).data.metrics)
        known = self._runs[run].get(name, [])
        if known is None:
            known = self._client.get_metric_history(run, name)
        self._runs[run][name] = known
        return known


def _has_step(known: list[Metric], step: int) -> bool:
    return any(metric.step == step for metric in known)


def _shows(known: list[Metric], value: float) -> bool:
    latest = max(known, key=lambda metric: (metric.step, metric.timestamp), default=None)
    return latest is not None and same(latest.value, value)
