"""Packages are built on each other in one order: each imports only what stands above it."""

from __future__ import annotations

import ast
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
    datasets plugins
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
    results inference
    cli
    __init__ __main__
"""
LEVEL = {name: level for level, line in enumerate(ORDER.strip().splitlines()) for name in line.split()}
FILES = sorted(ROOT.rglob("*.py"))
ONLY = {
    "ray": ("execution",),
    "optuna": ("study", "tracking", "transfer", "retention"),
    "mlflow": ("tracking", "report/sources", "inference.py"),
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
