"""What is wrong with a study file whose values have the right types: names, switches, and what an arm would be."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

from erpe.errors import ConfigError, nearest
from erpe.study.entries import KNOWN, repeated
from erpe.study.search_space import RESERVED
from erpe.study.spec import check_name

if TYPE_CHECKING:
    from erpe.study.plan import Plan

MOST_ARMS = 1000


def mistakes_of(plan: Plan) -> list[str]:
    """Return a line for each mistake; arms are looked at when nothing else is wrong."""
    return [*_names(plan), *_switches(plan)] or _arms(plan)


def _names(plan: Plan) -> Iterator[str]:
    try:
        check_name(plan.name)
    except ConfigError as error:
        yield str(error)
    if not plan.variants:
        yield "variants: none given; use nine, twelve or a list instead"
    if len(set(plan.variants)) < len(plan.variants):
        yield "variants: one is there twice"
    for table, names in (("switches", plan.switches), ("settings", plan.settings)):
        for name in names:
            if name in RESERVED or name == "data.validation":
                yield f"{table}.{name}: the study sets it"
            elif name not in KNOWN and not name.startswith("model.options."):
                yield f"{table}: unknown setting {name[:100]!r}; {nearest(name, sorted(KNOWN))}"


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
