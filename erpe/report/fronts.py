"""The Pareto front of each arm's search, where several objectives are sought."""

from __future__ import annotations

import pandas as pd

from erpe.report.outcomes import Outcomes, goals_of
from erpe.report.pairing import KEY, arm_keys


def fronts(outcomes: Outcomes) -> pd.DataFrame:
    """`study`, `dataset`, `arm`, `number` (of a trial), `objective`, `value`: of the trials of an arm that no other
    one of it dominates, the best by the first objective first. Empty where one objective is sought.
    """
    rows = []
    for study, dataset, arm in arm_keys(outcomes.arms):
        goals = goals_of(outcomes.arms[outcomes.arms["study"] == study])
        found = _ended(outcomes, study, arm, goals.objectives) if goals.several and len(outcomes.trials) else {}
        for number, values in goals.unbeaten(found).items():
            rows += [(study, dataset, arm, number, *each) for each in values.items()]
    return pd.DataFrame(rows, columns=[*KEY, "number", "objective", "value"])


def _ended(outcomes: Outcomes, study: str, arm: str, objectives: tuple[str, ...]) -> dict[int, dict[str, float]]:
    """Number of a complete trial within the limits -> its objectives, the best first."""
    trials = outcomes.trials
    own = trials[(trials["study"] == study) & (trials["arm"] == arm) & (trials["state"] == "COMPLETE")]
    own = own.dropna(subset="value").sort_values(["value", "number"], ascending=[False, True])
    known = own.reindex(columns=["number", *objectives]).dropna()
    return {int(row["number"]): {name: float(row[name]) for name in objectives} for row in known.to_dict("records")}
