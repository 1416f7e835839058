"""Ranges as data, and how Optuna draws from them.

config = sample(trial, space, base)           # always a valid TrialConfig
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Any, Self

from pydantic import PlainValidator, PositiveInt, model_validator

from erpe.config import TrialConfig
from erpe.errors import ConfigError
from erpe.settings import Config

if TYPE_CHECKING:
    import optuna


MOST_VALUES = 100_000
"""Of a range of whole numbers, and combinations of sizes: each is looked at before a search."""


def _scalar(given: Any) -> Any:
    if isinstance(given, bool | int | str | None) or (isinstance(given, float) and math.isfinite(given)):
        return given
    raise ConfigError(f"{str(given)[:100]} given; use a finite number, text, true or false instead")


Scalar = Annotated[
    bool | int | float | str | None, PlainValidator(_scalar, json_schema_input_type=bool | int | float | str | None)
]
"""A value as a file has it, of whatever type."""


class Floats(Config):
    """A range of real numbers."""

    low: float
    high: float
    log: bool = False
    """Uniform in the logarithm."""

    @model_validator(mode="after")
    def _makes_sense(self) -> Self:
        if self.low > self.high:
            raise ConfigError(f"low {self.low:g} is above high {self.high:g}")
        if self.log and self.low <= 0:
            raise ConfigError(f"a log range starts above 0, not at {self.low:g}")
        return self

    def probes(self) -> tuple[float, ...]:
        """Values that stand for the range when it is checked."""
        return self.low, self.high

    def suggest(self, trial: optuna.Trial, name: str) -> float:
        """Ask Optuna for a value."""
        return trial.suggest_float(name, self.low, self.high, log=self.log)


class Ints(Config):
    """A range of whole numbers, both ends included."""

    low: int
    high: int
    step: PositiveInt = 1

    @model_validator(mode="after")
    def _makes_sense(self) -> Self:
        if self.low > self.high:
            raise ConfigError(f"low {self.low} is above high {self.high}")
        if (self.high - self.low) // self.step > MOST_VALUES:
            raise ConfigError(
                f"more than {MOST_VALUES} whole numbers from {self.low} to {self.high}; use a larger step"
            )
        if (self.high - self.low) % self.step:
            raise ConfigError(f"steps of {self.step} from {self.low} do not end at {self.high}")
        return self

    def probes(self) -> tuple[int, ...]:
        """Every value."""
        return tuple(range(self.low, self.high + 1, self.step))

    def suggest(self, trial: optuna.Trial, name: str) -> int:
        """Ask Optuna for a value."""
        return trial.suggest_int(name, self.low, self.high, step=self.step)


class Choices(Config):
    """A few values; a single one is fixed and never asked of Optuna."""

    values: tuple[Scalar, ...]

    @model_validator(mode="after")
    def _makes_sense(self) -> Self:
        if not self.values:
            raise ConfigError("no value to choose from")
        if len({repr(value) for value in self.values}) < len(self.values):
            raise ConfigError(f"a value is there twice in {list(self.values)}")
        return self

    def probes(self) -> tuple[Any, ...]:
        """Every value."""
        return self.values

    def suggest(self, trial: optuna.Trial, name: str) -> Any:
        """Ask Optuna for a value."""
        return self.values[0] if len(self.values) == 1 else trial.suggest_categorical(name, self.values)


Axis = Floats | Ints | Choices


class Space(Config):
    """What the search varies, and what it fixes away from the defaults."""

    axes: dict[str, Axis]
    """Dotted name of a setting of TrialConfig -> its range."""

    def active(self, chosen: dict[str, Any]) -> list[str]:
        """Return the axes that mean something, given the values chosen for the others, in the order of sampling."""
        projection = chosen.get("model.relu_projection")
        return [name for name in self.axes if name != "model.features" or projection != "none"]


def sample(trial: optuna.Trial, space: Space, base: TrialConfig) -> TrialConfig:
    """Draw one configuration; a conditional axis is asked for only where it means something.

    Raises:
        ConfigError: a sample does not fit, which `check_together` rules out.
    """
    chosen: dict[str, Any] = {}
    for name in ("model.relu_projection", *space.axes):
        if name in space.axes and name not in chosen and name in space.active(chosen):
            chosen[name] = space.axes[name].suggest(trial, name)
    return base.replace(chosen)


def drawn(space: Space, base: TrialConfig, count: int, seed: int) -> list[TrialConfig]:
    """Return random configurations, as a search draws them, without a study."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
    return [sample(study.ask(), space, base) for _ in range(count)]


def default_point(space: Space, base: TrialConfig) -> dict[str, Any]:
    """Return the base configuration as parameters of Optuna, where it lies inside the space."""
    flat = base.flat()
    chosen = {name: flat[name] for name in space.axes}
    return {
        name: flat[name]
        for name in space.active(chosen)
        if inside(space.axes[name], flat[name]) and len(space.axes[name].probes()) > 1
    }


def typical(space: Space, base: TrialConfig) -> TrialConfig:
    """Return the base configuration; a setting that lies outside its range has the value of the range that is nearest.

    What a study costs is said of this one before any is drawn.
    """
    flat = base.flat()
    chosen = {name: _nearest(axis, flat[name]) for name, axis in space.axes.items()}
    return base.replace({name: chosen[name] for name in space.active(chosen)})


def _nearest(axis: Axis, value: Any) -> Any:
    if inside(axis, value):
        return value
    numbers = [probe for probe in axis.probes() if isinstance(probe, int | float) and not isinstance(probe, bool)]
    if isinstance(value, int | float) and numbers:
        return min(numbers, key=lambda probe: abs(probe - value))
    return axis.probes()[0]


def inside(axis: Axis, value: Any) -> bool:
    """Whether a range can draw a value."""
    if isinstance(axis, Floats):
        return isinstance(value, int | float) and axis.low <= value <= axis.high
    return value in axis.probes()
