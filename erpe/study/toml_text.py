"""A study as the text of a study file."""

from __future__ import annotations

import json
from typing import Any


def toml_lines(table: dict[str, Any], place: tuple[str, ...] = ()) -> list[str]:
    """A table as TOML: values first, then the tables in it; a leaf table is a line."""
    names = {key: key if key.isidentifier() else json.dumps(key) for key in table}
    inner = {key: value for key, value in table.items() if isinstance(value, dict) and not place and value}
    lines = [f"{names[key]} = {_toml(value)}" for key, value in table.items() if key not in inner]
    for key, value in inner.items():
        lines += ["", f"[{names[key]}]", *toml_lines(value, (*place, key))]
    return lines


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {_toml(each)}" for key, each in value.items()) + "}"
    return json.dumps(value)
