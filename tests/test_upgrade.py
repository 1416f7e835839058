"""A store of every released version, frozen in `tests/fixtures`: this version opens it and goes on with it."""

import contextlib
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from fixtures.make import FIXTURES, TRIALS, logits, trials
from mlflow_server import rows

import erpe
from erpe.cli import app
from erpe.search.run_study import run
from erpe.search.tune import tune
from erpe.store import Store
from erpe.study.plan import Plan
from erpe.study.spec import define
from erpe.tracking.tracker import sync

FROZEN = sorted(FIXTURES.glob("store-*"))
pytestmark = pytest.mark.parametrize("frozen", FROZEN, ids=lambda path: path.name)


@pytest.fixture
def expected(frozen):
    return json.loads((frozen / "expected.json").read_text())


@pytest.fixture
def store(frozen, tmp_path):
    """A copy; what is frozen stays as it is."""
    return Store.existing(shutil.copytree(frozen / "store", tmp_path / "store"))


def test_it_is_small_and_names_no_machine(frozen):
    files = [path for path in frozen.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 500_000
    for path in files:
        assert not path.is_symlink() and path.suffix not in (".ack", ".lock", ".pkl"), path
        data = path.read_bytes()
        assert not [place for place in (b"/tmp/", b"/home/", b"/root/", b"/Users/", b"file:/") if place in data], path


def test_every_trial_is_as_it_was_written(store, expected):
    assert trials(store) == expected["trials"]


def test_every_model_says_what_it_said(store, expected):
    assert len(expected["logits"]) == 8
    for folder, said in expected["logits"].items():
        torch.testing.assert_close(logits(store.root / folder), torch.tensor(said), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_the_commands_show_it(store, expected, monkeypatch, capsys, tmp_path):
    def command(*words):
        monkeypatch.setattr(sys, "argv", ["erpe", *words, "--store", str(store.root)])
        with contextlib.suppress(SystemExit):
            app.main()
        return capsys.readouterr().out

    monkeypatch.chdir(tmp_path)
    assert "frozen-tune: 2 complete, 1 unfinished" in command("status", "frozen-tune")
    assert "frozen: done" in command("study", "status")
    table = command("compare", "frozen", "--format", "csv")
    assert "test/accuracy" in table and table.count("relu_rope") > 10
    command("report", "frozen", "--output", "page.html")
    page = Path("page.html").read_text()
    assert "relu_rope" in page and page.count("<figure>") > 5


def test_load_study_gives_its_tables_and_models(store, expected):
    study = erpe.load_study("frozen", store.root)
    assert len(study.runs) == 4 and len(study.trials) == 2 and len(study.epochs) == 12
    seeds = {trial["uid"] for name, found in expected["trials"].items() if ".confirm-" in name for trial in found}
    assert set(study.runs["uid"]) == seeds
    assert study.best("softmax").model.width == 8 and not study.model("relu_rope").training


def of(study, found):
    return {name: each for name, each in found.items() if name.startswith(study)}


@pytest.mark.slow
def test_the_study_is_done_and_its_command_repeats_nothing(store, expected):
    result = run(Plan(**expected["plan"]), store, executor="inline", offline=True)
    assert result.confirmed == {"softmax": 2, "relu_rope": 2} and not result.failed
    assert trials(store) == expected["trials"]


def test_an_interrupted_search_goes_on_where_it_was(store, expected, monkeypatch):
    """The third trial keeps its number, its seed and its first epoch; then a fourth is new."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nowhere://")  # refused at once; a server that is down is waited for
    tune(define(**expected["tune"]), store, trials=TRIALS + 1, name="frozen-tune", executor="inline")
    before, after = expected["trials"]["frozen-tune"], trials(store)["frozen-tune"]
    assert after[: TRIALS - 1] == before[: TRIALS - 1]
    assert [trial["state"] for trial in after] == ["COMPLETE"] * (TRIALS + 1)
    old, new = before[-1], after[TRIALS - 1]
    assert (new["uid"], new["seed"]) == (old["uid"], old["seed"]) and old["epochs"].items() < new["epochs"].items()
    assert of("frozen.", trials(store)) == of("frozen.", expected["trials"])
    assert not list(store.checkpoints.rglob("*.damaged"))


@pytest.mark.slow
def test_it_fills_a_new_mlflow(store, expected, empty_database):
    shutil.copy(empty_database, store.root / "mlflow.db")
    assert set(sync(store, timeout=240).values()) == {0}
    told = "SELECT t.value, count(DISTINCT m.step) FROM tags t JOIN metrics m USING (run_uuid)"
    query = f"{told} WHERE t.key = 'erpe.trial_uid' AND m.key = 'train/loss' GROUP BY t.value"
    known = {trial["uid"]: len(trial["epochs"]) for found in expected["trials"].values() for trial in found}
    assert dict(rows(store.root / "mlflow.db", query)) == known
