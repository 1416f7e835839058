"""The answer of a study in a few sentences with numbers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pandas as pd

from erpe.report.comparison import Comparison
from erpe.report.decisions import VERDICTS
from erpe.report.gaps import NOT_SHOWN
from erpe.report.labels import label, switched
from erpe.report.outcomes import TIMED
from erpe.report.pairing import KEY
from erpe.report.ranks import pareto, surely_unbeaten
from erpe.report.significance import Pair, distance, ends, margin_of, share, share_interval
from erpe.report.statistics import ACCURACY

BETTER, WORSE, EQUIVALENT, UNDECIDED = VERDICTS
MOST_NAMED = 12
"""Of more arms than this an answer tells the number only; the tables have them all."""


def sentences(comparison: Comparison) -> list[str]:
    """Return what the seeds show of one study: each attention with its encodings, then positions, switches, costs."""
    variants = dict(zip(comparison.arms["arm"], comparison.arms["variant"], strict=True))
    table = comparison.differences[comparison.differences["measure"] == ACCURACY]
    pairs = [Pair(row, variants) for row in table.to_dict("records")]
    found = [*_attentions(pairs, comparison.gaps), *_switched(pairs)]
    found += [f"{pair.full()}." for pair in pairs if pair["kind"] == "study"]
    return [*found, *_cheap(comparison, variants)] or ["There are no two arms to compare yet."]


def _attentions(pairs: Sequence[Pair], gaps: pd.DataFrame) -> Iterator[str]:
    """Yield for each attention its gap to softmax, and what every encoding makes of it."""
    of = {(pair["kind"], pair["arm"]): pair for pair in pairs}
    rows = {row["arm"]: row for row in gaps.to_dict("records") if row["shown"]}
    encoded: dict[str, list[Pair]] = {}
    for pair in pairs:
        if pair["kind"] in ("gap", "encoding"):
            encoded.setdefault(pair["arm" if pair["kind"] == "gap" else "against"], []).append(pair)
    for baseline, own in sorted(encoded.items(), key=lambda item: ("gap", item[0]) not in of):
        gap = of.get(("gap", baseline))
        effects: dict[str, list[str]] = {}
        for pair in own:
            if pair["kind"] == "encoding":
                row = rows.get(pair["arm"])
                words, facts = _closed(pair, of["softmax", pair["arm"]], row) if row else (_gain(pair), pair.points())
                words = f"so far {words}" if pair["preliminary"] else words
                effects.setdefault(words, []).append(f"{pair.names.encoding} ({facts})")
        said = [] if gap is None else [gap.full() if gap["verdict"] == WORSE else f"{gap.full()}; {NOT_SHOWN}"]
        said += [("" if gap else own[0].within()) + f"{words} {_list(named)}" for words, named in effects.items()]
        yield " ".join(f"{_begun(words)}." for words in said)
    yield from (f"{_begun(pair.full())}." for pair in pairs
                if pair["kind"] == "softmax" and ("encoding", pair["arm"]) not in of)  # fmt: skip


def _closed(gain: Pair, left: Pair, row: dict[Any, Any]) -> tuple[str, str]:
    """Return what an encoding does to a gap, and the numbers."""
    away = f"{distance(left)} {left.names.against}" + (f", 95 % {ends(left)}" if ends(left) else "")
    if gain["verdict"] == BETTER and left["verdict"] in (BETTER, EQUIVALENT):
        return "all of the gap is removed by", away
    if gain["verdict"] == BETTER:
        return "part of the gap is removed by", f"{share(row)} of it, {share_interval(row)}; {away}"
    words = {
        WORSE: "the gap is larger with",
        EQUIVALENT: f"within {margin_of(gain)} the gap is the same with",
        UNDECIDED: "not shown to remove any of the gap:",
    }
    return words[gain["verdict"]], gain.points()


def _gain(pair: Pair) -> str:
    """Return how encodings stand to the attention alone."""
    words = {
        BETTER: "better than {}:",
        WORSE: "worse than {}:",
        EQUIVALENT: f"equivalent to {{}} within {margin_of(pair)}:",
        UNDECIDED: "undecided against {}:",
    }
    return words[pair["verdict"]].format(f"{pair.names.against} alone")


def _switched(pairs: Sequence[Pair]) -> Iterator[str]:
    """Yield a sentence for each two values of a switch, those first of which an encoding may take the place of one."""
    families: dict[str, list[Pair]] = {}
    for pair in sorted(pairs, key=lambda pair: pair["kind"] == "switch"):
        if pair["kind"] in ("replacement", "switch"):
            families.setdefault(pair["family"], []).append(pair)
    for family, own in families.items():
        replaces = own[0]["kind"] == "replacement"
        new, _, old = family.removeprefix("switch ").partition(" for ")
        start = "an encoding instead of learned positions" if replaces else f"{_value(new)} instead of {_value(old)}"
        parts = [
            f"{verdict}: {_list(found) if len(found) <= MOST_NAMED else f'{len(found)} arms'}"
            for verdict in VERDICTS
            if (found := [f"{pair.names.arm} ({pair.points()})" if replaces else pair.names.arm
                          for pair in own if pair["verdict"] == verdict])
        ]  # fmt: skip
        good = any(pair["verdict"] in (BETTER, EQUIVALENT) for pair in own)
        said = "What is better or equivalent replaces them" if good else "None is shown to replace them"
        end = f". {said}." if replaces else "."
        unfinished = sum(pair["preliminary"] for pair in own)
        so_far = f" So far: {unfinished} of these {len(own)} pairs have an unfinished arm." if unfinished else ""
        yield f"With {start}, {'; '.join(parts)}{end}{so_far}"


def _value(names: str) -> str:
    """`no positions` of `position_none`."""
    return switched(frozenset(names.split(", ")))


def _cheap(comparison: Comparison, variants: dict[str, str]) -> Iterator[str]:
    """Which arms none beats in both time and accuracy: only what the intervals of both bear out is concluded."""
    table = pareto(comparison.summary, TIMED)
    if len(table) < 2:
        return
    ends = comparison.summary.pivot(index=KEY[-1], columns="measure", values=["low", "high"]).loc[table["arm"]]
    cost, quality = (ends.xs(name, axis=1, level="measure").to_numpy() for name in (TIMED, ACCURACY))
    table = table.assign(sure=surely_unbeaten(cost, quality)).sort_values("cost")
    front, sure = ([label(arm, variants[arm]) for arm in table.loc[table[name], "arm"]] for name in ("front", "sure"))
    rest = [arm for arm in front if arm not in sure]
    if not sure:
        means = f"By the means, no arm is both faster at inference and more accurate than {_list(front, 'or')}"
        yield f"{means}; but no 95 % intervals of times and accuracies bear that out, so it stays open."
        return
    found = f"No arm is both faster at inference and more accurate than {_list(sure, 'or')}"
    open_still = f"; of {_list(rest)} the means say so, too, but the 95 % intervals leave it open" if rest else ""
    yield f"{found}{open_still}."


def _begun(words: str) -> str:
    """Begin a sentence with a capital letter, unless it is a name's that has none."""
    return words if words.startswith("softmax") else words[:1].upper() + words[1:]


def _list(names: Sequence[str], word: str = "and") -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} {word} {names[-1]}"
