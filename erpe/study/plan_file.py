"""Read a study file, and write one; its JSON Schema."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from erpe.datasets import DATASETS, read_grid
from erpe.errors import ConfigError, ErpeError, nearest
from erpe.plugins import given_names, loaded
from erpe.plugins import load as load_plugin
from erpe.store import Store
from erpe.study.entries import by_dotted_names, contradictions, lay_over, read_change, tables_of
from erpe.study.plan import Plan
from erpe.study.reading import read_studies
from erpe.study.records import grouped
from erpe.study.search_space import read_toml


def load_plan(
    given: str | os.PathLike[str] | dict[str, Any], changes: Sequence[str] = (), cache: Path | None = None
) -> Plan:
    """Return a study file, with some lines changed, in this order: `["search.trials=2", "space.model.patch=7"]`.

    Args:
        given: its path; or what is in one, whose paths are relative to the working directory.
        cache: where what is found out of own images is kept; see `erpe.training.own.find_dataset`.
    Raises:
        ConfigError: one line naming the file, the key, and what is wrong with it.
    """
    path = Path("study" if isinstance(given, dict) else given)
    try:
        table = json.loads(json.dumps(given)) if isinstance(given, dict) else read_toml(path)
    except ConfigError:
        raise
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from None
    try:
        table = _changed({"name": path.stem.replace("_", "-")} | table, changes)
        for plugin in table.get("plugins", ()) if isinstance(table.get("plugins", ()), list) else ():
            load_plugin(str(plugin), path.parent)
        return _with_plugins(Plan(**_with_dataset(table, path.parent, cache)))
    except ErpeError as error:
        raise ConfigError(f"{path}: {error}") from None


def find_plan(given: str | os.PathLike[str] | dict[str, Any], changes: Sequence[str], store: Store) -> Plan:
    """Return the plan of a study file; or of a study of the store, as it was run last; see `load_plan`.

    Args:
        given: a study file, what is in one, or the name of a study that `erpe study run` or `erpe.run_study` began.
    Raises:
        ConfigError: it is neither, or of plug-ins that are not loaded; the line names them.
        StoreError: the database cannot be read.
    """
    from erpe.training.own import recall

    if isinstance(given, dict) or os.path.isfile(given):
        return load_plan(given, changes, store.datasets)
    plans = {plan["name"]: plan for plan, _ in grouped(read_studies(store))}
    if str(given) in plans:
        plan = _with_plugins(stored_plan(plans[str(given)], changes, store.datasets))
        recall(plan.dataset, store.datasets)
        return plan
    if not os.path.exists(given) and not Path(given).suffix:
        hint = nearest(str(given), plans) if plans else "the store has none"
        raise ConfigError(f"{given}: no such file, and no such study in the store; {hint}")
    return load_plan(given, changes, store.datasets)


def _with_plugins(plan: Plan) -> Plan:
    """Return the plan with its plug-ins as the next command in the current folder names them, also of `--plugin`."""
    return plan.model_copy(update={"plugins": given_names(plan.variants) or plan.plugins})


def _changed(table: dict[str, Any], changes: Sequence[str]) -> dict[str, Any]:
    table = by_dotted_names(table)
    for line in changes:
        lay_over(table, read_change(line))
    if against := contradictions({f"[{name}]": found for name, found in tables_of(table).items()}):
        raise ConfigError(*against)
    return table


def stored_plan(stored: dict[str, Any], changes: Sequence[str] = (), cache: Path | None = None) -> Plan:
    """Return the plan of a study in a store, with some lines changed; see `load_plan`.

    Raises:
        ConfigError: it is of plug-ins that are not loaded, and are never loaded by themselves; the line names them.
    """
    try:
        return Plan(**(_with_dataset(_changed(stored, changes), Path(), cache) if changes else stored))
    except ConfigError:
        here = {source.name for source in loaded()}
        lacks = [each for each in stored.get("plugins", ()) if Path(each).stem not in here]
        if not lacks:
            raise
        words = " ".join(f"--plugin {shlex.quote(each)}" for each in lacks)
        raise ConfigError(f"study {stored.get('name')}: of a plug-in that is not loaded; use {words}") from None


def _with_dataset(table: dict[str, Any], base: Path, cache: Path | None) -> dict[str, Any]:
    """Return the file's table; a path of own images, which is relative to the file, becomes their description."""
    given = table.get("dataset")
    if not isinstance(given, str) or (given in DATASETS and "resize" not in table):
        return table
    from erpe.training.own import find_dataset

    return table | {"dataset": find_dataset(given, base=base, resize=read_grid(table.get("resize")), cache=cache)}


def schema() -> str:
    """Return the JSON Schema of a study file, for editors."""
    found = Plan.model_json_schema()
    for table in ("switches", "settings"):  # `train.lr = 1` is a table in a table
        own = found["properties"][table]["additionalProperties"]
        found["properties"][table]["additionalProperties"] = {
            "anyOf": [own, {"type": "object", "additionalProperties": own}]
        }
    found["required"] = [name for name in found["required"] if name != "name"]
    return json.dumps({"$schema": "https://json-schema.org/draft/2020-12/schema"} | found, indent=2) + "\n"


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
