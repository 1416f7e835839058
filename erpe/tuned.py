"""A study of `erpe.tune` or `erpe.train`, for a notebook or a script: its trials, its figures, its models."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, partialmethod
from typing import TYPE_CHECKING

from erpe.config import TrialConfig
from erpe.errors import StudyError, nearest
from erpe.store import Store
from erpe.text import last_line

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from erpe.search.tune import TuneResult
    from erpe.study.records import StudyRecord
    from erpe.study.spec import StudySpec
    from erpe.training.checkpoint import TrainedViT


def drawn(figure: Figure | None, what: str) -> Figure:
    """Return a figure.

    Raises:
        StudyError: there is none.
    """
    if figure is None:
        raise StudyError(f"{what}: nothing to draw; the study lacks what it shows")
    return figure


@dataclass(frozen=True, repr=False)
class Tuned:
    """A study of `erpe.tune` or `erpe.train`: its trials as data frames, its best configuration and its models."""

    result: TuneResult
    """How it stood when the call ended."""
    spec: StudySpec
    """What was searched."""
    store: Store

    @cached_property
    def _record(self) -> StudyRecord:
        from erpe.study.reading import read_studies

        return read_studies(self.store, self.result.study)[0]

    @cached_property
    def trials(self) -> pd.DataFrame:
        """A row a trial: its state, value (the first objective; missing above a limit of cost), each of several
        objectives, as `flops`, and its settings, as `train.lr`.
        """
        import pandas as pd

        from erpe.report.sources.store import trial_row

        return pd.DataFrame([trial_row(trial, self.spec.goals) for trial in self._record.trials])

    @cached_property
    def epochs(self) -> pd.DataFrame:
        """A row an epoch of a trial: `number`, `epoch` and its measure, as `val/accuracy`."""
        import pandas as pd

        trials = self._record.trials
        rows = [(trial.number, *epoch) for trial in trials for epoch in sorted(trial.epochs.items())]
        return pd.DataFrame(rows, columns=["number", "epoch", *self.spec.measured(0.0)])

    @property
    def metrics(self) -> dict[str, float]:
        """Measures of the best trial; on the test split, too, once all trials were done."""
        return self.result.metrics | (self.result.test or {})

    @property
    def front(self) -> pd.DataFrame:
        """A row a trial that no other one dominates: `number` and its objectives; none of one objective."""
        import pandas as pd

        rows = [{"number": number, **values} for number, values in self.result.front.items()]
        return pd.DataFrame(rows, columns=["number", *self.spec.goals.objectives])

    @property
    def best(self) -> TrialConfig:
        """The configuration of the best trial, within the limits of cost: of the most of the first objective.

        Raises:
            StudyError: there is none; the line says why.
        """
        if self.result.config is None:
            first = next((f"trial {n}: {last_line(why)}" for n, why in sorted(self.result.reasons.items())), "")
            what = "within the limits" if self.result.counts.get("COMPLETE") else "completed"
            raise StudyError(f"study {self.result.study}: no trial was {what}; {first or 'see erpe status'}")
        return self.result.config

    def model(self, trial: int | None = None) -> TrainedViT:
        """Return a trained model, in evaluation mode on the CPU; its `predict` takes uint8 pictures as they are.

        Args:
            trial: number of a complete one; default: the best.
        Raises:
            StudyError: it is not complete.
            StoreError: the model is missing or damaged.
        """
        from erpe.inference import find_folder
        from erpe.training.checkpoint import load_model

        _ = self.best  # raises, and says why, where no trial was completed
        number = self.result.best if trial is None else trial
        return load_model(find_folder(f"{self.result.study}/{number}", self.store))[0]

    def plot(self, what: str) -> Figure:
        """Draw a figure of the search.

        Args:
            what: history, importances, parallel_coordinates or, of several objectives, front.
        Raises:
            StudyError: there is no such figure, or nothing to draw in it yet.
        """
        return plot_search(self.result.study, self.store, what)

    plot_front = partialmethod(plot, "front")
    plot_history = partialmethod(plot, "history")
    plot_importances = partialmethod(plot, "importances")
    plot_parallel_coordinates = partialmethod(plot, "parallel_coordinates")

    def __repr__(self) -> str:
        counts = ", ".join(f"{count} {state.lower()}" for state, count in sorted(self.result.counts.items()) if count)
        best = "none is complete" if self.result.best is None else f"trial {self.result.best} is the best"
        stopped = "; interrupted, the same call continues it" if self.result.interrupted else ""
        return f"<study {self.result.study}: {counts or 'no trials'}, {best}{stopped}>"


def plot_search(name: str, store: Store, what: str) -> Figure:
    """Draw a figure of one search: history, importances, parallel_coordinates or front.

    Raises:
        StudyError: there is no such study or figure, or nothing to draw in it yet.
    """
    from erpe.tracking.search_plots import draw_stored

    known = ("history", "importances", "parallel_coordinates", "front")
    if what not in known:
        raise StudyError(f"no figure {what!r}; {nearest(what, known)}")
    return drawn(draw_stored(store, name).get(what), f"{name}: {what}")
