"""What a study is, so that the same command finds it again, and a different study is refused.

spec = define("relu_general", "digits", epochs=10)
spec.identity, spec.name            # a hash of everything that shapes the result, and "digits-relu_general"
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from typing import Any, Literal, Self

from pydantic import Field, NonNegativeInt, model_validator

from erpe.config import TrialConfig, defaults
from erpe.datasets import Dataset
from erpe.errors import ConfigError
from erpe.settings import Config, flatten
from erpe.study.distributions import Space
from erpe.study.entries import dotted, typed
from erpe.study.objectives import Goals, Limits, Objective
from erpe.study.search_space import RESERVED, check_together, default_space

CONTRACT = 1
"""Version of what a trial means; raised when the same configuration would give another result."""

Sampler = Literal["tpe", "gp", "nsgaii", "random"]
Pruner = Literal["auto", "asha", "hyperband", "median", "none"]


class StudySpec(Config):
    """Everything that shapes a study's result. Budget, workers, device and folders are not in it."""

    base: TrialConfig
    """The configuration the space varies; its seed is 0, every trial gets its own."""
    space: Space
    """What is varied."""
    sampler: Sampler = "tpe"
    """Optuna's sampler."""
    pruner: Pruner = "auto"
    """Optuna's pruner; auto: asha for a search of 16 trials or more, none for a shorter one."""
    seed: NonNegativeInt = 0
    """Seed of the samplers and of the trials' seeds."""
    objective: Objective = Field("accuracy", exclude_if=lambda given: given == "accuracy")  # older stores stay theirs
    """What is sought; see `erpe.study.objectives`. The value of a trial is the first of the last epoch."""
    at_most: Limits = Field({}, exclude_if=lambda given: not given)
    """What a model may cost."""
    phase: Literal["search", "confirm"] = "search"
    """Look for the best configuration, or train one with fresh seeds on the full training set."""
    contract: int = CONTRACT
    """Version of the code's meaning."""

    @property
    def variant(self) -> str:
        """One of the twelve."""
        return self.base.model.variant

    @property
    def dataset(self) -> str:
        """Name of the data set."""
        return str(self.base.data.dataset)

    @property
    def epochs(self) -> int:
        """Epochs of a trial that is not pruned."""
        return self.base.train.epochs

    @property
    def name(self) -> str:
        """The study's name, unless the user gives one."""
        return f"{self.dataset}-{self.variant}"

    def value(self, measured: dict[str, float]) -> float:
        """Return what an epoch is worth; of a confirmation, without a validation part: its training loss, negated."""
        sign, key = self.goals.reported(self.phase)
        return sign * measured[key]

    def measured(self, value: float) -> dict[str, float]:
        """Return what is known of an epoch of this value, and nothing else: the inverse of `value`."""
        sign, key = self.goals.reported(self.phase)
        return {key: sign * value}

    @property
    def goals(self) -> Goals:
        """What is sought."""
        return Goals.of(self)

    @model_validator(mode="after")
    def _can_be_pruned(self) -> Self:
        if self.goals.several and self.pruner in ("median", "hyperband"):
            raise ConfigError(
                f"pruner {self.pruner}: compares one objective, and {self.objective} are several; "
                "use asha, none or auto instead"
            )
        return self

    def trial_seed(self, number: int) -> int:
        """That of the base, if any; else seed k of a confirmation is the same for every arm: such runs are a pair."""
        return self.base.seed or derive_seed(self.seed, "trial" if self.phase == "search" else "confirm", number)

    @property
    def definition(self) -> dict[str, Any]:
        """What was set, as data: a new setting that has its default is not in it, and so renames no study.

        {"variant": "favor", "dataset": "digits", "settings": {"train.ema": 0.99}, "space": {...}, "seed": 0, ...}
        """
        always = {name: getattr(self, name) for name in ("sampler", "pruner", "seed", "phase", "contract")}
        space = {name: axis.model_dump(mode="json", exclude_defaults=True) for name, axis in self.space.axes.items()}
        others = self.model_dump(mode="json", exclude={"base", "space"}, exclude_defaults=True)
        dataset = self.base.data.facts.key
        plugin = self.base.model.plugin
        always |= {"plugin": plugin} if plugin else {}
        chosen = {"variant": self.variant, "dataset": dataset, "settings": self.base.overrides, "space": space}
        return others | always | chosen

    @property
    def identity(self) -> str:
        """Twelve hexadecimal digits of what was set: equal for equal studies."""
        text = json.dumps(self.definition, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


def define(
    variant: str,
    dataset: str | Dataset,
    *,
    space: Space | None = None,
    settings: dict[str, Any] | None = None,
    epochs: int | None = None,
    sampler: Sampler = "tpe",
    pruner: Pruner = "auto",
    seed: int = 0,
    objective: Any = "accuracy",
    at_most: dict[str, Any] | None = None,
) -> StudySpec:
    """Return a study of one variant on one data set.

    Args:
        space: what is varied; default: that of the variant and the data set.
        settings: dotted names that every trial has, `{"train.ema": 0.99}`; they leave the space.
        epochs: of a trial; default: that of the data set.
        objective: what is sought, `accuracy,flops`.
        at_most: what a model may cost, `{"flops": 2e7}`.
    Raises:
        ConfigError: an unknown name, a value that does not fit or contradicts an argument, or a space that could
            draw a configuration that does not fit.
    """
    own = {"model.variant": variant, "data.dataset": dataset, "seed": seed}
    own |= {} if epochs is None else {"train.epochs": epochs}
    given = dotted(settings or {})
    against = [
        f"{name}: {given[name]} given, and {own[name]} by {RESERVED[name]}; use {RESERVED[name]} alone"
        for name in own
        if name in given and typed(name, given[name]) != own[name]
    ]
    if against:
        raise ConfigError(*against)
    given |= own
    base = defaults(variant, dataset).replace(given | {"seed": 0})
    if base.data.validation == 0:
        raise ConfigError("data.validation: 0 given; a search needs val/accuracy; use a number above 0 instead")
    space = space or default_space(variant, dataset)
    # Sorted: the order decides what a seed draws.
    space = Space(axes={name: axis for name, axis in sorted(space.axes.items()) if name not in given})
    check_together(space, base)
    return StudySpec(
        base=base, space=space, sampler=sampler, pruner=pruner, seed=seed, objective=objective, at_most=at_most or {}
    )  # fmt: skip


def confirmation(config: TrialConfig, seed: int, epochs: int | None = None) -> StudySpec:
    """One configuration, to be trained with fresh seeds on the full training set.

    Args:
        seed: what the fresh seeds come from.
        epochs: default: those of the configuration.
    """
    own = {"seed": 0, "data.validation": 0.0, "train.epochs": epochs or config.train.epochs}
    nothing = Space(axes={})
    return StudySpec(
        base=config.replace(own), space=nothing, sampler="random", pruner="none", seed=seed, phase="confirm"
    )


def confirmed_epochs(given: int | None, own: int, usual: int | None, budget: str) -> int:
    """Epochs of a confirmation.

    Args:
        given: what the study file says of a confirmation; default: those of the configuration.
        own: of the configuration.
        usual: what the study file says of a trial; with equal FLOPs cheap arms have more, in both phases.
        budget: trials, epochs or flops.
    """
    if given and budget == "flops":
        return max(1, round(given * own / (usual or own)))
    return given or own


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Return what changed between two specifications, as `model_dump(mode="json")` gives them, a line each.

    ["space.train.lr.high: 0.01, now 0.1", "pruner: auto, now none"]
    """
    before, after = flatten(old), flatten(new)
    names = sorted(set(before) | set(after))
    absent = object()

    def shown(name: str) -> str:
        """As a user writes it."""
        return name.removeprefix("base.").replace("space.axes.", "space.")

    def show(value: Any) -> str:
        return "absent" if value is absent else json.dumps(value).strip('"')

    return [
        f"{shown(name)}: {show(before.get(name, absent))}, now {show(after.get(name, absent))}"
        for name in names
        if _content(before.get(name, absent)) != _content(after.get(name, absent))
    ]


def _content(value: Any) -> Any:
    """Return a value; of own data the content, whatever its folder is called."""
    return value.rpartition("@")[2] if isinstance(value, str) else value


def differences_from(stored: dict[str, Any], spec: StudySpec) -> list[str]:
    """Return what changed since a specification was stored; a setting it did not know yet had its default."""
    with contextlib.suppress(ConfigError, TypeError):  # what cannot be read differs anyway
        stored = StudySpec(**stored).model_dump(mode="json")
    return differences(stored, spec.model_dump(mode="json"))


def check_name(name: str) -> str:
    """Check a study's name, which is also a folder's.

    Raises:
        ConfigError: it holds something else than letters, digits, dots, dashes and underscores.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
        raise ConfigError(f"study name {name!r}: use letters, digits, dots, dashes and underscores")
    return name


def derive_seed(*parts: int | str) -> int:
    """Return a seed in [0, 2^31) that depends on all parts and on nothing else."""
    digest = hashlib.sha256(":".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:4]) & 0x7FFF_FFFF
