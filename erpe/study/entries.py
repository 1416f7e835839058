"""What users write in files and after `--set`: dotted names and values, which may not contradict each other.

read_line("train.lr = 0.01")                          # {"train": {"lr": 0.01}}, as TOML has it
dotted({"train": {"lr": 0.01}, "model.patch": 2})     # {"train.lr": 0.01, "model.patch": 2}
combine({"train.lr": 0.01}, {"train.lr": 0.02})       # ConfigError
"""

from __future__ import annotations

import contextlib
import functools
import json
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from typing import Annotated, Any, cast

from pydantic import TypeAdapter, ValidationError

from erpe.config import defaults
from erpe.errors import ConfigError
from erpe.settings import Config

KNOWN = frozenset(defaults("softmax", "digits").flat())
"""Dotted names of all settings of a trial."""


def read_line(line: str, example: str, option: str = "--set") -> dict[str, Any]:
    """Return a line of TOML; a bare word is text.

    Args:
        example: of such a line, for the error.
        option: what it was given by.
    Raises:
        ConfigError: it is not NAME=VALUE.
    """
    key, sign, text = line.partition("=")
    for value in (text, json.dumps(text.strip())):
        with contextlib.suppress(ValueError, RecursionError):  # ValueError: also a number of too many digits
            if sign:
                return tomllib.loads(f"{key} = {value}")
    raise ConfigError(f"{option} {line}: use NAME=VALUE instead, as {example}")


def dotted(entries: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings under their dotted names, whether they were written `"train.lr" = 1`, `train.lr = 1` or in a
    table.

    Raises:
        ConfigError: one setting is written twice, with different values.
    """
    found: dict[str, Any] = {}
    for key, value in entries.items():
        section = (
            isinstance(value, dict)
            and key not in KNOWN
            and (key == "model.options" or any(name.startswith(f"{key}.") for name in KNOWN))
        )
        combine(found, dotted({f"{key}.{name}": each for name, each in value.items()}) if section else {key: value})
    return found


def combine(into: dict[str, Any], more: Mapping[str, Any], place: str = "") -> None:
    """Add entries, tables inside tables too.

    Raises:
        ConfigError: one is there, with another value.
    """
    for key, value in more.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            combine(into[key], value, f"{place}{key}.")
        elif key in into and into[key] != value:
            raise ConfigError(f"{place}{key}: {_brief(into[key])} and {_brief(value)} given; use one of them")
        else:
            into[key] = dict(value) if isinstance(value, dict) else value


def contradictions(tables: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return what two tables say differently of a setting, a line each.

    Args:
        tables: where it was written -> dotted name -> a value, a list of values or a range.
    """
    return [
        f"{name}: {one} has {_brief(first[name])} and {two} has {_brief(second[name])}; use one of them"
        for (one, first), (two, second) in combinations(tables.items(), 2)
        for name in sorted(first.keys() & second.keys())
        if _values(name, first[name]) != _values(name, second[name])
    ]


def _values(name: str, entry: Any) -> Any:
    if isinstance(entry, dict):
        return entry
    values = entry if isinstance(entry, list | tuple) else [entry]
    return sorted(repr(typed(name, value)) for value in values)


def _brief(value: Any) -> str:
    return json.dumps(value, default=str)[:100]


def typed(name: str, value: Any) -> Any:
    """Return a value as a configuration holds it: 1.0 is 1 for a size, and 1 is true for a switch.

    What is no setting, or does not fit, is left to the configuration, which says what is wrong with it.
    """
    return _adapters()[name].validate_python(value) if fits(name, value) else value


def fits(name: str, value: Any) -> bool:
    """Whether a setting takes a value, as far as it alone can tell."""
    try:
        _adapters()[name].validate_python(value)
    except (ValidationError, KeyError):
        return False
    return True


@functools.cache
def _adapters() -> dict[str, TypeAdapter[Any]]:
    config = defaults("softmax", "digits")
    sections: dict[str, Config] = {"model.": config.model, "data.": config.data, "train.": config.train, "": config}
    return {
        f"{prefix}{key}": TypeAdapter(cast(Any, Annotated[field.annotation, field]))
        for prefix, section in sections.items()
        for key, field in type(section).model_fields.items()
        if f"{prefix}{key}" in KNOWN
    }


def repeated(name: str, values: Iterable[Any]) -> bool:
    """Whether two of the values are one for the setting."""
    own = [typed(name, value) for value in values]
    return any(own[i] == own[j] for i, j in combinations(range(len(own)), 2))


def check_agreement(changes: Sequence[str]) -> None:
    """Refuse lines of which one undoes another.

    Raises:
        ConfigError: they give a key two values.
    """
    wanted: dict[str, Any] = {}
    for line in changes:
        combine(wanted, read_change(line), "--set ")


def read_change(line: str) -> dict[str, Any]:
    """Return a line of a study file; see `read_line`."""
    return by_dotted_names(read_line(line, "search.trials=2"))


def tables_of(table: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the tables whose keys are settings of a trial."""
    return {name: table[name] for name in ("settings", "switches", "space") if isinstance(table.get(name), dict)}


def by_dotted_names(table: dict[str, Any]) -> dict[str, Any]:
    """Return a study file with `dotted` settings."""
    return table | {name: dotted(entries) for name, entries in tables_of(table).items()}


def lay_over(table: dict[str, Any], changes: dict[str, Any]) -> None:
    """Change entries, those of tables inside tables, too."""
    for key, value in changes.items():
        if isinstance(value, dict) and isinstance(table.get(key), dict):
            lay_over(table[key], value)
        else:
            table[key] = value
