"""What a forest plot shows: every paired difference in accuracy, with its interval and its verdict."""

from __future__ import annotations

import pandas as pd

from erpe.report.labels import label, names
from erpe.report.pairing import KEY, KINDS
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
        A row a pair: `study`, `dataset`, `arm`, `against_study`, `against`, `kind`, `family`, `label` (`ReLU + RoPE (no
        positions)`), `against_label`, `name` (`ReLU + RoPE`, where the family is told), `shared` (`no positions`, the
        switches of both), `points` (arm minus against), `low`, `high` (simultaneous 95 % interval for new seeds),
        `images_low`, `images_high` (for new images too), `margin` (points), `verdict`, `preliminary`, `n`.
    """
    variants = dict(zip(arms["arm"], arms["variant"], strict=True))
    table = differences[differences["measure"] == ACCURACY]
    order = {kind: place for place, kind in enumerate(KINDS)}
    table = table.iloc[table["kind"].map(order).argsort(kind="stable")]
    called = [names(pair, variants) for pair in table.to_dict("records")]
    labels = {arm: label(arm, variant) for arm, variant in variants.items()}
    found = table.assign(
        label=table["arm"].map(labels), against_label=table["against"].map(labels), name=[pair.arm for pair in called],
        shared=[pair.shared for pair in called], **{new: 100 * table[old] for old, new in COLUMNS.items()},
    )  # fmt: skip
    wanted = [*KEY, "against_study", "against", "kind", "family", "label", "against_label", "name", "shared"]
    return found[[*wanted, *COLUMNS.values(), "verdict", "preliminary", "n"]].reset_index(drop=True)
