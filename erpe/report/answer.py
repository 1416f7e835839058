"""The answer of a study in a few sentences, and the protocol behind it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from erpe.config import DATASETS
from erpe.report.comparison import Comparison
from erpe.report.outcomes import Outcomes
from erpe.report.ranks import pareto
from erpe.report.statistics import HIGHER_IS_BETTER
from erpe.report.verdicts import MEASURE, of_pair

KNOWN = {"study", "dataset", "arm", "variant", "attention", "encoding", "seed", "uid", *HIGHER_IS_BETTER}
"""Columns of runs that are no facts about machine or version."""
Rows = list[list[str]]


def answer(comparison: Comparison) -> list[str]:
    """What the seeds show of one study, each sentence over all arms; the verdicts one by one are `comparison.verdicts`.

    Only finished arms make a statement; preliminary and untested ones are named as such.
    """
    pairs = comparison.differences[comparison.differences["measure"] == MEASURE]
    said = [
        _told("Against the same attention without an encoding", pairs[pairs["kind"] == "baseline"]),
        _told("Against softmax", pairs[pairs["kind"] == "softmax"]),
        _told("Against the same variant without switches", pairs[pairs["kind"] == "switch"]),
        _gaps(comparison),
        _cheap(comparison),
    ]
    return [sentence for sentence in said if sentence] or ["There are no two arms to compare yet."]


def _told(lead: str, pairs: pd.DataFrame) -> str:
    groups: dict[str, list[str]] = {}
    for pair in pairs.to_dict("records"):
        verdict = of_pair(pair)
        if verdict == "real":
            verdict = "more accurate" if pair["difference"] > 0 else "less accurate"
        groups.setdefault(verdict, []).append(pair["arm"])
    words = {"noise": "not told apart", "preliminary": "preliminary, an arm being unfinished", "untested": "not tested"}
    parts = [
        f"{words.get(verdict, verdict)}: {_list(groups[verdict])}"
        for verdict in ("more accurate", "less accurate", "noise", "preliminary", "untested")
        if verdict in groups
    ]
    return f"{lead}, {'; '.join(parts)}." if parts else ""


def _gaps(comparison: Comparison) -> str:
    told = comparison.verdicts[comparison.verdicts["kind"] == "gap"]
    if told.empty:
        return ""
    gaps = comparison.gaps.set_index("arm")
    real = [arm for arm in told.loc[told["verdict"] == "real", "arm"] if gaps.loc[arm, "closed"] > 0]
    if not real:
        return "Of no encoding is it shown that it closes a part of the gap to softmax."
    gap = gaps.loc[max(real, key=lambda arm: gaps.loc[arm, "closed"])]
    part = f"{100 * gap['closed']:.0f} % (95 % interval {100 * gap['low']:.0f} to {100 * gap['high']:.0f})"
    others = [arm for arm in real if arm != gap.name]
    also = f"; {_list(others)} close a part of it, too" if others else ""
    found = f"{gap.name} closes the largest part of the gap: {part} of that from {gap['baseline']} to {gap['softmax']}"
    return f"{found}{also}."


def _cheap(comparison: Comparison) -> str:
    cost = "time/inference_ms_per_image"
    if not {cost, MEASURE} <= set(comparison.summary["measure"]):
        return ""
    table = pareto(comparison.summary, cost)
    front = table.loc[table["front"]].sort_values("cost")["arm"]
    return f"By the means, no arm is both faster at inference and more accurate than {_list(list(front), 'or')}."


def protocol(outcomes: Outcomes, comparison: Comparison) -> dict[str, str]:
    """What was done, as terms and their description, for one study on one data set."""
    arms, runs = outcomes.arms, outcomes.runs
    dataset = str(arms["dataset"].iloc[0])
    facts = DATASETS.get(dataset)
    kept = f" ({_numbers(runs['train/images'])} of them for the confirmation)" if "train/images" in runs else ""
    size = f": {facts.train:,} training images{kept}, {facts.test:,} test images" if facts else ""
    trials, seeds = _numbers(arms["trials_planned"]), _numbers(arms["seeds_planned"])
    steps = {
        "Data": f"{dataset}{size}",
        "Budget": f"{trials} trials an arm; equal for all: {', '.join(map(str, arms['budget'].unique()))}",
        "Search": "every arm with the same budget, space and scheduler, on a validation part of the training set",
        "Confirmation": f"the best configuration of each arm, trained again with {seeds} fresh seeds, the same for all "
        "arms, on the whole training set",
        "Test": "opened once for each confirmed run",
        "Intervals": "95 %: Student's t over seeds; of the gap closed, an expanded percentile bootstrap over seeds",
        "Tests": "paired t-tests by seed and McNemar's tests, Holm's correction; Friedman's and Nemenyi's for ranks",
        "Costs": "FLOPs in closed form, multiply and add counted as two; times are medians after warm-up",
    }
    made_with = outcomes.made_with.get(str(arms["study"].iloc[0]))
    facts_of_runs = {name.capitalize(): _numbers(runs[name]) for name in _facts(runs)}
    return steps | facts_of_runs | ({"Made with": made_with} if made_with else {})


def search_table(outcomes: Outcomes) -> tuple[list[str], Rows]:
    """Columns and rows: how each arm was searched, its best trial's settings, and how many seeds confirm it.

    A setting that is the same for every arm is in it, too: it is part of what was found.
    """
    trials = outcomes.trials
    settings = [name for name in trials if "." in name and trials[name].notna().any()]
    rows = []
    for arm in outcomes.arms.to_dict("records"):
        own = trials[trials["arm"] == arm["arm"]] if len(trials) else trials
        states = own["state"].value_counts() if len(own) else {}
        done = own[(own["state"] == "COMPLETE") & own["value"].notna()] if len(own) else own
        best = done.loc[done["value"].idxmax()] if len(done) else {}
        told = ", ".join(f"{count} {str(state).lower()}" for state, count in states.items())
        rows.append(
            [
                str(arm["arm"]),
                f"{arm['trials']} of {arm['trials_planned']}" + (f" ({told})" if told else ""),
                f"{best['value']:.4f}" if len(best) else "-",
                f"{arm['seeds']} of {arm['seeds_planned']}",
                *(_value(best.get(name)) for name in settings),
            ]
        )
    return ["arm", "trials", "best validation accuracy", "seeds", *settings], rows


def seeds_told(comparison: Comparison, chart: str) -> str:
    """ "n = 5 seeds", "n = 2 to 5 seeds": over how many seeds a chart's means, ranks or gaps are."""
    table = {"critical_difference": comparison.ranks, "gap_closed": comparison.gaps}.get(chart, comparison.summary)
    n = table.loc[table["measure"] == MEASURE, "n"] if "measure" in table else table["n"]
    low, high = (int(n.min()), int(n.max())) if len(n) else (0, 0)
    return f"n = {low} seed{'s' * (low != 1)}" if low == high else f"n = {low} to {high} seeds"


def _facts(runs: pd.DataFrame) -> list[str]:
    return [name for name in runs if name not in KNOWN and not pd.api.types.is_numeric_dtype(runs[name])]


def _numbers(column: pd.Series) -> str:
    """The values of a column, each once."""
    return ", ".join(_value(value) for value in sorted(column.dropna().unique()))


def _value(value: Any) -> str:
    if value is None or (isinstance(value, float) and np.isnan(value)):
        return "-"
    if isinstance(value, bool | np.bool_ | str):
        return str(value)
    return f"{value:,.0f}" if float(value).is_integer() and abs(value) < 1e9 else f"{value:.3g}"


def _list(names: Sequence[str], word: str = "and") -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} {word} {names[-1]}"
