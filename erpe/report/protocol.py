"""The protocol behind the answer: what was done, on what data and machine, and what the searches found."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from erpe.datasets import DATASETS
from erpe.report.labels import ATTENTION, label
from erpe.report.measures import MEASURES as COLUMNS
from erpe.report.outcomes import Outcomes, goals_of
from erpe.report.table_blocks import Block
from erpe.study.objectives import MEASURES, Goals, drawn_as

KNOWN = {"study", "dataset", "arm", "variant", "attention", "encoding", "seed", "uid", *COLUMNS}
"""Columns of runs that are no facts about machine or version."""


def protocol(outcomes: Outcomes) -> dict[str, str]:
    """Return what was done, as terms and their description, for one study on one data set."""
    arms, runs = outcomes.arms, outcomes.runs
    dataset = str(arms["dataset"].iloc[0])
    facts = outcomes.datasets.get(dataset) or DATASETS.get(dataset)
    kept = f" ({_numbers(runs['train/images'])} of them for the confirmation)" if "train/images" in runs else ""
    size = f": {facts.train:,} training images{kept}, {facts.test:,} test images" if facts else ""
    size += ", a fixed stratified part of the images given" if facts and facts.part else ""
    trials, seeds = _numbers(arms["trials_planned"]), _numbers(arms["seeds_planned"])
    searched, confirmed = _epochs(outcomes)
    steps = {
        "Data": f"{dataset}{size}",
        "Budget": f"{trials} trials an arm{searched}; equal for all: {', '.join(map(str, arms['budget'].unique()))}",
        "Search": f"every arm with the same budget, space and scheduler, on a validation part of the training set"
        f"{_sought(goals_of(arms))}",
        "Confirmation": f"the best configuration of each arm, trained again with {seeds} fresh seeds, the same for all "
        f"arms, on the whole training set{confirmed}",
        "Test": "opened once for each confirmed run",
        "Means": "95 % interval: Student's t over seeds, for new seeds on these test images",
        "Differences": "paired by seed; four verdicts: better or worse by t-tests, equivalent within the margin by two "
        "one-sided tests, else undecided; each corrected by Holm inside its family: the gaps; encodings against none; "
        "encodings against softmax; encodings instead of learned positions; each switch",
        "Their intervals": "Bonferroni's over the family, 95 % for all of it together, cut where Holm's verdict goes "
        "further; for new seeds on these test images, and by a hierarchical bootstrap for new images too",
        "Gap closed": "Fieller's 95 % interval of a ratio of two means; nothing is given where no gap is shown",
        "Ranks": "by accuracy, where at least 5 seeds are blocks: Friedman's and Nemenyi's tests; none for AIC and BIC",
        "Costs": "FLOPs in closed form, multiply and add counted as two; times are medians after warm-up, "
        "of all confirmed runs in turn when nothing else ran",
    }
    made_with = outcomes.made_with.get(str(arms["study"].iloc[0]))
    facts_of_runs = {name.capitalize(): _numbers(runs[name]) for name in _facts(runs)}
    return steps | facts_of_runs | ({"Made with": made_with} if made_with else {})


def _sought(goals: Goals) -> str:
    """Return what is sought, if it is not accuracy alone."""
    several = f"; it sought {', '.join(MEASURES[name].label for name in goals.objectives)}" if goals.tags else ""
    confirmed = ", and confirmed is the best by the first" if goals.several else ""
    return several + confirmed + (f", of models of at most {goals.limits}" if goals.limits else "")


def _epochs(outcomes: Outcomes) -> tuple[str, str]:
    """How long the trials of the search and the confirmed runs were trained, as the end of a clause."""
    trials, epochs = outcomes.trials, outcomes.epochs
    told = []
    searched = trials.loc[trials["state"] == "COMPLETE", "epochs"] if len(trials) else pd.Series()
    told.append(f" of {_numbers(searched)} epochs, fewer where pruned" if len(searched) else "")
    confirmed = epochs[epochs["phase"] == "confirm"].groupby("uid")["epoch"].max() if len(epochs) else pd.Series()
    told.append(f", for {_numbers(confirmed)} epochs" if len(confirmed) else "")
    return told[0], told[1]


def search_tables(outcomes: Outcomes) -> list[Block]:
    """Return how each arm was searched and the best trial's settings: a table an attention, a column an arm.

    Settings that no trial varied stand in one remark.
    """
    trials, goals = outcomes.trials, goals_of(outcomes.arms)
    factor, label_of = drawn_as(goals.objectives[0])
    settings = [name for name in trials if "." in name and trials[name].notna().any()]
    varied = [name for name in settings if trials[name].dropna().astype(str).nunique() > 1]
    fixed = [f"{name} {_value(trials[name].dropna().iloc[0])}" for name in settings if name not in varied]
    found = []
    for attention, arms in outcomes.arms.groupby("attention", sort=False):
        columns = [_searched(arm, trials, varied, factor) for arm in arms.to_dict("records")]
        heads = ["trials", f"best {label_of}", "seeds", *varied]
        rows = [[head, *cells] for head, *cells in zip(heads, *columns, strict=True)]
        names = [label(arm, variant) for arm, variant in zip(arms["arm"], arms["variant"], strict=True)]
        numbers = [False, *(True for _ in names)]
        remarks = [f"the same for all: {', '.join(fixed)}"] if fixed else []
        title = f"Search and best settings: {ATTENTION.get(str(attention), str(attention))}"
        found.append(Block(title, ["", *names], rows, numbers, [], remarks))
    return found


def _searched(arm: dict[Any, Any], trials: pd.DataFrame, settings: list[str], factor: float) -> list[str]:
    """Return the column of an arm: its trials by state, its best one, its seeds and the best one's settings."""
    own = trials[trials["arm"] == arm["arm"]] if len(trials) else trials
    states = own["state"].value_counts() if len(own) else {}
    done = own[(own["state"] == "COMPLETE") & own["value"].notna()] if len(own) else own
    best = done.loc[done["value"].idxmax()] if len(done) else {}
    told = ", ".join(f"{count} {str(state).lower()}" for state, count in states.items())
    return [
        f"{arm['trials']} of {arm['trials_planned']}" + (f" ({told})" if told else ""),
        f"{factor * best['value']:.2f}" if len(best) else "-",
        f"{arm['seeds']} of {arm['seeds_planned']}",
        *(_value(best.get(name)) for name in settings),
    ]


def _facts(runs: pd.DataFrame) -> list[str]:
    return [name for name in runs if name not in KNOWN and not pd.api.types.is_numeric_dtype(runs[name])]


def _numbers(column: pd.Series) -> str:
    """Return the values of a column, each once."""
    return ", ".join(_value(value) for value in sorted(column.dropna().unique()))


def _value(value: Any) -> str:
    if value is None or (isinstance(value, float) and np.isnan(value)):
        return "-"
    if isinstance(value, bool | np.bool_ | str):
        return str(value)
    return f"{value:,.0f}" if float(value).is_integer() and abs(value) < 1e9 else f"{value:.3g}"
