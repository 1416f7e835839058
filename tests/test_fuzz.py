"""Whatever bytes and words are given: success, or one line that says what is wrong; no other exception, at once."""

import contextlib
import io
import json
import os
import shutil
import sqlite3
import sys
import tempfile
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from toys import work
from trials import STUDIES, tiny

from erpe.cli import app
from erpe.cli.options import parse_settings
from erpe.cli.trials import status_rows, status_table
from erpe.errors import ErpeError
from erpe.inference import predict
from erpe.io import read_arrays
from erpe.model import build
from erpe.report.charts.curves import _read as read_example
from erpe.search.tune import tune
from erpe.store import Store
from erpe.study.plan_file import load_plan
from erpe.study.reading import read_studies
from erpe.study.records import TrialRecord
from erpe.study.search_space import load_space
from erpe.study.spec import define
from erpe.tracking import artifacts
from erpe.tracking.cursor import Cursor
from erpe.tracking.history import Journal, read_history
from erpe.training.checkpoint import load_model, load_tensors, save_tensors
from erpe.training.outcome import read_outcome
from erpe.training.trial import Trial

CONFIG = tiny("favor_rope", {"model.width": 8, "model.depth": 1, "train.epochs": 2, "data.train_limit": 20})
few = settings(max_examples=40, deadline=30_000, suppress_health_check=[HealthCheck.function_scoped_fixture])
BITS = st.binary(max_size=40) | st.sampled_from(
    [
        b"[" * 5000,
        b'{"a":' * 5000,
        b"1e999",
        b"-1",
        b"NaN",
        b"9" * 5000,
        b"\xff" * 8,
        b"null",
        b"[]",
        b"{}",
        b'"\\ud800"',
    ]
)
"""What is put into a file: noise, and what hurts parsers."""


@st.composite
def edits(draw):
    """Where in a file (in parts of it), how much of it goes, and what comes instead."""
    return [
        (draw(st.floats(0, 1)), draw(st.integers(0, 40) | st.just(10**9)), draw(BITS))
        for _ in range(draw(st.integers(1, 3)))
    ]


def edited(data, changes):
    for place, length, new in changes:
        start = int(place * len(data))
        data = data[:start] + new + data[start + length :]
    return data


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


def replaced(tree, draw_at, value):
    """A JSON value with another in one place of it."""
    places = []

    def walk(node, path):
        places.append(path)
        items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
        for key, inner in items:
            walk(inner, (*path, key))

    walk(tree, ())
    *path, last = places[int(draw_at * (len(places) - 1))] or [None]
    if last is None:
        return value
    node = tree
    for key in path:
        node = node[key]
    node[last] = value
    return tree


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """The folder of a finished trial, the checkpoint of one that goes on, a history."""
    folder = tmp_path_factory.mktemp("fuzz")
    trial = Trial(CONFIG, folder / "trial")
    trial.epoch()
    shutil.copy(folder / "trial/training.safetensors", folder)
    trial.epoch()
    trial.finish()
    np.savez_compressed(folder / "trial/predictions.npz", predicted=np.zeros(9, np.uint8), labels=np.zeros(9, np.uint8))
    journal = Journal(folder)
    journal.start({"version.erpe": "1"})
    for step in range(1, 6):
        journal.epoch({"epoch": float(step), "val/accuracy": 0.5})
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(folder / "picture.png")
    Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3)).save(folder / "picture.jpg")
    store = Store.open(folder / "store")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", "nowhere://")  # making a database takes seconds
        tune(define("relu", "digits", epochs=1), store, trials=1, executor="inline", work=work())
        cursor = Cursor(store, "s")
        cursor.runs = {"s-0": (3, "COMPLETE")}
        cursor.write()
        shutil.copy(cursor.path, folder / "cursor.json")
    return folder


@pytest.fixture
def folder(original, tmp_path):
    return shutil.copytree(original, tmp_path / "folder")


@contextlib.contextmanager
def one_line():
    """Success, or an error of ours."""
    try:
        yield
    except ErpeError as error:
        assert len(str(error)) < 2000


def spoil(original, folder, name, changes):
    (folder / name).write_bytes(edited((original / name).read_bytes(), changes))


READERS = {
    "trial/model.safetensors": lambda folder: load_model(folder / "trial"),
    "trial/config.json": lambda folder: load_model(folder / "trial"),
    "trial/outcome.json": lambda folder: (read_outcome(CONFIG, folder / "trial"), artifacts.facts(folder / "trial")),
    "trial/attention.npz": lambda folder: read_example(folder / "trial/attention.npz"),
    "trial/predictions.npz": lambda folder: read_arrays(folder / "trial/predictions.npz"),
    "training.safetensors": lambda folder: load_tensors(folder / "training.safetensors"),
    "history.jsonl": lambda folder: (history_of(folder), Journal(folder).start({})),
    "cursor.json": lambda folder: cursor_of(folder),
    "picture.png": lambda folder: predict(folder / "trial", folder / "picture.png"),
    "picture.jpg": lambda folder: predict(folder / "trial", folder / "picture.jpg"),
    "store/erpe.json": lambda folder: Store.open(folder / "store"),
    "store/optuna.db": lambda folder: read_studies(copy_of(folder / "store")),
}


def copy_of(store):
    """In a place of its own: what SQLite remembers of another file is not asked."""
    return Store.open(shutil.copytree(store, tempfile.mkdtemp(dir=store.parent), dirs_exist_ok=True))


def history_of(folder):
    trial = TrialRecord(0, "s-0", "RUNNING", CONFIG, dict.fromkeys(range(1, 6), 0.5), None, None, None)
    return read_history(trial, folder, define("relu", "digits"))


def cursor_of(folder):
    store = Store(folder / "store")
    shutil.copy(folder / "cursor.json", Cursor(store, "s").path)
    return Cursor(store, "s").runs


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
@given(changes=edits())
@few
def test_a_spoiled_file_is_read_or_is_one_line(original, folder, name, changes):
    spoil(original, folder, name, changes)
    with one_line():
        READERS[name](folder)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["confusion.json", "outcome.json", "attention.npz"])
@given(changes=edits(), place=st.floats(0, 1), value=JSON)
@settings(few, max_examples=8)
def test_a_figure_of_nonsense_is_drawn_or_left_out(original, tmp_path, name, changes, place, value):
    source, alone = original / "trial" / name, tmp_path / "trial"
    alone.mkdir(exist_ok=True)
    (alone / name).write_bytes(edited(source.read_bytes(), changes))
    artifacts.draw(alone, tmp_path)
    if name.endswith(".json"):
        (alone / name).write_text(json.dumps(replaced(json.loads(source.read_text()), place, value)))
        artifacts.draw(alone, tmp_path)


ATTRIBUTES = ["study/erpe.study", "study/erpe.final.0", "trial/erpe.config", "trial/erpe.end"]


@pytest.mark.slow
@pytest.mark.parametrize("attribute", ATTRIBUTES)
@given(place=st.floats(0, 1), value=JSON)
@settings(few, max_examples=15)
def test_nonsense_in_the_database_is_read_or_is_one_line(original, tmp_path, attribute, place, value):
    kind, _, key = attribute.partition("/")
    shutil.copytree(original / "store", tmp_path / "store", dirs_exist_ok=True)
    store = copy_of(tmp_path / "store")
    where = (f"{kind}_user_attributes", key)
    with closing(sqlite3.connect(store.root / "optuna.db")) as database:
        ((known,),) = database.execute(f"SELECT value_json FROM {where[0]} WHERE key = ?", (key,)).fetchall()
        told = json.dumps(replaced(json.loads(known), place, value))
        database.execute(f"UPDATE {where[0]} SET value_json = ? WHERE key = ?", (told, key))
        database.commit()
    with one_line():
        status_table(status_rows(store, None))


@pytest.mark.parametrize("name", [name for name in READERS if name.endswith((".json", ".ack"))])
@given(place=st.floats(0, 1), value=JSON)
@few
def test_well_formed_nonsense_is_read_or_is_one_line(original, folder, name, place, value):
    (folder / name).write_text(json.dumps(replaced(json.loads((original / name).read_text()), place, value)))
    with one_line():
        READERS[name](folder)


@given(place=st.floats(0, 1), value=JSON)
@few
def test_a_checkpoint_with_other_facts_is_set_aside_or_goes_on(original, folder, place, value):
    """The facts are not in the checksum of the tensors: whoever may write them may write that, too."""
    tensors, facts = load_tensors(original / "training.safetensors")
    found = replaced(facts, place, value)
    shutil.rmtree(folder / "trial")
    save_tensors(folder / "trial/training.safetensors", tensors, found)
    trial = Trial(CONFIG, folder / "trial")
    assert trial.warning is not None or len(trial.history) <= 1
    trial.epoch()


@given(place=st.floats(0, 1), value=JSON)
@few
def test_an_outcome_with_other_facts_is_played_or_trained_again(original, folder, place, value):
    facts = json.loads((original / "trial/outcome.json").read_text())
    (folder / "trial/outcome.json").write_text(json.dumps(replaced(facts, place, value)))
    found = read_outcome(CONFIG, folder / "trial")
    assert found is None or all(isinstance(x, int | float) for entry in found["history"] for x in entry.values())


@pytest.mark.parametrize("file", ["digits_nine", "encoding_axes", "space"])
@given(changes=edits())
@few
def test_a_spoiled_study_or_space_file_is_one_line(tmp_path, file, changes):
    path = tmp_path / f"{file}.toml"
    path.write_bytes(edited((STUDIES / f"{file}.toml").read_bytes(), changes))
    with one_line():
        load_space(path, "favor_rope", "mnist") if file == "space" else load_plan(path)


PLANS = st.sampled_from(
    ["name", "variants", "seed", "dataset", "search.trials", "search.epochs", "confirm.seeds", "switches", "settings",
     'switches."model.patch"', 'settings."model.width"', 'space."model.depth"', 'space."train.lr"', "x", "a.b", ""]
)  # fmt: skip
VALUES = st.text(max_size=10) | st.sampled_from(
    ["0", "-1", "1e999", "nan", "9" * 400, "9" * 5000, "[" * 3000, "{low=0,high=9999999999999}", "[1,2,3]", "65535",
     "{low=1,high=2,log=1}", "1979-99-99", "[[]]", "true", "''", "'\\u202e'", "\x1b[31m", "[2, 4]", "{}", "\udcff"]
)  # fmt: skip
WORDS = st.text(st.characters(exclude_characters="\0", exclude_categories=()), max_size=12) | st.sampled_from(
    ["--help", "--json", "--store", "--set", "-v", "relu", "-d", "digits", "--epochs", "-1", "x" * 5000, "--port", ".",
     "/dev/null", "--server", "http://[", "://", "http://\udcff:1/", "--format", "csv", "=", "a=b", "..", "--live=1"]
)  # fmt: skip
COMMANDS = st.sampled_from(
    [("status",), ("study", "status"), ("compare",), ("report",), ("predict",), ("sync",), ("study", "show"), (),
     ("variants",), ("study", "schema"), ("--version",), ("tune", "-v", "relu", "-d", "digits", "--trials", "0")]
)  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """An empty folder to run in, with an empty store."""
    home, before = tmp_path_factory.mktemp("home"), Path.cwd()
    Store.open(home / "runs")
    os.chdir(home)
    yield home
    os.chdir(before)


def call(words):
    """The command line in this process -> its exit code; another exception goes through."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["erpe", *words])
        strict = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")  # as a terminal: no lone surrogates
        with contextlib.redirect_stdout(strict), contextlib.redirect_stderr(io.StringIO()) as told:
            try:
                app.main()
            except SystemExit as end:
                assert "Traceback" not in told.getvalue()
                return end.code or 0
    return 0


@pytest.mark.slow
@given(line=st.builds("{} = {}".format, PLANS, VALUES))
@few
def test_any_line_of_a_study_file_is_taken_or_refused(home, line):
    assert call(["study", "show", str(STUDIES / "digits_nine.toml"), "--set", line]) in (0, 1, 2)


@pytest.mark.slow
@given(command=COMMANDS, words=st.lists(WORDS, max_size=4))
@settings(few, max_examples=150)
def test_any_command_line_is_done_or_refused(home, command, words):
    assert call([*command, *words]) in (0, 1, 2)


@given(
    name=st.sampled_from(["train.lr", "model.heads", "model.features", "data.train_limit", "x", "model"]), value=VALUES
)
@few
def test_any_setting_is_taken_or_refused(home, name, value):
    with contextlib.suppress(ErpeError):
        build(tiny().replace(parse_settings([f"{name}={value}"])).model)


def test_the_fuzz_tests_read_what_they_would_spoil(original):
    """Unspoiled, everything is read: otherwise nothing is tested."""
    for reader in READERS.values():
        reader(original)
    assert read_outcome(CONFIG, original / "trial") and cursor_of(original)
    assert len(history_of(original).points["val/accuracy"]) == 5
