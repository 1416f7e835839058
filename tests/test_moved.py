"""A store is its folder: moved, copied or renamed it goes on, and nothing is written where it was or beside it."""

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import urllib.request
import uuid
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from mlflow_server import await_server, free_port, rows
from sqlalchemy.engine import make_url
from toys import work
from trials import TINY

import erpe
from erpe.cli import app
from erpe.cli.ui import server
from erpe.errors import StoreError, TrackingError
from erpe.search.tune import tune
from erpe.store import Store, sqlite_path, sqlite_url
from erpe.study.spec import define
from erpe.tracking.relocation import relocate
from erpe.tracking.tracker import sync

STUDY, RUN = "digits-softmax", "0" * 32
SPEC = define("softmax", "digits", settings=TINY | {"train.epochs": 1}, sampler="random", pruner="none")
NAMES = st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=60).filter(
    lambda name: name not in (".", "..") and not name.startswith("~")
)
slow = pytest.mark.slow


@given(st.lists(NAMES, min_size=1, max_size=4), NAMES)
@example(["job%20x", "a?b=c"], "%")
@example(["a\nb", "-x#;&'\"\\"], "é")
def test_an_address_spells_its_file_and_no_other(folders, name):
    path = Path("/", *folders, name)
    address = sqlite_url(path)
    assert sqlite_path(address) == path and make_url(address).database == str(path)
    # MLflow makes the folder that the address spells
    assert Path(address.removeprefix("sqlite:///")).parent in (path.parent, Path())


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=50)
@given(NAMES, NAMES, NAMES)
def test_artifacts_are_where_the_database_is(tmp_path, before, after, experiment):
    with tempfile.TemporaryDirectory(dir=tmp_path) as parent:
        try:
            (root := Path(parent, after)).mkdir()
        except OSError:
            return  # too long for a file system
        (root / "erpe.json").touch()
        inside = Path(experiment, RUN, "artifacts", "model")
        old, database = Path("/", before, "artifacts") / inside, sqlite_url(root / "mlflow.db")
        found = relocate(old.as_uri(), database)
        assert found == (root / "artifacts" / inside).as_uri() and relocate(found, database) == found


@pytest.mark.parametrize(
    "address",
    [
        f"s3://bucket/artifacts/x/{RUN}",
        f"file:///mlruns/0/{RUN}/artifacts",
        "mlflow-artifacts:/1/x",
        f"file:///s/artifacts/x/{RUN}/../../../../y",
        f"file:///s/artifacts/x/{RUN}/%2e%2e/y",
    ],
)
def test_any_other_address_stays_as_it_is(tmp_path, address):
    (tmp_path / "erpe.json").touch()
    assert relocate(address, sqlite_url(tmp_path / "mlflow.db")) == address
    own = f"file:///s/artifacts/x/{RUN}"
    assert relocate(own, "http://host/erpe.json") == relocate(own, sqlite_url(tmp_path / "no" / "m.db")) == own


def search(store, trials):
    tune(SPEC, store, trials=trials, executor="inline")


@pytest.fixture(scope="module")
def finished(tmp_path_factory, empty_database):
    """A study of two trials that MLflow has with its champion; change a copy, not it."""
    store = Store.open(tmp_path_factory.mktemp("made") / "the original")
    shutil.copy(empty_database, store.root / "mlflow.db")
    search(store, 2)
    assert sync(store) == {STUDY: 0}
    return store


def contents(folder):
    """Every file below a folder, and what is in it."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def run_ids(store):
    return {run for (run,) in rows(store.root / "mlflow.db", "SELECT run_uuid FROM runs")}


def command(*words):
    """Its exit status: 0 is well."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["erpe", *words])
        with pytest.raises(SystemExit) as ended:
            app.main()
        return ended.value.code


@slow
@pytest.mark.parametrize(("name", "copied"), [("job%20x é", True), ("a?b=c#;&'\"\n\\", False)])
def test_a_store_that_moved_goes_on_in_itself(finished, tmp_path, name, copied):
    old, parent = tmp_path / "old", tmp_path / "new/deep"
    shutil.copytree(finished.root, old)
    parent.mkdir(parents=True)
    shutil.copytree(old, parent / name) if copied else os.rename(old, parent / name)
    before = contents(old)
    store = Store.existing(parent / name)
    search(store, 3)
    assert sync(store) == {STUDY: 0}
    assert run_ids(store) > run_ids(finished), "a trial more"
    for words in (["status"], ["sync"], ["gc", STUDY, "--keep-best", "1"]):
        assert not command(*words, "--store", str(store.root))
    assert {path.name for path in (store.artifacts / STUDY).iterdir()} == run_ids(store)
    assert run_ids(finished) - run_ids(store), "what gc removed"
    champion(store)
    assert contents(old) == before and old.exists() == copied
    assert [path.name for path in parent.iterdir()] == [name]
    assert {path.name for path in tmp_path.iterdir()} == ({"old", "new"} if copied else {"new"})


def champion(store):
    import mlflow

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", store.tracking_uri)  # MLflow changes it, too
        mlflow.set_tracking_uri(store.tracking_uri)
        try:
            found = mlflow.pyfunc.load_model(f"models:/{STUDY}@champion").predict(np.zeros((2, 1, 8, 8), np.uint8))
        finally:
            mlflow.set_tracking_uri(None)
    assert found.shape == (2, 10)


@slow
def test_the_ui_shows_the_files_of_a_store_that_moved(finished, tmp_path):
    store = Store.existing(shutil.copytree(finished.root, tmp_path / "a%20b?c"))
    [(run,)] = rows(store.root / "mlflow.db", "SELECT run_uuid FROM runs WHERE name = ?", f"{STUDY}/0")
    (store.artifacts / STUDY / run / "note.txt").parent.mkdir(exist_ok=True)
    (store.artifacts / STUDY / run / "artifacts" / "note.txt").write_text("moved")
    port = free_port()
    words, environment = server(store, port)
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(words, env=environment, stdout=log, stderr=log, cwd=tmp_path, start_new_session=True)
    try:
        await_server(f"http://127.0.0.1:{port}", process, tmp_path / "log")
        address = f"http://127.0.0.1:{port}/get-artifact?path=note.txt&run_uuid={run}"
        with urllib.request.urlopen(address, timeout=60) as answer:
            assert answer.read() == b"moved"
    finally:
        os.killpg(process.pid, 9)
        process.wait()
    assert {path.name for path in tmp_path.iterdir()} == {"a%20b?c", "log"}


@slow
def test_a_database_elsewhere_that_keeps_artifacts_of_another_store_is_refused(finished, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", sqlite_url(Path(shutil.copy(finished.root / "mlflow.db", tmp_path))))
    store = Store.existing(shutil.copytree(finished.root, tmp_path / "another"))
    shutil.rmtree(store.artifacts / STUDY)
    before = contents(finished.root)
    with pytest.raises(TrackingError, match=r"outside of this store .*; open that store, or use another MLFLOW_TRACK"):
        sync(store)
    assert contents(finished.root) == before


@slow
def test_a_store_with_its_databases_on_postgresql_goes_on_in_itself(postgres, tmp_path, monkeypatch):
    monkeypatch.setenv("ERPE_STORAGE_URL", postgres.url)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", postgres.create(f"{uuid.uuid4()}"))
    old, moved, copied = tmp_path / "old", tmp_path / "a?b=c", tmp_path / "copied%20"
    search(Store.open(old), 1)
    os.rename(old, moved)
    search(store := Store.existing(moved), 2)
    assert sync(store) == {STUDY: 0} and len(list((store.artifacts / STUDY).iterdir())) == 3, "and its parent"
    champion(store)
    before = contents(shutil.copytree(moved, copied))
    search(store := Store.existing(copied), 3)
    assert sync(store) == {STUDY: 0} and len(list((store.artifacts / STUDY).iterdir())) == 4
    assert not command("gc", STUDY, "--keep-best", "1", "--store", str(copied))
    assert contents(moved) == before, "the copy left the original alone"
    assert sync(Store.existing(moved)) == {STUDY: 0}, "which goes on, too"
    shutil.rmtree(moved)
    assert sync(store) == {STUDY: 0}
    champion(store)
    assert {path.name for path in tmp_path.iterdir()} == {copied.name}


BYTES = os.fsdecode(b"not\xffUTF-8 %20?")
DIGIT = str(Path(__file__).parent.parent / "studies/digit.png")


@slow
def test_a_study_that_moved_is_compared_reported_loaded_and_used_where_it_is(digits_study, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    place = tmp_path / "there" / "a?b=c#%20"
    shutil.copytree(digits_study.root, place, ignore=shutil.ignore_patterns("ray"))
    before = contents(digits_study.root)
    for words in (
        ["compare", "digits-nine", "--output", "table.txt"], ["report", "digits-nine", "--output", "page.html"],
        ["status", "digits-nine"], ["predict", "digits-nine", DIGIT], ["gc", "--keep-best", "1", "--dry-run"],
    ):  # fmt: skip
        assert not command(*words, "--store", str(place)), words
    study = erpe.load_study("digits-nine", place)
    assert study.model("relu").predict(np.zeros((1, 1, 8, 8), np.uint8)).shape == (1, 10)
    assert contents(digits_study.root) == before
    assert {path.name for path in tmp_path.iterdir()} == {"there", "table.txt", "page.html"}


def test_a_folder_whose_name_is_not_utf8_is_refused_in_one_line_and_left_alone(tmp_path, monkeypatch, capsys):
    """No address of SQLite can spell it."""
    place = tmp_path / BYTES
    place.mkdir()
    for words in (["variants"], ["status", "--store", str(place)], ["status", "--store", f"{place}/runs"]):
        code = command(*words)
        assert bool(code) == (words != ["variants"])
    assert not list(place.iterdir())
    monkeypatch.chdir(place)
    assert command("tune", "-v", "relu", "-d", "digits", "--executor", "inline")
    assert "its path is not UTF-8" in capsys.readouterr().err and not list(place.iterdir())


def test_a_store_that_moved_before_its_first_trial_and_after_ctrl_c_goes_on(tmp_path):
    def start(store, trials, accident=None):
        return tune(SPEC, store, trials=trials, executor="inline", work=work(accident=accident))

    def no_data(folder, number):
        raise StoreError("the disk is full")  # stops the command before a trial has an epoch

    def ctrl_c(folder, number):
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", "nowhere://")
        with pytest.raises(StoreError, match="the disk is full"):
            start(Store.open(tmp_path / "a"), 2, no_data)
        os.rename(tmp_path / "a", tmp_path / "b")
        assert start(Store.existing(tmp_path / "b"), 2, ctrl_c).interrupted
        os.rename(tmp_path / "b", tmp_path / "c")
        result = start(Store.existing(tmp_path / "c"), 2)
    assert result.counts == {"COMPLETE": 2} and result.folder.is_relative_to(tmp_path / "c")
    assert [path.name for path in tmp_path.iterdir()] == ["c"]
