"""What the repository says of itself is true: README, dependencies, scripts."""

from __future__ import annotations

import re
import runpy
import subprocess
import tomllib
from pathlib import Path

import pytest
import typer

from erpe.cli.app import app
from erpe.cli.doctor import PACKAGES
from erpe.config import VARIANTS
from erpe.study.search_space import load_space

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
COMMANDS = [
    line.split()[1:]
    for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
    if line.startswith("infra/run ")
]


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_each_command_of_the_readme_exists_with_its_options(words):
    command = typer.main.get_command(app)
    while hasattr(command, "commands"):  # a group
        command, words = command.commands[words[0]], words[1:]
    command.make_context(command.name, list(words))


def test_the_readme_shows_every_command():
    assert {words[0] for words in COMMANDS} == set(typer.main.get_command(app).commands)  # type: ignore[attr-defined]


def test_the_readme_has_no_gap_and_its_pictures_are_there():
    assert "<!-- output" not in README
    for picture in re.findall(r"!\[[^]]*\]\(([^)]+)\)", README):
        assert (ROOT / picture).stat().st_size > 10_000


def test_the_table_of_performance_is_that_of_the_results():
    rewritten = runpy.run_path(str(ROOT / "infra/bench_table.py"))["rewritten"]
    assert rewritten(README, ROOT / "studies/results/bench") == README


def test_each_dependency_names_the_file_that_needs_it_and_is_locked():
    text = (ROOT / "pyproject.toml").read_text()
    listed = text[text.index("dependencies = [") : text.index("]\n\n[project.optional")]
    lines = [line.strip() for line in listed.splitlines() if line.strip().startswith('"')]
    pinned = (ROOT / "infra/constraints.txt").read_text().splitlines()
    locked = {line.partition("==")[0].lower().replace("_", "-") for line in pinned}
    for line in lines:
        name, files = re.match(r'"([\w.-]+)', line)[1], re.findall(r"erpe/[\w/.]+", line)
        assert files and all((ROOT / file.rstrip(".:")).exists() for file in files), line
        assert name.lower().replace("_", "-") in locked, f"{name} is not locked"


def test_the_doctor_asks_for_nothing_that_the_product_does_not_need():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(PACKAGES) <= {re.match(r"[\w.-]+", line)[0] for line in project["dependencies"]}


def test_the_lock_names_no_host_and_no_folder():
    for line in (ROOT / "infra/constraints.txt").read_text().splitlines():
        assert line.startswith("#") or re.fullmatch(r"[\w.-]+==[\w.!]+", line), line


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_space_of_the_readme_fits_every_variant(variant):
    space = load_space(ROOT / "studies/space.toml", variant, "mnist")
    assert space.axes["train.lr"].high == 1e-2
    assert ("model.features" in space.axes) == (not variant.startswith("softmax"))


SCRIPTS = (
    "infra/run",
    "infra/test",
    "infra/bench",
    "infra/gpu-check",
    "infra/setup",
    "infra/secrets",
    "infra/tls/certificate",
    "infra/backup",
    "infra/restore",
    "infra/capacity",
    ".ci/run",
)


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_are_valid_bash_and_can_be_run(script):
    subprocess.run(["bash", "-n", ROOT / script], check=True)
    if script != "infra/setup":
        assert (ROOT / script).stat().st_mode & 0o111


def test_configuration_and_command_line_know_nothing_of_torch_ray_or_mlflow():
    heavy = r"^(?:import|from) (torch|ray|mlflow|optuna|numpy|pandas|sklearn|matplotlib)\b"
    for name in ("config", "errors", "io", "store", "cli/app", "cli/bench", "cli/options"):
        assert not re.search(heavy, (ROOT / f"erpe/{name}.py").read_text(), re.MULTILINE), name
