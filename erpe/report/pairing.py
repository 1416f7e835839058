"""Who is compared with whom: runs of one version, arms of one data set, seed by seed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pandas as pd

from erpe.errors import StudyError
from erpe.report.outcomes import Outcomes

KEY = ["study", "dataset", "arm"]
"""What names an arm."""
PAIR = [*KEY, "against_study", "against", "kind", "preliminary"]
"""What names a comparison; see `pairs`."""


def reference_version(runs: pd.DataFrame) -> str:
    """The version of erpe that most runs were logged by; of several, the latest name."""
    counts = runs["version"].value_counts()
    return str(max(counts[counts == counts.max()].index))


def sound_runs(outcomes: Outcomes) -> pd.DataFrame:
    """The runs that may be compared: of one version, and one a seed (the first, where a seed was confirmed twice)."""
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
    """The switches in an arm's name: `{post, patch2}` of `relu_rope-post-patch2`."""
    return frozenset(filter(None, arm.removeprefix(variant).split("-")))


def partner(arms: pd.DataFrame, arm: Any, variant: str) -> str | None:
    """The arm of another variant that differs in nothing but the variant; the switches it knows are equal.

    `relu_rope-post-patch2` has `relu-patch2`, since only rotations have a placement. None: there is none.
    """
    here = arms[(arms["study"] == arm.study) & (arms["dataset"] == arm.dataset) & (arms["variant"] == variant)]
    own = switches(arm.arm, arm.variant)
    fitting = [name for name in here["arm"] if switches(name, variant) <= own]
    return max(fitting, key=lambda name: len(switches(name, variant)), default=None)


def pairs(arms: pd.DataFrame, against: str | None = None) -> pd.DataFrame:
    """Which arm is compared with which: always of one study and data set, unless another study is named.

    Kinds: `baseline`, an encoding against its own attention without one, the switches being equal; `softmax`, a linear
    attention against plain softmax, the switches being equal; `switch`, two arms of one variant that differ in a
    single switch; `study`, an arm against the arm of its name in the study `against`.

    Returns:
        `study`, `dataset`, `arm`, `against_study`, `against`, `kind`, and `preliminary`: one of both is unfinished.
    Raises:
        StudyError: `against` is no study here, or shares no data set or no arm with the others.
    """
    finished = dict(zip(arm_keys(arms), arms["finished"].astype(bool), strict=True))
    rows = []
    for arm in arms.itertuples(index=False):
        here = (arm.study, arm.dataset)
        wanted: list[tuple[str, str, str | None, str]] = []
        if arm.encoding != "none":
            wanted.append((*here, partner(arms, arm, arm.attention), "baseline"))
        if arm.attention != "softmax":
            wanted.append((*here, partner(arms, arm, "softmax"), "softmax"))
        wanted += [(*here, other, "switch") for other in _neighbours(arms, arm)]
        if against not in (None, arm.study):
            wanted.append((against, arm.dataset, arm.arm, "study"))
        for study, dataset, other, kind in wanted:
            if other is not None and (study, dataset, other) in finished:
                whole = finished[(*here, arm.arm)] and finished[(study, dataset, other)]
                rows.append((*here, arm.arm, study, other, kind, not whole))
    found = pd.DataFrame(rows, columns=PAIR)
    if against is not None and not (found["kind"] == "study").any():
        raise StudyError(_why_apart(arms, against))
    return found


def _neighbours(arms: pd.DataFrame, arm: Any) -> list[str]:
    """The arms above it, of its variant, that differ from it in one switch."""
    same = (arms["study"] == arm.study) & (arms["dataset"] == arm.dataset) & (arms["variant"] == arm.variant)
    names = list(arms.loc[same, "arm"])
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
    """The runs of both arms of a pair, over the seeds both have, in the same order."""
    first = runs.get((pair["study"], pair["dataset"], pair["arm"]), pd.DataFrame())
    second = runs.get((pair["against_study"], pair["dataset"], pair["against"]), pd.DataFrame())
    if first.index.equals(second.index):
        return first, second
    seeds = first.index.intersection(second.index).sort_values()
    return first.loc[seeds], second.loc[seeds]
