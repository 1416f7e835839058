"""What a forest plot shows: every paired difference in accuracy, with its interval and its verdict."""

from __future__ import annotations

import pandas as pd

from erpe.report.labels import label
from erpe.report.pairing import KEY, KINDS, arm_keys
from erpe.report.statistics import ACCURACY

COLUMNS = {
    "difference": "points", "all_low": "low", "all_high": "high", "images_low": "images_low",
    "images_high": "images_high", "margin": "margin",
}  # fmt: skip
"""Of `statistics.differences` -> of `forest`; in points of accuracy."""


def forest(arms: pd.DataFrame, differences: pd.DataFrame) -> pd.DataFrame:
    """Return the differences that tests are about, grouped by family, the gaps first.

    Args:
        arms: of `Outcomes`.
        differences: of `statistics.differences`.
    Returns:
        A row a pair: `study`, `dataset`, `arm`, `against_study`, `against`, `kind`, `family`, `label` (`ReLU + RoPE`),
        `against_label`, `points` (arm minus against), `low`, `high` (simultaneous 95 % interval for new seeds),
        `images_low`, `images_high` (for new images too), `margin` (points), `verdict`, `preliminary`, `n`.
    """
    variants = dict(zip(arm_keys(arms), arms["variant"], strict=True))
    by_name = dict(zip(arms["arm"], arms["variant"], strict=True))
    table = differences[differences["measure"] == ACCURACY]
    order = {kind: place for place, kind in enumerate(KINDS)}
    table = table.iloc[table["kind"].map(order).argsort(kind="stable")]
    names = [label(key[2], variants[key]) for key in arm_keys(table)]
    others = [label(name, by_name.get(name, name.partition("-")[0])) for name in table["against"]]
    found = table.assign(label=names, against_label=others, **{new: 100 * table[old] for old, new in COLUMNS.items()})
    wanted = [*KEY, "against_study", "against", "kind", "family", "label", "against_label", *COLUMNS.values()]
    return found[[*wanted, "verdict", "preliminary", "n"]].reset_index(drop=True)
