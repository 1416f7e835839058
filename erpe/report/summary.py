"""The answer of a study in a few sentences, and the protocol behind it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from erpe.config import DATASETS
from erpe.report.comparison import Comparison
from erpe.report.outcomes import TIMED, Outcomes
from erpe.report.pairing import switches
from erpe.report.ranks import pareto, surely_unbeaten
from erpe.report.significance import MEASURE, of_pair
from erpe.report.statistics import HIGHER_IS_BETTER

KNOWN = {"study", "dataset", "arm", "variant", "attention", "encoding", "seed", "uid", *HIGHER_IS_BETTER}
"""Columns of runs that are no facts about machine or version."""
MOST_NAMED = 12
"""Of more arms than this an answer tells the number only; the tables have them all."""
Rows = list[list[str]]


def answer(comparison: Comparison) -> list[str]:
    """What the seeds show of one study, each sentence over all arms; the verdicts one by one are `comparison.verdicts`.

    Only finished arms make a statement; preliminary and untested ones are named as such.
    """
    pairs = comparison.differences[comparison.differences["measure"] == MEASURE]
    said = [
        _told("Against the same attention without an encoding", pairs[pairs["kind"] == "baseline"]),
        _told("Against softmax", pairs[pairs["kind"] == "softmax"]),
        *_switched(pairs[pairs["kind"] == "switch"], comparison.arms),
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
        f"{words.get(verdict, verdict)}: {_list(found) if len(found) <= MOST_NAMED else f'{len(found)} arms'}"
        for verdict in ("more accurate", "less accurate", "noise", "preliminary", "untested")
        if (found := groups.get(verdict))
    ]
    return f"{lead}, {'; '.join(parts)}." if parts else ""


def _switched(pairs: pd.DataFrame, arms: pd.DataFrame) -> list[str]:
    """A sentence for each two values of a switch: neither of them needs be the absence of the other."""
    variants = dict(zip(arms["arm"], arms["variant"], strict=True))
    leads = []
    for arm, against in pairs[["arm", "against"]].itertuples(index=False, name=None):
        own, other = switches(arm, variants[arm]), switches(against, variants[against])
        new, old = (", ".join(sorted(names)) or "the default" for names in (own - other, other - own))
        leads.append(f"With {new} instead of {old}")
    return [_told(lead, pairs[[other == lead for other in leads]]) for lead in dict.fromkeys(leads)]


def _gaps(comparison: Comparison) -> str:
    told = comparison.verdicts[comparison.verdicts["kind"] == "gap"]
    if told.empty:
        return ""
    gaps = comparison.gaps.set_index("arm")
    if not (gaps["gap_is"] == "real").any():
        return "No gap from a linear attention to softmax is shown, so nothing can be said of closing it."
    real = [arm for arm in told.loc[told["verdict"] == "real", "arm"] if gaps.loc[arm, "closed"] > 0]
    if not real:
        return "Of no encoding is it shown that it closes a part of the gap to softmax."
    gap = gaps.loc[max(real, key=lambda arm: gaps.loc[arm, "closed"])]
    unsure = np.isnan(gap["low"])
    interval = "no interval" if unsure else f"95 % interval {100 * gap['low']:.0f} to {100 * gap['high']:.0f}"
    part = f"{100 * gap['closed']:.0f} % ({interval})"
    others = [arm for arm in real if arm != gap.name]
    also = f"; {_list(others)} close{'s' * (len(others) == 1)} a part of it, too" if others else ""
    found = f"{gap.name} closes the largest part of the gap: {part} of that from {gap['baseline']} to {gap['softmax']}"
    return f"{found}{also}."


def _cheap(comparison: Comparison) -> str:
    """Which arms none beats in both time and accuracy: only what the intervals of both bear out is concluded."""
    table = pareto(comparison.summary, TIMED)
    if len(table) < 2:
        return ""
    ends = comparison.summary.pivot(index="arm", columns="measure", values=["low", "high"]).loc[table["arm"]]
    cost, quality = (ends.xs(name, axis=1, level="measure").to_numpy() for name in (TIMED, MEASURE))
    table = table.assign(sure=surely_unbeaten(cost, quality)).sort_values("cost")
    front, sure = list(table.loc[table["front"], "arm"]), list(table.loc[table["sure"], "arm"])
    rest = [arm for arm in front if arm not in sure]
    if not sure:
        means = f"By the means, no arm is both faster at inference and more accurate than {_list(front, 'or')}"
        return f"{means}; but no 95 % intervals of times and accuracies bear that out, so it stays open."
    found = f"No arm is both faster at inference and more accurate than {_list(sure, 'or')}"
    told = f"; of {_list(rest)} the means say so, too, but the 95 % intervals leave it open" if rest else ""
    return f"{found}{told}."


def protocol(outcomes: Outcomes, comparison: Comparison) -> dict[str, str]:
    """What was done, as terms and their description, for one study on one data set."""
    arms, runs = outcomes.arms, outcomes.runs
    dataset = str(arms["dataset"].iloc[0])
    facts = DATASETS.get(dataset)
    kept = f" ({_numbers(runs['train/images'])} of them for the confirmation)" if "train/images" in runs else ""
    size = f": {facts.train:,} training images{kept}, {facts.test:,} test images" if facts else ""
    trials, seeds = _numbers(arms["trials_planned"]), _numbers(arms["seeds_planned"])
    searched, confirmed = _epochs(outcomes)
    steps = {
        "Data": f"{dataset}{size}",
        "Budget": f"{trials} trials an arm{searched}; equal for all: {', '.join(map(str, arms['budget'].unique()))}",
        "Search": "every arm with the same budget, space and scheduler, on a validation part of the training set",
        "Confirmation": f"the best configuration of each arm, trained again with {seeds} fresh seeds, the same for all "
        f"arms, on the whole training set{confirmed}",
        "Test": "opened once for each confirmed run",
        "Intervals": "95 %: Student's t over seeds; of the gap closed, an expanded percentile bootstrap over seeds",
        "Tests": "paired t-tests by seed and McNemar's tests, Holm's correction of p, not of intervals; Friedman's "
        "and Nemenyi's for ranks",
        "Costs": "FLOPs in closed form, multiply and add counted as two; times are medians after warm-up, "
        "of all confirmed runs in turn when nothing else ran",
    }
    made_with = outcomes.made_with.get(str(arms["study"].iloc[0]))
    facts_of_runs = {name.capitalize(): _numbers(runs[name]) for name in _facts(runs)}
    return steps | facts_of_runs | ({"Made with": made_with} if made_with else {})


def _epochs(outcomes: Outcomes) -> tuple[str, str]:
    """How long the trials of the search and the confirmed runs were trained, as the end of a clause."""
    trials, epochs = outcomes.trials, outcomes.epochs
    told = []
    searched = trials.loc[trials["state"] == "COMPLETE", "epochs"] if len(trials) else pd.Series()
    told.append(f" of {_numbers(searched)} epochs, fewer where pruned" if len(searched) else "")
    confirmed = epochs[epochs["phase"] == "confirm"].groupby("uid")["epoch"].max() if len(epochs) else pd.Series()
    told.append(f", for {_numbers(confirmed)} epochs" if len(confirmed) else "")
    return told[0], told[1]


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
