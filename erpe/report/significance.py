"""What each comparison says, a plain sentence each."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from erpe.report.decisions import ALPHA, VERDICTS
from erpe.report.gaps import NOT_SHOWN
from erpe.report.labels import labels_of, names
from erpe.report.pairing import KEY
from erpe.report.statistics import ACCURACY
from erpe.text import counted

MEASURE = ACCURACY
"""What verdicts are about."""
COLUMNS = [*KEY, "against", "kind", "measure", "verdict", "preliminary", "text"]
BETTER, WORSE, EQUIVALENT, UNDECIDED = VERDICTS


def verdicts(arms: pd.DataFrame, differences: pd.DataFrame, gaps: pd.DataFrame) -> pd.DataFrame:
    """Return a sentence for every pair, every gap closed, and every unfinished arm; arms are called as in a paper.

    Args:
        arms: of `Outcomes`.
        differences: of `statistics.differences`.
        gaps: of `gaps.gap_closed`.
    Returns:
        `study`, `dataset`, `arm`, `against`, `kind` (that of the pair, `closed` or `unfinished`), `measure`, `verdict`
        (one of `VERDICTS`; of a gap closed that on the arm against its baseline), `preliminary`, `text`.
    """
    rows, known = [], {}
    names = labels_of(arms)

    def named(row: dict[Any, Any]) -> dict[Any, Any]:
        return row | {at: names.get(row[at], row[at]) for at in ("arm", "against", "baseline", "softmax") if at in row}

    for arm in arms[~arms["finished"].astype(bool)].to_dict("records"):
        seeds = f"{int(arm['seeds'])} of {int(arm['seeds_planned'])} seeds are confirmed"
        rows.append(_row(arm, "", "unfinished", UNDECIDED, True, f"{names[arm['arm']]} is unfinished: {seeds}"))
    for pair in differences[differences["measure"] == MEASURE].to_dict("records"):
        text = f"{told(named(pair))}: {judged(pair)}" if pair["n"] else told(named(pair))
        rows.append(_row(pair, pair["against"], pair["kind"], pair["verdict"], pair["preliminary"], text))
        known[pair["study"], pair["dataset"], pair["arm"], pair["kind"]] = named(pair)
    for gap in gaps.to_dict("records"):
        gain, left = (known.get((*(gap[name] for name in KEY), kind)) for kind in ("encoding", "softmax"))
        verdict = gain["verdict"] if gain else UNDECIDED
        text = _closed(named(gap), gain, left)
        rows.append(_row(gap, gap["baseline"], "closed", verdict, gap["preliminary"], text))
    return pd.DataFrame(rows, columns=COLUMNS)


def _row(of: dict[Any, Any], against: str, kind: str, verdict: str, preliminary: bool, text: str) -> dict[str, Any]:
    where = {name: of[name] for name in KEY} | {"against": against, "kind": kind, "measure": MEASURE}
    return where | {"verdict": verdict, "preliminary": bool(preliminary), "text": text}


def told(pair: dict[Any, Any]) -> str:
    """`relu_general is 2.9 points above relu (95 % 2.1 to 3.7, 8 seeds)`; the interval is simultaneous."""
    against = pair["against"]
    if pair["against_study"] != pair["study"]:
        against = f"{against} of {pair['against_study']}"
    if not pair["n"]:
        return f"{pair['arm']} and {against} have no seed in common"
    return f"{pair['arm']} is {distance(pair)} {against} ({facts(pair)})"


def distance(pair: dict[Any, Any]) -> str:
    """`2.9 points above`, or `level with`."""
    digits = digits_of(pair)
    size, place = abs(100 * pair["difference"]), "above" if pair["difference"] > 0 else "below"
    return f"{size:.{digits}f} points {place}" if round(size, digits) else "level with"


def facts(pair: dict[Any, Any]) -> str:
    """`95 % 2.1 to 3.7, 8 seeds`: without signs where the interval is on one side of 0, as the words have the side."""
    return (f"95 % {ends(pair)}, " if ends(pair) else "") + counted(int(pair["n"]), "seed")


def ends(pair: dict[Any, Any]) -> str:
    """`0.7 to 3.1` of the simultaneous interval, or nothing."""
    low, high = 100 * pair["all_low"], 100 * pair["all_high"]
    if np.isnan(low):
        return ""
    if high <= 0:
        low, high = -high, -low
    digits = digits_of(pair)
    return f"{signed(low, digits)} to {signed(high, digits)}"


def judged(pair: dict[Any, Any]) -> str:
    """Return the verdict in words."""
    margin, verdict = margin_of(pair), pair["verdict"]
    if np.isnan(pair["all_low"]):
        why = "one seed tells nothing" if pair["n"] == 1 else "the difference is the same on every seed"
        return f"{UNDECIDED}, {why}"
    if verdict == EQUIVALENT:
        words = f"{EQUIVALENT} within {margin}"
    elif verdict == UNDECIDED:
        words = f"{UNDECIDED}, {not_excluded(pair)}"
    else:
        words = verdict + (f", by less than {margin}" if pair["p_equivalent"] < ALPHA else "")
    return f"so far {words}; preliminary, an arm is unfinished" if pair["preliminary"] else words


def margin_of(pair: dict[Any, Any]) -> str:
    """`0.5 points`."""
    return f"{100 * pair['margin']:g} point{'s' * (pair['margin'] != 0.01)}"


def not_excluded(pair: dict[Any, Any]) -> str:
    """Return the largest differences that an undecided comparison leaves open, on both sides of 0."""
    digits = digits_of(pair)
    low, high = (f"{100 * abs(pair[end]):.{digits}f}" for end in ("all_low", "all_high"))
    return f"up to {low} points below and {high} above are not excluded"


def _closed(gap: dict[Any, Any], gain: dict[Any, Any] | None, left: dict[Any, Any] | None) -> str:
    """`relu_general closes 76 % of the gap from relu to softmax (95 % 36 to 110, 8 seeds)`, or that there is none."""
    arm, between = gap["arm"], f"from {gap['baseline']} to {gap['softmax']}"
    if gap["shown"]:
        after = "" if gain and gain["verdict"] == BETTER else "; but it is not shown to be better than no encoding"
        after += "; preliminary, an arm is unfinished" * bool(gap["preliminary"])
        seeds = counted(int(gap["n"]), "seed")
        return f"{arm} closes {share(gap)} of the gap {between} ({share_interval(gap)}, {seeds}){after}"
    both = [f"{signed_distance(pair)} {pair['against']}" for pair in (gain, left) if pair and pair["n"]]
    return f"{arm}: {NOT_SHOWN} {between}" + (f"; it is {' and '.join(both)}" if both else "")


def share(gap: dict[Any, Any]) -> str:
    """`76 %`."""
    return f"{signed(100 * gap['closed'], 0)} %"


def share_interval(gap: dict[Any, Any]) -> str:
    """`95 % 36 to 110`: Fieller's interval."""
    return f"95 % {signed(100 * gap['low'], 0)} to {signed(100 * gap['high'], 0)}"


def signed_distance(pair: dict[Any, Any]) -> str:
    """`0.12 points below (95 % -0.43 to 0.20)`."""
    return distance(pair) + (f" (95 % {ends(pair)})" if ends(pair) else "")


def digits_of(pair: dict[Any, Any]) -> int:
    """Digits after the point of a difference in points: those of its own interval."""
    return point_digits(pair["low"], pair["high"])


def point_digits(low: float, high: float) -> int:
    """Digits after the point of accuracies in per cent: two of the half-width of the interval count, 1 to 2."""
    half = 50 * (high - low)
    return int(np.clip(1 - np.floor(np.log10(half)), 1, 2)) if half > 0 else 2


def signed(value: float, digits: int) -> str:
    """Return a number with the given digits after the point, and no `-0.0`."""
    return f"{round(value, digits) + 0.0:,.{digits}f}"


def plus(value: float, digits: int) -> str:
    """Return a difference with its sign, `+0.14`; one that is rounded to zero has none, `0.00`."""
    return ("+" if round(value, digits) > 0 else "") + signed(value, digits)


def p_value(p: float) -> str:
    """`0.002`, `< 0.001`: never 0; a dash where nothing was tested."""
    return "-" if np.isnan(p) else "< 0.001" if p < 0.001 else f"{p:.3f}"


class Pair(dict[Any, Any]):
    """A row of `statistics.differences`, and its arms in words."""

    def __init__(self, row: dict[Any, Any], variants: dict[str, str]) -> None:
        super().__init__(row)
        self.names = names(row, variants)

    def full(self) -> str:
        """`with no positions, FAVOR+ is 1.9 points below softmax (95 % 0.7 to 3.1, 8 seeds)`, and the verdict where it
        is more than worse or better."""
        said = self.within() + told(self | {"arm": self.names.arm, "against": self.names.against})
        plain = not self["n"] or (self["verdict"] in (BETTER, WORSE) and judged(self) == self["verdict"])
        return said if plain else f"{said}: {judged(self)}"

    def within(self) -> str:
        """Return the switches that both arms have, as the beginning of a sentence."""
        return f"with {self.names.shared}, " if self.names.shared else ""

    def points(self) -> str:
        """`-1.18 points, 95 % -2.01 to -0.35`: the arm minus the other."""
        if not self["n"]:
            return "no common seed"
        digits = digits_of(self)
        low, high = (signed(100 * self[name], digits) for name in ("all_low", "all_high"))
        interval = counted(self["n"], "seed") if np.isnan(self["all_low"]) else f"95 % {low} to {high}"
        small = self["verdict"] in (BETTER, WORSE) and self["p_equivalent"] < ALPHA
        less = f", by less than {margin_of(self)}" if small else ""
        return f"{plus(100 * self['difference'], digits)} points, {interval}{less}"
