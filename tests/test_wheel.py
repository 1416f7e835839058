"""The wheel has everything, and trains where neither Ray nor MLflow is installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import erpe

ROOT = Path(__file__).parent.parent
EXTRAS = ("ray", "mlflow", "pandas", "matplotlib", "scikit_posthocs", "jinja2", "pyarrow", "psycopg", "s3fs", "apprise")
SMALL = ("train.epochs=1", "model.width=16", "model.depth=1", "data.train_limit=64")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy, without a C compiler: kernels are optional."""
    source, built = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("built")
    shutil.copytree(ROOT / "erpe", source / "erpe", ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source)
    code = f"from setuptools.build_meta import build_wheel; build_wheel({str(built)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=source, env=os.environ | {"CC": "false"}, check=True)
    return zipfile.ZipFile(next(built.glob("*.whl")))


@pytest.fixture(scope="module")
def bare(wheel, tmp_path_factory):
    """A Python with the wheel and what is installed here, but for erpe and what its extras bring."""
    root = tmp_path_factory.mktemp("bare")
    venv.create(root, symlinks=True)
    (site,) = root.glob("lib/python*/site-packages")
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if not entry.name.lower().startswith(("erpe", "__editable__", *EXTRAS)) and entry.suffix != ".pth":
            (site / entry.name).symlink_to(entry)
    wheel.extractall(site)
    return root / "bin/python"


def run(python, folder, *words):
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [python, "-m", "erpe", *words]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_what_a_clone_installed_is_found_beside_the_clone_too(tmp_path):
    (tmp_path / "erpe").mkdir()  # as `git clone` calls it: Python could take it for the package
    assert run(sys.executable, tmp_path, "--version").stdout.strip() == f"erpe {erpe.__version__}"


def test_the_wheel_has_every_module_and_one_version(wheel):
    names = set(wheel.namelist())
    assert {str(path.relative_to(ROOT)) for path in (ROOT / "erpe").rglob("*.py")} <= names
    assert {"erpe/py.typed", "erpe/report/page.html.j2"} <= names
    metadata = Parser().parsestr(wheel.read(f"erpe-{erpe.__version__}.dist-info/METADATA").decode())
    assert metadata["Version"] == erpe.__version__ and set(metadata.get_all("Provides-Extra")) >= {
        "ray",
        "mlflow",
        "all",
    }
    needed = [line for line in metadata.get_all("Requires-Dist") if "extra" not in line]
    assert not [line for line in needed if line.startswith(("ray", "mlflow", "pandas", "matplotlib"))]


@pytest.mark.slow
@pytest.mark.parametrize("command", ["train", "tune --executor inline --trials 1"])
def test_without_extras_a_model_is_trained_and_searched_and_events_wait(bare, tmp_path, command):
    words = [word for setting in SMALL for word in ("--set", setting)]
    done = run(bare, tmp_path, *command.split(), "--variant", "relu", "--dataset", "digits", "--json", *words)
    assert done.returncode == 3 and "Traceback" not in done.stderr, done.stderr
    assert '"test/accuracy": 0.' in done.stdout
    assert "MLflow is not installed; pip install 'erpe[mlflow]'" in done.stderr


@pytest.mark.slow
def test_without_extras_nothing_is_wrong(bare, tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/erpe.json").write_text('{"layout": 1}')
    done = run(bare, tmp_path, "doctor")
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(f"pip install 'erpe[{extra}]'" in done.stdout for extra in ("ray", "mlflow"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "extra"),
    [(("tune", "--variant", "relu", "--dataset", "digits", "--trials", "1"), "ray"), (("ui",), "mlflow")],
)
def test_what_is_not_installed_is_named_with_the_extra_that_has_it(bare, tmp_path, words, extra):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/erpe.json").write_text('{"layout": 1}')
    done = run(bare, tmp_path, *words)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert f"is not installed; pip install 'erpe[{extra}]'" in done.stderr
