"""What pydantic found wrong, in plain words: where, what was given, what to use instead."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Iterator, Sequence
from types import UnionType
from typing import TYPE_CHECKING, Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from erpe.errors import ConfigError, either, nearest

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

_BRIEF = reprlib.Repr()
_BRIEF.maxstring = _BRIEF.maxother = _BRIEF.maxlong = 200
_BRIEF.maxlist = _BRIEF.maxdict = _BRIEF.maxtuple = 20

_WORDS = {
    "bool": "true or false", "int": "a whole number", "float": "a number", "finite": "a finite number",
    "string": "text", "tuple": "a list", "list": "a list", "dict": "a table", "model": "a table",
}  # fmt: skip
"""First word of pydantic's type of an error -> what to use instead."""


def explain(error: ValidationError, owner: type[BaseModel]) -> list[str]:
    """Return a line for each mistake, unknown keys first: they often cause the other mistakes."""
    found = sorted(error.errors(include_url=False), key=lambda each: each["type"] != "extra_forbidden")
    wanted: dict[str, list[str]] = {}  # of a setting of two kinds, both are told in one line
    for line in (line for each in found for line in _lines(each, owner)):
        given, use, instead = line.partition(" given; use ")
        wanted.setdefault(given + use, []).extend([instead.removesuffix(" instead")] if use else [])
    return [f"{given}{either(kinds)} instead" if kinds else given for given, kinds in wanted.items()]


def _without_kinds(place: Sequence[int | str], owner: type[BaseModel]) -> list[int | str]:
    """Return where a mistake is as the user wrote it: of a setting of two kinds, pydantic says which it tried."""
    kept: list[int | str] = []
    kind: Any = owner
    for step in place:
        if get_origin(kind) in (Union, UnionType):
            kind = next((each for each in get_args(kind) if getattr(each, "__name__", "") == step), None)
        else:
            kept.append(step)
            fields = getattr(kind, "model_fields", {})
            kind = fields[str(step)].annotation if str(step) in fields else None
    return kept


def _lines(found: ErrorDetails, owner: type[BaseModel]) -> Iterator[str]:
    place = ".".join(str(part)[:100] for part in _without_kinds(found["loc"], owner))
    if found["type"] == "extra_forbidden":
        *above, key = found["loc"]
        yield f"{place[:100]}: unknown key; {nearest(str(key), _settings_at(owner, above))}"
    elif found["type"] == "missing":
        yield f"{place}: a value is needed"
    elif found["type"] == "value_error":
        reason = found["ctx"]["error"]
        for said in reason.args if isinstance(reason, ConfigError) else [str(reason)]:
            yield _placed(str(said), place, _settings_at(owner, found["loc"]))
    else:
        yield f"{place}: {_BRIEF.repr(found['input'])} given; use {_instead(found)} instead"


def _placed(said: str, place: str, settings: Sequence[str]) -> str:
    inner = re.match(r"\w+(?=[:.])", said)  # a configuration inside this one names its own setting
    if inner and settings and (inner[0] in settings or said.startswith(f"{inner[0]}: unknown key")):
        return f"{place}.{said}" if place else said
    return f"{place}: {said}" if place else said


def _instead(found: ErrorDetails) -> str:
    if found["type"] == "literal_error":
        return str(found["ctx"]["expected"]).replace("'", "")
    if found["type"].startswith(("greater", "less")):
        return f"a number {found['msg'].removeprefix('Input should be ')}"
    kind = found["type"].partition("_")[0]
    return _WORDS.get(kind) or found["msg"][:1].lower() + found["msg"][1:]


def _settings_at(owner: type[BaseModel], place: Sequence[int | str]) -> list[str]:
    """Names of the settings of the configuration that lies there; nothing if it is none."""
    kind: Any = owner
    for step in place:
        if not isinstance(kind, type) or not issubclass(kind, BaseModel) or str(step) not in kind.model_fields:
            return []
        kind = kind.model_fields[str(step)].annotation
    return list(kind.model_fields) if isinstance(kind, type) and issubclass(kind, BaseModel) else []
