"""Which differences are real and which are noise, a plain sentence each."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from erpe.report.gaps import FEWEST_RESAMPLED
from erpe.report.pairing import KEY
from erpe.report.statistics import ALPHA

MEASURE = "test/accuracy"
"""What verdicts are about."""
COLUMNS = [*KEY, "against", "kind", "measure", "verdict", "text"]
VERDICTS = ("real", "noise", "preliminary", "untested")
"""Real: p below 0.05 after Holm's correction. Noise: not told apart from it. Preliminary: tested, but an arm is
unfinished. Untested: fewer than two common seeds, or nothing to test against, as a gap that is reversed."""


GAPS = {
    "noise": "is not told apart from 0", "reversed": "is reversed",
    "untested": "could not be tested, being the same on every seed or of one seed",
}  # fmt: skip
"""What is the matter with a gap that is not real."""


def verdicts(arms: pd.DataFrame, differences: pd.DataFrame, gaps: pd.DataFrame) -> pd.DataFrame:
    """A sentence for every unfinished arm, every pair and every gap.

    Args:
        arms: of `Outcomes`.
        differences: of `statistics.differences`.
        gaps: of `gaps.gap_closed`.
    Returns:
        `study`, `dataset`, `arm`, `against`, `kind` (that of the pair, `gap` or `unfinished`), `measure`, `verdict`
        (one of `VERDICTS`), `text`.
    """
    rows = []
    for arm in arms[~arms["finished"].astype(bool)].to_dict("records"):
        rows.append(_row(arm, "", "unfinished", "untested", _unfinished(arm)))
    for pair in differences[differences["measure"] == MEASURE].to_dict("records"):
        rows.append(_row(pair, pair["against"], pair["kind"], of_pair(pair), f"{_pair(pair)}: {_judged(pair)}"))
    gains = {(*(row[name] for name in KEY), row["against"]): row["verdict"] for row in rows}
    for gap in gaps.to_dict("records"):
        gain = gains[*(gap[name] for name in KEY), gap["baseline"]]
        rows.append(_row(gap, gap["baseline"], "gap", of_gap(gap, gain), _gap(gap, gain)))
    return pd.DataFrame(rows, columns=COLUMNS)


def _row(of: dict[Any, Any], against: str, kind: str, verdict: str, text: str) -> dict[str, str]:
    where = {name: of[name] for name in KEY}
    return where | {"against": against, "kind": kind, "measure": MEASURE, "verdict": verdict, "text": text}


def of_pair(pair: dict[Any, Any]) -> str:
    """The verdict on a row of `differences`."""
    if np.isnan(pair["p_holm"]):
        return "untested"
    if pair["preliminary"]:
        return "preliminary"
    return "real" if pair["p_holm"] < ALPHA else "noise"


def of_gap(gap: dict[Any, Any], gain: str) -> str:
    """The verdict on a row of `gap_closed`; `gain` is that on the arm against its baseline. Both p are corrected."""
    if gap["n"] < 2 or gap["gap_is"] in ("untested", "reversed"):
        return "untested"
    if gap["preliminary"]:
        return "preliminary"
    return gain if gap["gap_is"] == "real" else "noise"


def _unfinished(arm: dict[Any, Any]) -> str:
    return f"{arm['arm']} is unfinished: {int(arm['seeds'])} of {int(arm['seeds_planned'])} seeds are confirmed"


def _pair(pair: dict[Any, Any]) -> str:
    """`relu_general is 2.9 points above relu (95 % 2.1 to 3.7, p = 0.002 after Holm, n = 5)`."""
    against = pair["against"]
    if pair["against_study"] != pair["study"]:
        against = f"{against} of {pair['against_study']}"
    if not pair["n"]:
        return f"{pair['arm']} and {against} have no seed in common"
    digits = point_digits(pair["low"], pair["high"])
    size, place = abs(100 * pair["difference"]), "above" if pair["difference"] > 0 else "below"
    found = f"{size:.{digits}f} points {place}" if pair["difference"] else "level with"
    facts = [_interval(pair["low"], pair["high"], digits), _p(pair["p_holm"]), f"n = {pair['n']}"]
    return f"{pair['arm']} is {found} {against} ({', '.join(fact for fact in facts if fact)})"


def _judged(pair: dict[Any, Any]) -> str:
    verdict, so_far = of_pair(pair), "real" if pair["p_holm"] < ALPHA else "not told apart from noise"
    if verdict == "preliminary":
        return f"preliminary, an arm is unfinished; so far {so_far}"
    if verdict != "untested":
        return so_far
    return (
        "one seed tells nothing"
        if pair["n"] == 1
        else "nothing to test" + (", the difference is the same on every seed" if pair["n"] else "")
    )


def _gap(gap: dict[Any, Any], gain: str) -> str:
    """`relu_general closes 76 % of the gap from relu to softmax (95 % 36 to 110, n = 5)`, or why it means little."""
    arm, between = gap["arm"], f"the gap from {gap['baseline']} to {gap['softmax']}"
    if gap["n"] < 2:
        return f"the part of {between} that {arm} closes needs at least two seeds that all three have"
    after = "; preliminary, an arm is unfinished" if gap["preliminary"] else ""
    if gap["gap_is"] != "real":
        digits = point_digits(gap["gap_low"], gap["gap_high"])
        size = f"{100 * gap['gap']:.{digits}f} points"
        interval = _interval(gap["gap_low"], gap["gap_high"], digits)
        facts = ", ".join(fact for fact in (size, interval, _p(gap["gap_p"]), f"n = {gap['gap_n']}") if fact)
        return f"{between} ({facts}) {GAPS[gap['gap_is']]}, so the part of it that {arm} closes means little{after}"
    if np.isnan(gap["low"]):
        interval = f"no interval below {FEWEST_RESAMPLED} seeds, " if gap["n"] < FEWEST_RESAMPLED else "no interval, "
    else:
        interval = f"95 % {100 * gap['low']:.0f} to {100 * gap['high']:.0f}, "
    unsure = {"noise": "may be noise", "untested": "could not be tested"}.get(gain)
    told = f", but its gain over {gap['baseline']} {unsure}" if unsure else ""
    return f"{arm} closes {100 * gap['closed']:.0f} % of {between} ({interval}n = {gap['n']}){told}{after}"


def point_digits(low: float, high: float) -> int:
    """Digits after the point of accuracies in per cent: two of the half-width of the interval count, 1 to 3."""
    half = 50 * (high - low)
    return int(np.clip(1 - np.floor(np.log10(half)), 1, 3)) if half > 0 else 2


def _interval(low: float, high: float, digits: int) -> str:
    return "" if np.isnan(low) else f"95 % {signed(100 * low, digits)} to {signed(100 * high, digits)}"


def signed(value: float, digits: int) -> str:
    """A number with so many digits after the point, and no `-0.0`."""
    return f"{round(value, digits) + 0.0:,.{digits}f}"


def _p(p: float) -> str:
    return "" if np.isnan(p) else f"{p_value(p)} after Holm"


def p_value(p: float) -> str:
    """`p = 0.002`, `p < 0.001`: two digits that count, never 0."""
    if p < 0.001:
        return "p < 0.001"
    return f"p = {p:.2g}" if p < 0.1 else f"p = {p:.2f}"
