"""A study as data frames, for a notebook or a script.

study = erpe.load_study("mnist-nine")
study.runs.groupby("arm")["test/accuracy"].mean()
study.best("favor_rope"), study.model("favor_rope")
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partialmethod
from pathlib import Path
from typing import TYPE_CHECKING

from erpe.config import TrialConfig
from erpe.errors import StudyError, nearest
from erpe.plugins import load as load_plugin
from erpe.store import Store
from erpe.tuned import drawn

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from erpe.report.comparison import Comparison
    from erpe.report.outcomes import Outcomes
    from erpe.search.run_study import CampaignResult
    from erpe.training.checkpoint import TrainedViT


@dataclass(frozen=True, repr=False)
class Study:
    """What a study found. The tables are those of `erpe.report.outcomes.Outcomes`; change a copy, not them."""

    name: str
    outcomes: Outcomes
    """The tables, the test predictions and the notes, as `erpe compare` reads them."""
    _config: Callable[[str], TrialConfig]
    """uid of a complete trial -> its configuration."""
    _folder: Callable[[str], Path]
    """uid of a complete trial or run -> the folder of its model."""
    result: CampaignResult | None = None
    """How it stands, where `erpe.run_study` returns it."""

    @property
    def arms(self) -> pd.DataFrame:
        """A row an arm: what was planned for it, and how much of that is done."""
        return self.outcomes.arms

    @property
    def runs(self) -> pd.DataFrame:
        """A row a confirmed run, that is an arm and a seed: its measures, as `test/accuracy`."""
        return self.outcomes.runs

    @property
    def trials(self) -> pd.DataFrame:
        """A row a trial: state, value (the first objective, mostly validation accuracy), settings, as `train.lr`."""
        return self.outcomes.trials

    @property
    def epochs(self) -> pd.DataFrame:
        """A row an epoch of a trial (`val/accuracy`) or of a confirmed run (`train/loss`)."""
        return self.outcomes.epochs

    def best(self, arm: str) -> TrialConfig:
        """Return the best configuration that the search found: complete, within the limits of cost, of the highest
        value, the first of equals.

        Args:
            arm: an arm; or a variant, whose arms all count.
        Raises:
            StudyError: there is no such arm, or none of its trials is complete.
            StoreError: another version of erpe wrote it, or the tracking server has lost it.
        """
        return self._config(self._best(arm))

    def _best(self, arm: str) -> str:
        trials = self.trials[self._of(arm, self.trials)]
        complete = trials[(trials["state"] == "COMPLETE") & trials["value"].notna()].sort_values("number")
        if complete.empty:
            raise StudyError(f"{self.name}: {arm} has no complete trial yet; the study's command continues it")
        return str(complete.loc[complete["value"].astype(float).idxmax(), "uid"])

    def model(self, run: str) -> TrainedViT:
        """Return a trained model, in evaluation mode on the CPU; its `predict` takes uint8 pictures as they are.

        Args:
            run: the uid of a confirmed run or of a complete trial; or an arm or variant: its first confirmed run, or
                the best trial where the study confirms none.
        Raises:
            StudyError: there is no such run or arm, or it has no trained model yet.
            StoreError: the model is missing or damaged, or another version of erpe wrote it.
        """
        from erpe.training.checkpoint import load_model

        uids = {*self.runs["uid"], *self.trials.loc[self.trials["state"] == "COMPLETE", "uid"]}
        if run in uids:
            return load_model(self._folder(run))[0]
        if run in set(self.trials["uid"]):
            raise StudyError(f"{self.name}: trial {run} is not complete, so it has no model")
        own = self.runs[self._of(run, self.runs)]
        if not self.arms["seeds_planned"].any():
            return load_model(self._folder(self._best(run)))[0]
        if own.empty:
            raise StudyError(f"{self.name}: {run} has no confirmed run yet; the study's command continues it")
        return load_model(self._folder(own["uid"].iloc[0]))[0]

    def comparison(self) -> Comparison:
        """Means with intervals, paired tests, the gap closed, and what they say in words.

        Raises:
            StudyError: there is nothing to compare yet.
        """
        return self._comparison

    @cached_property
    def _comparison(self) -> Comparison:
        from erpe.report.comparison import compare

        return compare(self.outcomes)

    def plot(self, what: str) -> Figure:
        """Draw a figure of the page.

        Args:
            what: its name, as `accuracy`; a wrong one is told the right ones.
        Raises:
            StudyError: there is no such figure, or nothing to draw in it yet.
        """
        from erpe.report.charts import CHARTS, parts

        if what not in CHARTS:
            raise StudyError(f"no figure {what!r}; {nearest(what, CHARTS)}")
        ((_, part),) = parts(self.outcomes, self.comparison()).items()
        return drawn(CHARTS[what](*part), f"{self.name}: {what}")

    plot_accuracy = partialmethod(plot, "accuracy")
    plot_attention_maps = partialmethod(plot, "attention_maps")
    plot_cost_against_tokens = partialmethod(plot, "cost_against_tokens")
    plot_criteria = partialmethod(plot, "criteria")
    plot_critical_difference = partialmethod(plot, "critical_difference")
    plot_differences = partialmethod(plot, "differences")
    plot_fronts = partialmethod(plot, "fronts")
    plot_gap_closed = partialmethod(plot, "gap_closed")
    plot_learning_curves = partialmethod(plot, "learning_curves")
    plot_search_effort = partialmethod(plot, "search_effort")
    plot_tradeoffs = partialmethod(plot, "tradeoffs")

    def _of(self, arm: str, rows: pd.DataFrame) -> pd.Series:
        """Which rows are of an arm, or of a variant."""
        column = "arm" if arm in set(self.arms["arm"]) else "variant"
        if arm not in set(self.arms[column]):
            known = dict.fromkeys([*self.arms["arm"], *self.arms["variant"]])
            raise StudyError(f"{self.name}: no arm, variant or run {arm!r}; {nearest(arm, known)}")
        return rows[column] == arm

    def __repr__(self) -> str:
        done = f"{int(self.arms['finished'].sum())} of {len(self.arms)} arms finished"
        return f"<study {self.name}: {done}, {len(self.trials)} trials, {len(self.runs)} confirmed runs>"


def load_study(name: str, store: str | Path = "runs", server: str | None = None, plugins: Sequence[str] = ()) -> Study:
    """Return a study of `erpe study run`; or one of `erpe tune`, which has one arm, its variant, and no confirmed run.

    Args:
        name: as `erpe status` shows it.
        store: the folder it was run in.
        server: a tracking server to read instead, as http://HOST:5000; it knows those of `erpe study run` alone.
        plugins: Python files, or names of installed ones, that its attentions and encodings are of.
    Raises:
        ConfigError: it is of a plug-in that is not loaded.
        StudyError: there is none of this name.
        StoreError: there is no store, or it cannot be read.
        TrackingError: the server does not answer, refuses, or is not MLflow.
    """
    for each in plugins:
        load_plugin(each)
    if server:
        return _on_server(name, server)
    from erpe.report.sources.store import load, load_tuned
    from erpe.study.lookup import parts_of
    from erpe.study.reading import read_studies

    opened = Store.existing(store)
    members = parts_of(read_studies(opened), name)
    outcomes = load(opened, [name]) if members[0].part_of else load_tuned(members[0], opened)
    places = {trial.uid: (member.name, trial) for member in members for trial in member.trials}

    def folder(uid: str) -> Path:
        study, trial = places[uid]
        if trial.removed:
            raise StudyError(f"{name}: `erpe gc` removed the model of trial {uid}; its settings and value stay")
        return opened.trial_folder(study, trial.number, trial.config.seed)

    return Study(name, outcomes, lambda uid: places[uid][1].config, folder)


def _on_server(name: str, server: str) -> Study:
    from erpe.report.sources.mlflow import download_checkpoint, read
    from erpe.training.checkpoint import load_config

    def config(uid: str) -> TrialConfig:
        return load_config(download_checkpoint(server, name, uid, ["config.json"]))

    def folder(uid: str) -> Path:
        return download_checkpoint(server, name, uid)

    return Study(name, read(server, [name]), config, folder)
