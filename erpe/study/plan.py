"""A study file: what is compared, on which data, with which budget.

plan = load_plan("studies/mnist_nine.toml")
for arm in plan.arms():
    plan.search_spec(arm)              # each arm is searched as a study of its own, with the same budget
"""

from __future__ import annotations

from itertools import product
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BeforeValidator, Field, NonNegativeInt, WithJsonSchema, field_validator, model_validator

from erpe.config import Variant, defaults
from erpe.datasets import AnyDataset, Size, read_grid
from erpe.errors import ConfigError
from erpe.settings import Config
from erpe.study.distributions import Axis, Choices, Scalar, typical
from erpe.study.entries import dotted
from erpe.study.objectives import Limits, Objective
from erpe.study.plan_checks import USE_VARIANTS, beside, mistakes_of
from erpe.study.search_space import apply_overrides, variant_params
from erpe.study.spec import Pruner, Sampler, StudySpec, confirmation, confirmed_epochs, define
from erpe.variants import NINE, VARIANTS

Count = Annotated[int, Field(gt=0, lt=2**31)]
Margin = Annotated[float, Field(gt=0, le=100)]
"""Points of accuracy."""

_NAMED = {"nine": NINE, "twelve": VARIANTS}


def _listed(given: Any) -> Any:
    if isinstance(given, str) and given not in _NAMED:
        raise ConfigError(f"{given!r} given; {USE_VARIANTS}")
    return _NAMED[given] if isinstance(given, str) else given


_LIST = {"type": "array", "items": {"enum": list(VARIANTS)}}
Variants = Annotated[
    tuple[Variant, ...], BeforeValidator(_listed), WithJsonSchema({"anyOf": [{"enum": list(_NAMED)}, _LIST]})
]


Grid = Annotated[tuple[Size, Size] | None, BeforeValidator(read_grid), WithJsonSchema({"type": ["string", "integer"]})]


class Search(Config):
    """How the best configuration of every arm is looked for."""

    trials: Count = 8
    """Trials an arm."""
    epochs: Size | None = None
    """Epochs of a trial that is not pruned; default: that of the data set."""
    budget: Literal["trials", "epochs", "flops"] = "trials"
    """What is equal for all arms: trials; trials x epochs, where pruned epochs go into more trials; or the FLOPs that
    softmax needs for that, so that cheap arms train longer."""
    sampler: Sampler = "tpe"
    """Optuna's sampler. Its start-up, at most half the trials, and random draws are the same for all arms."""
    pruner: Pruner = "auto"
    """Optuna's pruner; auto: asha for a search of 16 trials or more, none for a shorter one."""
    objective: Objective = Field("accuracy", exclude_if=lambda given: given == "accuracy")
    """accuracy or log_likelihood, and after it flops, params or inference_ms, as "accuracy,flops"."""
    at_most: Limits = Field({}, exclude_if=lambda given: not given)
    """What the best model may cost: flops (forward, an image), params, inference_ms (an image)."""


class Confirm(Config):
    """How the best configuration of every arm is trained again, on the full training set."""

    seeds: Count = 8
    """Fresh seeds; seed k is the same for all arms, so that they can be compared in pairs."""
    epochs: Size | None = None
    """Epochs; default: those of the search."""


class Compare(Config):
    """What is concluded from the confirmed runs. It shapes no run, so that it may change at any time."""

    margin: Margin = 0.5
    """Points of accuracy that are too few to matter: two arms that differ by less are equivalent."""


class Arm(NamedTuple):
    """What a study compares."""

    name: str
    """`relu_rope`, or with switches `relu_rope-patch2`."""
    variant: str
    switches: dict[str, Any]
    """Settings that set it apart from other arms of its variant."""


class Plan(Config):
    """A study file. Each arm is a variant, or a variant and one combination of switches."""

    name: str
    """Of the study; default: the file's."""
    dataset: AnyDataset
    """Its name, or the path of own images, relative to the study file."""
    resize: Grid = Field(None, exclude_if=lambda grid: grid is None)
    """Height and width that own images get, as "32x32"; default: they stay as they are."""
    plugins: tuple[str, ...] = Field((), exclude_if=lambda given: not given)
    """Python files with attentions and encodings of one's own, relative to the study file; or installed plug-ins."""
    variants: Variants
    """The nine of the question, all twelve, or a list."""
    seed: NonNegativeInt = 0
    """What every other seed comes from."""
    search: Search = Search()
    """The first phase."""
    confirm: Confirm = Confirm()
    """The second phase."""
    compare: Compare = Compare()
    """What the report concludes."""
    switches: dict[str, tuple[Scalar, ...]] = Field(default={})
    """Settings whose every combination is an arm; a variant without such a setting ignores it."""
    settings: dict[str, Scalar] = Field(default={})
    """Settings of every trial; they are not searched."""
    space: dict[str, Any] = Field(default={})
    """Ranges laid over the default space, as in a space file."""

    def __init__(self, **values: Any) -> None:
        """Take what a file has; every mistake in it is told.

        Raises:
            ConfigError: its mistakes.
        """
        try:
            super().__init__(**values)
        except ConfigError as error:
            raise ConfigError(*error.args, *beside(Plan, values, error.__context__)) from None

    @field_validator("switches", "settings", "space", mode="before")
    @classmethod
    def _by_dotted_name(cls, given: Any) -> Any:
        return dotted(given) if isinstance(given, dict) else given

    @model_validator(mode="after")
    def _makes_sense(self) -> Plan:
        if mistakes := mistakes_of(self):
            raise ConfigError(*mistakes)
        return self

    def arms(self) -> list[Arm]:
        """Return what is compared, in the order of the table."""
        return [arm for variant in self.variants for arm in self._arms_of(variant)]

    def _arms_of(self, variant: str) -> list[Arm]:
        everyones = set(defaults(variant, self.dataset).flat()) - _VARIANT_PARAMS
        names = [name for name in self.switches if name in everyones or name in variant_params(variant, self.dataset)]
        combinations = product(*(self.switches[name] for name in names))
        chosen = [dict(zip(names, values, strict=True)) for values in combinations]
        return [Arm("-".join([variant, *map(_label, switches.items())]), variant, switches) for switches in chosen]

    def search_spec(self, arm: Arm) -> StudySpec:
        """Return the search of an arm.

        Raises:
            ConfigError: settings or ranges that do not fit it.
        """
        return self._spec(arm, self.epochs(arm))

    def _spec(self, arm: Arm, epochs: int | None) -> StudySpec:
        space = apply_overrides(self.space, arm.variant, self.dataset)
        own = {name: value for name, value in self.settings.items() if self._applies(name, arm.variant)}
        return define(
            arm.variant, self.dataset, space=space, settings=own | arm.switches, epochs=epochs,
            sampler=self.search.sampler, pruner=self.search.pruner, seed=self.seed, objective=self.search.objective,
            at_most=self.search.at_most,
        )  # fmt: skip

    def _applies(self, name: str, variant: str) -> bool:
        if name.startswith("model.options."):
            return name in defaults(variant, self.dataset).flat()
        return name not in _VARIANT_PARAMS or name in variant_params(variant, self.dataset)

    def epochs(self, arm: Arm) -> int | None:
        """Epochs of a trial; with equal FLOPs as many more as the arm is cheaper than softmax."""
        given = self.search.epochs
        if self.search.budget != "flops":
            return given
        return max(1, round(self._usual_epochs * self._train_flops(_SOFTMAX) / self._train_flops(arm)))

    @property
    def _usual_epochs(self) -> int:
        return self.search.epochs or defaults("softmax", self.dataset).train.epochs

    def flops_per_image(self) -> float:
        """Return what a search spends of FLOPs for every training image, if arms have equal FLOPs: those of softmax."""
        return self.search.trials * self._usual_epochs * self._train_flops(_SOFTMAX)

    def _train_flops(self, arm: Arm) -> float:
        """FLOPs of a training step, an image, of a model that the arm's search may draw."""
        from erpe.model.flops import train_step_flops

        spec = self._spec(arm, 1)
        return train_step_flops(typical(spec.space, spec.base).model)

    def resolved(self) -> Plan:
        """Return the same study with every default written out."""
        axes = {name: axis for arm in self.arms() for name, axis in self.search_spec(arm).space.axes.items()}
        written = {name: _written(axis) for name, axis in sorted(axes.items())}
        epochs = {"epochs": self._usual_epochs}
        search = self.search.model_copy(update=epochs)
        confirm = self.confirm if self.confirm.epochs else self.confirm.model_copy(update=epochs)
        return self.model_copy(update={"search": search, "confirm": confirm, "space": written})

    def confirm_spec(self, arm: Arm, config: Any) -> StudySpec:
        """Return the confirmation of an arm's best configuration."""
        search = self.search
        epochs = confirmed_epochs(self.confirm.epochs, config.train.epochs, search.epochs, search.budget)
        return confirmation(config, self.seed, epochs)


_SOFTMAX = Arm("softmax", "softmax", {})
_VARIANT_PARAMS = frozenset(name for variant in VARIANTS for name in variant_params(variant, "digits"))
"""Settings that only some variants have."""


def _label(switch: tuple[str, Any]) -> str:
    """Name a switch's value in an arm: `patch2`; of words the value alone, `mixed`, but `position_none`."""
    name, value = switch
    leaf = name.rpartition(".")[2]
    if isinstance(value, int | float) and not isinstance(value, bool):
        return f"{leaf}{value:g}"
    return value if isinstance(value, str) and value != "none" else f"{leaf}_{value}".lower()


def _written(axis: Axis) -> Any:
    """Return a range as a study file has it."""
    if isinstance(axis, Choices):
        return list(axis.values) if len(axis.values) > 1 else axis.values[0]
    return axis.model_dump(exclude_defaults=True)
