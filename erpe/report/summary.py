"""The answer of a study in a few sentences with numbers, the grid, and what a forest plot shows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import pandas as pd

from erpe.report.comparison import Comparison
from erpe.report.forest import forest
from erpe.report.gaps import NOT_SHOWN
from erpe.report.grid import Row, grid
from erpe.report.outcomes import TIMED
from erpe.report.pairing import KEY
from erpe.report.ranks import pareto, surely_unbeaten
from erpe.report.significance import (
    BETTER,
    EQUIVALENT,
    MEASURE,
    VERDICTS,
    WORSE,
    judged,
    not_excluded,
    share,
    share_facts,
    signed_distance,
    told,
)  # fmt: skip

MOST_NAMED = 12
"""Of more arms than this an answer tells the number only; the tables have them all."""
Pair = dict[Any, Any]


class Answer(NamedTuple):
    """What a first look at a study needs."""

    sentences: list[str]
    grid: list[Row]
    """Attention x encoding."""
    forest: pd.DataFrame
    """Paired differences in points; see `forest.forest`."""


def answer(comparison: Comparison) -> Answer:
    """Return the answer of one study on one data set; see `Comparison.only`."""
    arms, pairs = comparison.arms, comparison.differences
    return Answer(sentences(comparison), grid(arms, comparison.summary, pairs), forest(arms, pairs))


def sentences(comparison: Comparison) -> list[str]:
    """Return what the seeds show of one study: each gap, each encoding, then positions, switches and costs."""
    table = comparison.differences[comparison.differences["measure"] == MEASURE]
    pairs = {(pair["kind"], pair["arm"]): pair for pair in table.to_dict("records") if pair["kind"] != "switch"}
    found = [*_gaps(pairs, comparison.gaps), *_others(pairs)]
    found += [*_replaced(pairs), *_switched(table[table["kind"] == "switch"])]
    found += [sentence for kind, arm in pairs if kind == "study" for sentence in [f"{_full(pairs[kind, arm])}."]]
    return [*found, *_cheap(comparison)] or ["There are no two arms to compare yet."]


def _gaps(pairs: dict[tuple[str, str], Pair], gaps: pd.DataFrame) -> Iterator[str]:
    """Yield a sentence for each gap, and one for every encoding that could close it."""
    closed = gaps.to_dict("records")
    for (kind, baseline), gap in pairs.items():
        if kind != "gap":
            continue
        shown = gap["verdict"] == WORSE
        yield f"{_full(gap)}." if shown else f"{_full(gap)}; {NOT_SHOWN}."
        for row in closed:
            if row["baseline"] == baseline:
                gain, left = pairs.get(("encoding", row["arm"])), pairs.get(("softmax", row["arm"]))
                if gain and left:
                    yield _encoding(row, gain, left)


def _full(pair: Pair) -> str:
    """`favor is 1.9 points below softmax (95 % 0.7 to 3.1, 8 seeds)`, and what else than worse or better it is."""
    if not pair["n"]:
        return told(pair)
    plain = pair["verdict"] in (BETTER, WORSE) and judged(pair) == pair["verdict"]
    return told(pair) if plain else f"{told(pair)}: {judged(pair)}"


def _encoding(row: Pair, gain: Pair, left: Pair) -> str:
    """Return what an encoding does to a gap; without one, only how it stands to both its ends."""
    arm, away = row["arm"], f"{_stands(left)}"
    if not row["shown"]:
        return f"{arm} is {_stands(gain)}; it is {away}."
    if gain["verdict"] == BETTER and left["verdict"] in (BETTER, EQUIVALENT):
        return f"{arm} removes all of it: {away}."
    if gain["verdict"] == BETTER:
        return f"{arm} removes {share(row)} of it ({share_facts(row)}): {_stands(gain)}; {away}."
    if gain["verdict"] == WORSE:
        return f"{arm} makes it larger: {_stands(gain)}; {away}."
    verb = "does not remove it" if gain["verdict"] == EQUIVALENT else "is not shown to remove any of it"
    return f"{arm} {verb}: {_stands(gain)}; {away}."


def _stands(pair: Pair) -> str:
    """`0.2 points above softmax (95 % -0.6 to 1.0), equivalent within 1 point`."""
    if not pair["n"]:
        return f"not compared with {pair['against']} (no common seed)"
    close, _, distance = signed_distance(pair).partition(" (")
    interval = f" ({distance}" if distance else ""
    return f"{close} {pair['against']}{interval}, {judged(pair).replace(f', {not_excluded(pair)}', '')}"


def _others(pairs: dict[tuple[str, str], Pair]) -> Iterator[str]:
    """Yield sentences on encodings of softmax, and those without a gap to close."""
    for (kind, arm), pair in pairs.items():
        if kind == "encoding" and ("softmax", arm) not in pairs:
            yield f"{_full(pair)}."
        if kind == "softmax" and ("encoding", arm) not in pairs:
            yield f"{_full(pair)}."


def _replaced(pairs: dict[tuple[str, str], Pair]) -> Iterator[str]:
    """Whether an encoding does without absolute positions what learned ones do without it."""
    ends = {BETTER: "so it replaces them", EQUIVALENT: "so it replaces them", WORSE: "so it does not replace them"}
    for (kind, _), pair in pairs.items():
        if kind == "replacement" and pair["n"]:
            after = ends.get(pair["verdict"], "so whether it replaces them is open")
            yield f"Instead of learned positions: {told(pair)}, {judged(pair)}, {after}."


def _switched(pairs: pd.DataFrame) -> Iterator[str]:
    """Yield a sentence for each two values of a switch: neither of them needs be the absence of the other."""
    for family, rows in pairs.groupby("family", sort=False):
        new, _, old = str(family).removeprefix("switch ").partition(" for ")
        unfinished = int(rows["preliminary"].sum())
        parts = [
            f"{verdict}: {_list(found) if len(found) <= MOST_NAMED else f'{len(found)} arms'}"
            for verdict in VERDICTS
            if (found := list(rows.loc[rows["verdict"] == verdict, "arm"]))
        ]
        so_far = f" So far: {unfinished} of these {len(rows)} pairs have an unfinished arm." if unfinished else ""
        yield f"With {new} instead of {old}, {'; '.join(parts)}.{so_far}"


def _cheap(comparison: Comparison) -> Iterator[str]:
    """Which arms none beats in both time and accuracy: only what the intervals of both bear out is concluded."""
    table = pareto(comparison.summary, TIMED)
    if len(table) < 2:
        return
    ends = comparison.summary.pivot(index=KEY[-1], columns="measure", values=["low", "high"]).loc[table["arm"]]
    cost, quality = (ends.xs(name, axis=1, level="measure").to_numpy() for name in (TIMED, MEASURE))
    table = table.assign(sure=surely_unbeaten(cost, quality)).sort_values("cost")
    front, sure = list(table.loc[table["front"], "arm"]), list(table.loc[table["sure"], "arm"])
    rest = [arm for arm in front if arm not in sure]
    if not sure:
        means = f"By the means, no arm is both faster at inference and more accurate than {_list(front, 'or')}"
        yield f"{means}; but no 95 % intervals of times and accuracies bear that out, so it stays open."
        return
    found = f"No arm is both faster at inference and more accurate than {_list(sure, 'or')}"
    open_still = f"; of {_list(rest)} the means say so, too, but the 95 % intervals leave it open" if rest else ""
    yield f"{found}{open_still}."


def _list(names: Sequence[str], word: str = "and") -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} {word} {names[-1]}"
