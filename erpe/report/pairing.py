"""Which arms are compared: runs of one version, arms of one data set, seed by seed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pandas as pd

from erpe.errors import StudyError
from erpe.report.outcomes import Outcomes

KEY = ["study", "dataset", "arm"]
"""What names an arm."""
PAIR = [*KEY, "against_study", "against", "kind", "family", "preliminary"]
"""What names a comparison; see `pairs`."""
KINDS = {
    "gap": "linear attention against softmax",
    "encoding": "each encoding against none",
    "softmax": "linear attention with an encoding against softmax",
    "replacement": "an encoding instead of learned positions",
    "switch": "one switch changed",
    "study": "against the same arm of another study",
}
"""What is compared, the question first: `gap`, a linear attention without encoding against softmax; `encoding`, an
encoding against the same attention without one; `softmax`, a linear attention with an encoding against plain softmax;
`replacement`, an encoding without absolute positions against learned positions without an encoding; in all four the
other switches are equal. `switch`, two arms of one variant that differ in a single switch; `study`, an arm against the
arm of its name in another study."""
NO_POSITIONS = frozenset({"position_none", "positionnone"})
LEARNED_POSITIONS = frozenset({"learned", "position_learned", "positionlearned"})
"""How arms' names tell of `model.position`."""
NO_RUNS = pd.DataFrame()


def reference_version(runs: pd.DataFrame) -> str:
    """Return the version of erpe that most runs were logged by; of several, the latest name."""
    counts = runs["version"].value_counts()
    return str(max(counts[counts == counts.max()].index))


def sound_runs(outcomes: Outcomes) -> pd.DataFrame:
    """Return the runs that may be compared: of one version, and one a seed, the first where there are two."""
    runs = outcomes.runs
    if runs.empty:
        return runs
    return runs[runs["version"] == reference_version(runs)].drop_duplicates([*KEY, "seed"])


def arm_keys(arms: pd.DataFrame) -> Iterator[tuple[str, str, str]]:
    """(study, data set, arm) of each arm."""
    return arms[KEY].itertuples(index=False, name=None)


def by_arm(runs: pd.DataFrame) -> dict[tuple[str, str, str], pd.DataFrame]:
    """(study, data set, arm) -> its runs, by seed."""
    return dict(list(runs.set_index("seed").sort_index().groupby(KEY, sort=False))) if len(runs) else {}


def switches(arm: str, variant: str) -> frozenset[str]:
    """Return the switches in an arm's name: `{post, patch2}` of `relu_rope-post-patch2`."""
    return frozenset(filter(None, arm.removeprefix(variant).split("-")))


Named = dict[tuple[str, str, str], list[str]]
"""(study, data set, variant) -> its arms, in the order of the study."""


def named(arms: pd.DataFrame) -> Named:
    """Return the arms of each variant, to look partners up in."""
    found: Named = {}
    for study, dataset, variant, arm in zip(*(arms[name] for name in (*KEY[:2], "variant", "arm")), strict=True):
        found.setdefault((study, dataset, variant), []).append(arm)
    return found


def partner(arms: Named, arm: Any, variant: str) -> str | None:
    """Return the arm of another variant that differs in nothing but the variant; the switches it knows are equal.

    `relu_rope-post-patch2` has `relu-patch2`, since only rotations have a placement. None: there is none.
    """
    return _fitting(arms, arm, variant, switches(arm.arm, arm.variant))


def with_learned_positions(arms: Named, arm: Any) -> str | None:
    """Of an encoding without absolute positions: the same attention with learned positions and without the encoding.

    `relu_rope-position_none` has `relu-learned`. None: there is none, or the arm is none of these.
    """
    own = switches(arm.arm, arm.variant)
    without, learned = own & NO_POSITIONS, LEARNED_POSITIONS
    if arm.encoding == "none" or not without:
        return None
    found = _fitting(arms, arm, arm.attention, own - without | learned)
    return found if found is not None and switches(found, arm.attention) & learned else None


def _fitting(arms: Named, arm: Any, variant: str, own: frozenset[str]) -> str | None:
    """Return the arm of a variant that has most of these switches, and no other."""
    here = arms.get((arm.study, arm.dataset, variant), [])
    fitting = [name for name in here if switches(name, variant) <= own]
    return max(fitting, key=lambda name: len(switches(name, variant)), default=None)


def pairs(arms: pd.DataFrame, against: str | None = None) -> pd.DataFrame:
    """Which arm is compared with which, and in which family: always of one study and data set, unless another study is
    named. See `KINDS`.

    A family is one kind and one combination of switches, so the question fixes it and not the command.

    Returns:
        `study`, `dataset`, `arm`, `against_study`, `against`, `kind`, `family`, and `preliminary`: one of both is
        unfinished.
    Raises:
        StudyError: `against` is no study here, or shares no data set or no arm with the others.
    """
    finished = dict(zip(arm_keys(arms), arms["finished"].astype(bool), strict=True))
    variants = dict(zip(arm_keys(arms), arms["variant"], strict=True))
    known, rows = named(arms), []
    for arm in arms.itertuples(index=False):
        here = (arm.study, arm.dataset)
        for kind, study, other in _wanted(known, arm, against):
            key = (study, arm.dataset, other)
            if other is not None and key in finished:
                whole = finished[(*here, arm.arm)] and finished[key]
                family = _family(kind, switches(arm.arm, arm.variant), switches(other, variants[key]))
                rows.append((*here, arm.arm, study, other, kind, family, not whole))
    found = pd.DataFrame(rows, columns=PAIR)
    if against is not None and not (found["kind"] == "study").any():
        raise StudyError(_why_apart(arms, against))
    return found


def _wanted(arms: Named, arm: Any, against: str | None) -> Iterator[tuple[str, str, str | None]]:
    """Kind, study and name of every arm that one is compared with."""
    if arm.encoding != "none":
        yield "encoding", arm.study, partner(arms, arm, arm.attention)
        yield "replacement", arm.study, with_learned_positions(arms, arm)
    if arm.attention != "softmax":
        yield "gap" if arm.encoding == "none" else "softmax", arm.study, partner(arms, arm, "softmax")
    for other in _neighbours(arms, arm):
        yield "switch", arm.study, other
    if against not in (None, arm.study):
        yield "study", str(against), arm.arm


def _family(kind: str, own: frozenset[str], other: frozenset[str]) -> str:
    """`gap`, `encoding of patch2`, `switch position_none for learned`."""
    if kind == "switch":
        new, old = (", ".join(sorted(names)) or "the default" for names in (own - other, other - own))
        return f"{kind} {new} for {old}"
    of = "" if kind == "study" else ", ".join(sorted(other))
    return f"{kind} of {of}" if of else kind


def _neighbours(arms: Named, arm: Any) -> list[str]:
    """Return the arms above it, of its variant, that differ from it in one switch."""
    names = arms[arm.study, arm.dataset, arm.variant]
    own = switches(arm.arm, arm.variant)
    return [
        name
        for name in names[: names.index(arm.arm)]
        if max(len(own - switches(name, arm.variant)), len(switches(name, arm.variant) - own)) == 1
    ]


def _why_apart(arms: pd.DataFrame, against: str) -> str:
    datasets = arms.groupby("study", sort=False)["dataset"].unique()
    if against not in datasets:
        return f"{against} is none of the studies here: {', '.join(datasets.index)}"
    if len(datasets) == 1:
        return f"{against} is the only study here: there is nothing to compare it with"
    sets = {study: ", ".join(names) for study, names in datasets.items()}
    if any(set(names) & set(datasets[against]) for study, names in datasets.items() if study != against):
        return f"{against} shares no arm with the other studies of its data set: nothing to compare"
    each = " and ".join(f"{study} ({names})" for study, names in sets.items())
    return f"{each} share no data set: they cannot be compared with each other"


def common(runs: dict[tuple[str, str, str], pd.DataFrame], pair: dict) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the runs of both arms of a pair, over the seeds both have, in the same order."""
    first = runs.get((pair["study"], pair["dataset"], pair["arm"]), NO_RUNS)
    second = runs.get((pair["against_study"], pair["dataset"], pair["against"]), NO_RUNS)
    if first.index.equals(second.index):
        return first, second
    seeds = first.index.intersection(second.index).sort_values()
    return first.loc[seeds], second.loc[seeds]
