"""A walk through the commands with wrong inputs: each ends with a code, and says what is wrong in one clear line."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from erpe.api import _check_tracking
from erpe.cli.app import app
from erpe.cli.options import with_store
from erpe.errors import ErpeError
from erpe.store import Store

MOST = 400
"""Characters of a line that is read, not skipped."""

FILE = str(Path(__file__).parent.parent / "studies/digits_nine.toml")
TUNE = ["tune", "--variant", "relu", "--dataset", "digits", "--executor", "inline"]


@pytest.fixture
def erpe(tmp_path, monkeypatch):
    """The exit code of a command in an empty folder, and what it said."""
    monkeypatch.chdir(tmp_path)
    for name in ("ERPE_DATA", "ERPE_RAY_ADDRESS", "ERPE_RAY_JOBS", "MLFLOW_TRACKING_URI", "ERPE_STORAGE_URL"):
        monkeypatch.delenv(name, raising=False)
    Store.open(tmp_path / "runs")
    Store.open(tmp_path / "a store")
    (tmp_path / "file").write_text("x")
    (tmp_path / "bad.toml").write_text("a = [")
    (tmp_path / "empty.toml").write_text("")
    (tmp_path / "latin.toml").write_bytes(b"a = '\xe9'")
    (tmp_path / "other.toml").write_text('dataset = "digits"\nvariants = ["rellu"]\n')
    (tmp_path / "unknown.toml").write_text('dataset = "digits"\nvariants = "nine"\ntrials = 3\n')

    def run(words):
        done = CliRunner().invoke(app, words)
        if done.exception and not isinstance(done.exception, ErpeError | SystemExit):
            raise done.exception
        return done.exit_code, str(done.exception) if isinstance(done.exception, ErpeError) else done.output

    return run


WALK = [
    [*TUNE, "--trials", "0"],
    [*TUNE, "--trials", "-3"],
    [*TUNE, "--epochs", "0"],
    [*TUNE, "--epochs", "x"],
    [*TUNE, "--sampler", "tpee"],
    [*TUNE, "--pruner", "best"],
    [*TUNE, "--seed", "-1"],
    [*TUNE, "--seed", "1.5"],
    [*TUNE, "--device", "gpu"],
    [*TUNE, "--device", "cuda:99"],
    [*TUNE, "--executor", "slurm"],
    [*TUNE, "--concurrency", "0"],
    [*TUNE, "--cpus-per-trial", "0"],
    [*TUNE, "--gpus-per-trial", "-1"],
    [*TUNE, "--gpus-per-trial", "nan"],
    [*TUNE, "--pack", "0"],
    [*TUNE, "--name", "a/b"],
    [*TUNE, "--name", ""],
    [*TUNE, "--name", "x" * 300],
    [*TUNE, "--space", "missing.toml"],
    [*TUNE, "--space", "bad.toml"],
    [*TUNE, "--space", "empty.toml", "--set", "train.lr"],
    [*TUNE, "--set", "train.lr=fast"],
    [*TUNE, "--set", "train.lr=-1"],
    [*TUNE, "--set", "train.lr=nan"],
    [*TUNE, "--set", "train.learning_rate=0.1"],
    [*TUNE, "--set", "model.width=7"],
    [*TUNE, "--set", "model.patch=3"],
    [*TUNE, "--set", "model.depth=0"],
    [*TUNE, "--set", "train.batch=0"],
    [*TUNE, "--set", "train.lr=1", "--set", "train.lr=2"],
    [*TUNE, "--epochs", "1", "--set", "train.epochs=3"],
    [*TUNE, "--set", "model.variant=softmax"],
    [*TUNE, "--set", "seed=3"],
    [*TUNE, "--store", "file"],
    [*TUNE, "--store", "file/inside"],
    [*TUNE, "--store", "/proc/store"],
    [*TUNE, "--store", ""],
    [*TUNE, "--set", "train.batch=true"],
    [*TUNE, "--space", "."],
    [*TUNE, "--space", "latin.toml"],
    ["tune", "--variant", "relu", "--dataset", "file"],
    ["study", "run", FILE, "--set", "dataset=[1]"],
    [*TUNE, "--nothing"],
    ["tune", "--variant", "relu"],
    ["tune", "--variant", "performer", "--dataset", "digits"],
    ["tune", "--variant", "relu", "--dataset", "imagenet"],
    ["train", "--variant", "relu", "--dataset", "digits", "--epochs", "-1"],
    ["train", "--variant", "relu", "--dataset", "cifar10", "--data-dir", "file"],
    ["study", "run", "missing.toml"],
    ["study", "run", "bad.toml"],
    ["study", "run", "empty.toml"],
    ["study", "run", "other.toml"],
    ["study", "run", "unknown.toml"],
    ["study", "run", "."],
    ["study", "run", FILE, "--set", "search.trials=0"],
    ["study", "run", FILE, "--set", "search.trails=1"],
    ["study", "run", FILE, "--set", "confirm.seeds=none"],
    ["study", "run", FILE, "--set", "name=../x"],
    ["study", "run", FILE, "--set", 'variants=["relu", "relu"]'],
    ["study", "run", FILE, "--set", 'switches."model.rope"=["axial", "axial"]'],
    ["study", "run", FILE, "--set", 'space."train.lr"={low=1, high=0}'],
    ["study", "run", FILE, "--budget", "hours"],
    ["study", "show", FILE, "--sd", "-1"],
    ["study", "status", "nothing"],
    ["study", "nothing"],
    ["status", "nothing"],
    ["status", "nothing/relu"],
    ["status", ""],
    ["status", "--store", "missing"],
    ["predict", "nothing", "file"],
    ["predict", "", "file"],
    ["predict", "x" * 5000, "file"],
    ["compare", "nothing"],
    ["compare", "--format", "word"],
    ["compare", "--server", "http://127.0.0.1:1"],
    ["compare", "--server", "ftp://x"],
    ["report", "nothing", "--output", "/proc/x.html"],
    ["gc"],
    ["gc", "--keep-best", "-1"],
    ["gc", "--older-than", "-1"],
    ["gc", "nothing", "--failed"],
    ["restore", "nothing"],
    ["sync", "nothing"],
    ["sync", "no/such/folder"],
    ["sync", "."],
    ["ui", "--port", "0x"],
    ["ui", "--port", "99999999"],
    ["variants", "--dataset", "imagenet"],
    ["bench", "layer", "--variant", "nothing"],
    ["bench", "layer", "--tokens", "0"],
    ["jobs", "list", "--ray-jobs", "http://127.0.0.1:1"],
    ["jobs", "logs", "x", "--ray-jobs", "nonsense"],
    ["submit", "ui"],
    ["submit", "tune", "--nothing"],
    ["nothing"],
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("words", WALK, ids=lambda words: " ".join(words)[-60:])
def test_a_wrong_input_is_one_clear_line(erpe, words, tmp_path):
    code, said = erpe(words)
    assert code in (1, 2), said
    message = [each for each in said.strip().splitlines() if each.strip()][-1] if code == 2 else said
    assert "\n" not in message.strip() and 8 < len(message) < MOST, message
    internal = ("None", "pydantic", "pickle", "codec", "Errno", ".str:", "Value error")
    assert "Traceback" not in said and not any(word in message for word in internal), message
    left = {path.name for path in tmp_path.iterdir()} - {"runs", "a store", "file", "data"}
    assert all(name.endswith(".toml") for name in left), f"something was made: {left}"


def test_commands_that_an_error_names_are_of_the_same_store():
    text = "x: gone; `erpe sync` sends it, `erpe status a --store b` shows it, `mlflow gc` does not"
    there = "x: gone; `erpe sync --store 'a store'` sends it, `erpe status a --store b` shows it, `mlflow gc` does not"
    assert with_store(text, ["status", "--store", "a store"]) == with_store(text, ["--store=a store"]) == there
    assert with_store(text, ["status"]) == with_store(text, ["status", "--store", "runs"]) == text
    assert not os.path.exists("a store")


def test_a_warning_names_commands_of_the_same_store(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    said = []
    _check_tracking(Store(tmp_path / "a store"), SimpleNamespace(on_warning=said.append))
    assert f"`erpe sync --store '{tmp_path}/a store'` sends it" in said[0]
