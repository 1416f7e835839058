"""What a search seeks, and what a model may cost.

    goals = Goals.of(spec)                  # of a specification, or of its stored form
    goals.values(trial)                     # {"accuracy": 0.97, "flops": 1.2e6}, once all is known
    goals.front(trials)                     # those that no other one dominates

The first objective is how good a model is: it is reported every epoch, pruning compares it, and the best trial has the
most of it. Others are looked at when a trial ends. A cost in closed form is known before a trial begins.
"""

from __future__ import annotations

import math
import tomllib
from collections import Counter
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

from pydantic import BeforeValidator

from erpe.errors import ConfigError, nearest
from erpe.text import number, percent

if TYPE_CHECKING:
    from erpe.config import TrialConfig
    from erpe.study.records import TrialRecord


class Measure(NamedTuple):
    """Something to seek, or to spend."""

    key: str
    """Its name in MLflow."""
    label: str
    """With its unit, for people."""
    sign: int = 1
    """1: the measure itself; -1: its negative."""


MEASURES = {
    "accuracy": Measure("val/accuracy", "validation accuracy"),
    "log_likelihood": Measure("val/loss", "validation log-likelihood, nats an image", -1),
    "flops": Measure("flops/forward", "FLOPs, forward, an image"),
    "params": Measure("params", "parameters"),
    "inference_ms": Measure("time/inference_ms_per_image", "inference, ms an image"),
}
QUALITIES, CLOSED = ("accuracy", "log_likelihood"), ("flops", "params")
COSTS = (*CLOSED, "inference_ms")
"""Less of them is better, whereas of qualities more is."""


def read_objective(given: Any) -> str:
    """Return objectives as `accuracy,flops`, given so or as a list.

    Raises:
        ConfigError: one is unknown or there twice, or the first is a cost.
    """
    names = [str(each).strip() for each in (given if isinstance(given, list | tuple) else str(given).split(","))]
    for name in names:
        if name not in MEASURES:
            raise ConfigError(f"unknown objective {name[:100]!r}; {nearest(name, MEASURES)}")
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise ConfigError(f"{twice[0]} is there twice in {','.join(names)}")
    if names[0] not in QUALITIES:
        raise ConfigError(
            f"{','.join(names)} given; the first is accuracy or log_likelihood, as accuracy,{names[0]}; "
            f"to limit a cost use at_most instead"
        )
    return ",".join(names)


def read_limits(given: Any) -> Any:
    """Return what a model may cost: `{"flops": 2e7}`, given so or as `flops=2e7,params=500000`.

    Raises:
        ConfigError: an unknown cost, or no positive number.
    """
    if isinstance(given, str) and "=" in given:
        try:
            given = tomllib.loads(given.replace(",", "\n"))
        except tomllib.TOMLDecodeError:
            raise ConfigError(f"{given[:100]!r} given; use a number for each cost, as flops=20e6, instead") from None
    if not isinstance(given, dict):
        raise ConfigError(f"{str(given)[:100]!r} given; use a table instead, as {{flops = 20e6}}")
    for name, value in given.items():
        if name not in COSTS:
            raise ConfigError(f"unknown cost {str(name)[:100]!r}; {nearest(str(name), COSTS)}")
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise ConfigError(f"{name}: {str(value)[:100]} given; use a number above 0 instead")
    return {name: float(given[name]) for name in COSTS if name in given}


Objective = Annotated[str, BeforeValidator(read_objective)]
Limits = Annotated[dict[str, float], BeforeValidator(read_limits)]


class Goals(NamedTuple):
    """What a study seeks."""

    objectives: tuple[str, ...] = ("accuracy",)
    at_most: dict[str, float] = {}  # noqa: RUF012  never changed

    @classmethod
    def of(cls, spec: Any) -> Goals:
        """Of a `StudySpec`, of the `[search]` of a study file, of one of them as stored, or of `tags`."""
        stored = spec if isinstance(spec, dict) else spec.model_dump(include={"objective", "at_most"})
        return cls(tuple(stored.get("objective", "accuracy").split(",")), read_limits(stored.get("at_most", {})))

    @property
    def several(self) -> bool:
        """Whether there is a front."""
        return len(self.objectives) > 1

    @property
    def directions(self) -> list[Literal["maximize", "minimize"]]:
        """Optuna's."""
        return ["maximize" if name in QUALITIES else "minimize" for name in self.objectives]

    @property
    def timed(self) -> bool:
        """Whether trials take the time of inference."""
        return "inference_ms" in (*self.objectives, *self.at_most)

    @property
    def tags(self) -> dict[str, str]:
        """Of MLflow, and columns of the report: `flops=20000000,inference_ms=0.2`; none if nothing is set."""
        limits = ",".join(f"{name}={most:.12g}" for name, most in self.at_most.items())
        said = {"objective": ",".join(self.objectives), "at_most": limits}
        return {name: text for name, text in said.items() if text not in ("accuracy", "")}

    @property
    def limits(self) -> str:
        """`flops 20,000,000, inference_ms 0.2`."""
        return ", ".join(f"{name} {number(most)}" for name, most in self.at_most.items())

    def reported(self, phase: str) -> tuple[int, str]:
        """Return the measure that is the value of an epoch, and the sign that makes more of it better."""
        first = MEASURES[self.objectives[0]]
        return (first.sign, first.key) if phase == "search" else (-1, "train/loss")

    def closed_costs(self, config: TrialConfig) -> dict[str, float]:
        """Those costs that matter here and are known before a trial begins."""
        from erpe.model.flops import forward_flops
        from erpe.model.vit import parameter_count

        known = {"flops": forward_flops, "params": parameter_count}
        return {name: float(known[name](config.model)) for name in CLOSED if name in (*self.objectives, *self.at_most)}

    def measured(self, name: str, trial: TrialRecord) -> float | None:
        """Return what a trial has of a measure; None: it is not known (yet), or no number."""
        if name == self.objectives[0]:
            return trial.value
        measure, metrics = MEASURES[name], trial.verdict.metrics if trial.verdict else {}
        found = trial.costs.get(name, metrics.get(measure.key))
        return measure.sign * found if found is not None and math.isfinite(found) else None

    def values(self, trial: TrialRecord) -> dict[str, float]:
        """Return the objectives of a trial, as far as they are known."""
        found = {name: self.measured(name, trial) for name in self.objectives}
        return {name: value for name, value in found.items() if value is not None}

    def lacks(self, trial: TrialRecord) -> str:
        """Return the key of a measure that a trial has not, though the study needs it; or nothing."""
        needed = dict.fromkeys((*self.objectives, *self.at_most))
        return next((MEASURES[name].key for name in needed if self.measured(name, trial) is None), "")

    def excess(self, costs: dict[str, float | None]) -> dict[str, float]:
        """Return by how much of itself each limit is exceeded; 0 or less: it is kept. Optuna's constraints."""
        return {name: cost / self.at_most[name] - 1 for name, cost in costs.items() if cost and name in self.at_most}

    def over(self, costs: dict[str, float | None]) -> str:
        """Return which limits are exceeded: `inference_ms 0.31, above 0.2`; or nothing."""
        over = [name for name, part in self.excess(costs).items() if part > 0]
        return "; ".join(f"{name} {number(costs[name] or 0)}, above {number(self.at_most[name])}" for name in over)

    def spent(self, trial: TrialRecord) -> dict[str, float | None]:
        """Return what a trial cost of all that is limited."""
        return {name: self.measured(name, trial) for name in self.at_most}

    def eligible(self, trials: list[TrialRecord]) -> list[TrialRecord]:
        """Return the complete trials within the limits, the best first; of equals the first."""
        complete = [t for t in trials if t.state == "COMPLETE" and t.value is not None and not self.over(self.spent(t))]
        return sorted(complete, key=lambda trial: (-(trial.value or 0), trial.number))

    def front(self, trials: list[TrialRecord]) -> dict[int, dict[str, float]]:
        """Return those of `eligible` that no other one dominates, each with its objectives; none of one objective."""
        return self.unbeaten({trial.number: self.values(trial) for trial in self.eligible(trials)})

    def unbeaten(self, found: dict[int, dict[str, float]]) -> dict[int, dict[str, float]]:
        """Return those of some trials, all within the limits, that no other one dominates; none of one objective."""
        whole = {n: values for n, values in found.items() if self.several and len(values) == len(self.objectives)}
        gains = {number: self.gains(values) for number, values in whole.items()}
        return {number: whole[number] for number, own in gains.items() if not beaten(own, list(gains.values()))}

    def falls_behind(self, trial: TrialRecord, trials: list[TrialRecord], epoch: int, factor: int) -> bool:
        """Whether successive halving stops a trial at a rung, an epoch that only one of `factor` trials passes.

        A trial counts those that were better at this epoch by the first objective and cost no more in closed form; the
        trials that count the fewest pass. So a small model is never stopped for a larger one alone. With no cost in
        closed form among the objectives that is asynchronous successive halving (ASHA) on the first objective.

        Source: Li et al. 2020 (MLSys), ASHA; Schmucker et al. 2021 (MOASHA), which sorts by dominance, too.
        """
        costs = [name for name in self.objectives if name in CLOSED]
        here = {t.number: t for t in [*trials, trial] if epoch in t.epochs}
        gains = {n: (t.epochs[epoch], *(-t.costs[name] for name in costs)) for n, t in here.items()}
        counts = {n: beaten(own, list(gains.values()), first=True) for n, own in gains.items()}
        return counts[trial.number] > sorted(counts.values())[max(0, len(counts) // factor - 1)]

    def gains(self, values: dict[str, float]) -> tuple[float, ...]:
        """Return objectives as numbers of which more is better."""
        return tuple(value if name in QUALITIES else -value for name, value in values.items())


def beaten(own: tuple[float, ...], all_: list[tuple[float, ...]], first: bool = False) -> int:
    """Return how many dominate: as good in everything, and better in something, or in the first."""
    return sum(
        all(o >= mine for o, mine in zip(other, own, strict=True)) and (other[0] > own[0] if first else other != own)
        for other in all_
    )


def shown(name: str, value: float | None) -> str:
    """Return an objective's value for people."""
    return percent(value) if value is None or name == "accuracy" else number(value)


def drawn_as(name: str) -> tuple[float, str]:
    """Return by what a figure multiplies an objective, and what its axis says."""
    short = {"accuracy": (100.0, "validation accuracy (%)"), "log_likelihood": (1.0, "log-likelihood (nats)")}
    return short.get(name, (1.0, MEASURES[name].label))


def check_limits(spec: Any, draws: int = 200) -> float:
    """Return the share of random draws from a study's space that its limits of closed-form costs allow.

    Raises:
        ConfigError: they allow none; the line says what the cheapest would cost.
    """
    goals = Goals.of(spec)
    limited = [name for name in CLOSED if name in goals.at_most]
    if not limited:
        return 1.0
    from erpe.study.distributions import drawn

    costs = [goals.closed_costs(config) for config in drawn(spec.space, spec.base, draws, spec.seed)]
    allowed = sum(not goals.over(dict(cost)) for cost in costs)
    if not allowed:
        least = {name: number(min(cost[name] for cost in costs)) for name in limited}
        told = ", ".join(f"{name} {cost}" for name, cost in least.items())
        raise ConfigError(
            f"at_most: {goals.limits} given, and none of {len(costs)} draws from the space of {spec.variant} is within "
            f"(least: {told}); use more, or a space of smaller models instead"
        )
    return allowed / len(costs)
