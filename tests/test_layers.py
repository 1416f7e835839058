"""Packages are built on each other in one order: each imports only what stands above it."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

import erpe

ROOT = Path(erpe.__file__).parent
ORDER = """
    openmp _upstream
    errors
    explain
    text
    surroundings
    credentials
    settings
    datasets variants
    plugins
    config
    io
    store
    pictures
    model
    training
    study
    checkpoints
    tracking
    execution
    report
    search
    transfer retention bench
    live notify inference export
    tuned
    results
    api
    cli
    __init__ __main__
"""
LEVEL = {name: level for level, line in enumerate(ORDER.strip().splitlines()) for name in line.split()}
FILES = sorted(ROOT.rglob("*.py"))
ONLY = {
    "ray": ("execution",),
    "optuna": ("study", "tracking", "transfer", "retention"),
    "mlflow": ("_upstream.py", "tracking", "report/sources", "inference.py"),
    "torchvision": ("training",),
    "fsspec": ("checkpoints",),
    "typer": ("cli",),
}
"""A library -> who may import it."""


def imported(path: Path) -> set[str]:
    """Modules that a file imports anywhere in it, also in functions, as dotted names."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_package_imports_only_what_stands_above_it(path):
    own = path.relative_to(ROOT).with_suffix("").parts[0]
    for name in imported(path):
        top, _, rest = name.partition(".")
        package = rest.partition(".")[0]
        if top == "erpe" and package in LEVEL and package != own and own != "__init__":
            assert LEVEL[package] < LEVEL[own], name


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_only_its_package_knows_a_library(path):
    place = path.relative_to(ROOT).as_posix()
    for library in {name.partition(".")[0] for name in imported(path)} & ONLY.keys():
        assert place.startswith(ONLY[library]), library


def test_every_package_has_its_place():
    assert {path.relative_to(ROOT).with_suffix("").parts[0] for path in FILES} == LEVEL.keys()


PUBLIC = {"_asdict", "_fields", "_make", "_replace", "_exit", "_thread"}
"""Documented, though they begin so: of named tuples, of `os`, and a module of Python."""

UNDOCUMENTED = (
    "ray.tune.execution", "ray.tune.utils", "ray.tune.experiment", "mlflow.utils", "mlflow.store.db",
    "mlflow.store.tracking", "mlflow.server", "mlflow.tracking", "sqlalchemy.sql",
)  # fmt: skip
"""Modules that promise nothing."""

SQL = re.compile(r"\b(SELECT\b.*\bFROM|INSERT\s+INTO|DELETE\s+FROM|UPDATE\s+\w+\s+SET)\b(?!\s+sqlite_master)", re.S)
TABLES = {f"sqlalchemy.{name}" for name in ("MetaData", "Table", "delete", "insert", "select", "update")}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name not in PUBLIC


def own_names(tree: ast.AST) -> set[str]:
    """Private names that a module defines: functions, classes, fields, and attributes of `self`."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            found.add(node.attr)
    return found


def private_uses(tree: ast.AST, own: set[str]) -> set[str]:
    """What a module takes from the private parts of other packages."""
    found, modules = set(), set()
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
            modules |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute):
            private = is_private(node.attr) and node.attr not in own
            if private or (node.attr == "__file__" and ast.unparse(node.value) in modules - {"erpe"}):
                found.add(ast.unparse(node))
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "setattr", "hasattr", "delattr"):
            called = node.args[1].value if isinstance(node.args[1], ast.Constant) else ""
            found |= {called} if is_private(called) and called not in own else set()
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and SQL.search(node.value):
            found.add(node.value)
        foreign = {name for name in names if name.partition(".")[0] not in ("erpe", "__future__")}
        found |= {name for name in foreign if any(map(is_private, name.split(".")))}
        found |= {name for name in foreign if name.startswith(UNDOCUMENTED) or name in TABLES}
    return found


@cache
def own_of_all() -> set[str]:
    return {name for path in FILES for name in own_names(ast.parse(path.read_text()))}


@pytest.mark.slow
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_only_one_module_uses_what_other_packages_keep_to_themselves(path):
    if path.name != "_upstream.py":
        assert not private_uses(ast.parse(path.read_text()), own_of_all())


@pytest.mark.parametrize(
    "code",
    [
        "from ray._raylet import GcsClient", "import ray._private.services", "from torch import _dynamo",
        "from ray.tune.execution import class_cache", "from mlflow.utils.rest_utils import http_request",
        "client._tracking_client", "getattr(study, '_storage')", "import torch\npath = torch.__file__",
        "execute('SELECT key FROM study_user_attributes')", "from sqlalchemy import MetaData, Table",
        "trial._cached = 1",
    ],
)  # fmt: skip
def test_a_private_part_is_recognised(code):
    assert private_uses(ast.parse(code), own_of_all())
