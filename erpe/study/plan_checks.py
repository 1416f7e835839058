"""What is wrong with a study file whose values have the right types: names, switches, and what an arm would be."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from erpe.errors import ConfigError, nearest
from erpe.study.entries import KNOWN, repeated
from erpe.study.search_space import RESERVED
from erpe.study.spec import check_name

if TYPE_CHECKING:
    from erpe.study.plan import Plan

MOST_ARMS = 1000

USE_VARIANTS = 'use nine, twelve or a list, as ["softmax", "relu"], instead'


def mistakes_of(plan: Plan) -> list[str]:
    """Return a line for each mistake; arms are looked at without the settings whose names are wrong."""
    strange, kept = list[str](), dict[str, dict[str, Any]]()
    for table, given in (("switches", plan.switches), ("settings", plan.settings)):
        lines = {name: line for name in given if (line := _strange(table, name))}
        strange += lines.values()
        kept[table] = {name: value for name, value in given.items() if name not in lines}
    others = [*_names(plan), *_switches(plan)] or _arms(plan.model_copy(update=kept))
    return [*strange, *others]


def beside(make: Callable[..., object], table: dict[str, Any], error: BaseException | None) -> tuple[str, ...]:
    """Return what else is wrong with a file's table, seen when the values that pydantic names are not in it."""
    if not isinstance(error, ValidationError):
        return ()
    kept = deepcopy(table)
    for found in error.errors():
        branch: Any = kept
        for step in found["loc"]:
            inner = branch.get(step)
            if not isinstance(inner, dict) or step == found["loc"][-1]:
                branch.pop(step, None)
                break
            branch = inner
    if kept == table or not kept.keys() >= {"dataset", "variants"}:
        return ()
    try:
        make(**kept)
    except ConfigError as more:
        return more.args
    return ()


def _names(plan: Plan) -> Iterator[str]:
    try:
        check_name(plan.name)
    except ConfigError as error:
        yield str(error)
    if not plan.variants:
        yield f"variants: none given; {USE_VARIANTS}"
    for name, count in Counter(plan.variants).items():
        if count > 1:
            yield f"variants: {name} is there {count} times"


def _strange(table: str, name: str) -> str | None:
    """Return what is told of a setting that a file cannot set."""
    if name in RESERVED or name == "data.validation":
        return f"{table}.{name}: the study sets it" + ("; use search.epochs instead" if name == "train.epochs" else "")
    if name not in KNOWN and not name.startswith("model.options."):
        return f"{table}: unknown setting {name[:100]!r}; {nearest(name, sorted(KNOWN))}"
    return None


def _switches(plan: Plan) -> Iterator[str]:
    if len(plan.variants) * math.prod(map(len, plan.switches.values())) > MOST_ARMS:
        yield f"switches: more than {MOST_ARMS} arms; use fewer values instead"
        return
    for name, values in plan.switches.items():
        if not values:
            yield f"switches.{name}: no value to choose from"
        if repeated(name, values):
            yield f"switches.{name}: a value is there twice in {list(values)}"


def _arms(plan: Plan) -> list[str]:
    """Return what is wrong with arms; that of several arms is told once."""
    arms, found = plan.arms(), dict[str, list[str]]()
    for name, count in Counter(arm.name for arm in arms).items():
        if count > 1:
            return [f"switches: {count} arms would be named {name}; use values that differ more instead"]
    for arm in arms:
        try:
            plan.search_spec(arm)
        except ConfigError as error:
            for said in error.args:
                found.setdefault(said, []).append(arm.name)
    return [said if len(names) == len(arms) else f"{names[0]}: {said}" for said, names in found.items()]
