import getpass
import json
import os
import platform
import shutil
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from forks import Fork
from mlflow_server import free_port, hanging_server, mlflow_server, rows

from erpe.config import defaults
from erpe.errors import StoreError, StudyError, TrackingError
from erpe.store import Store
from erpe.text import redact
from erpe.tracking.artifacts import draw
from erpe.tracking.connection import probe
from erpe.tracking.outbox import Outbox
from erpe.tracking.provenance import collect
from erpe.tracking.publisher import Sender
from erpe.tracking.tracker import Tracker, lags, sync

STUDY = "relu_general-digits"
CONFIG = defaults("relu_general", "digits")

slow = pytest.mark.slow


@pytest.fixture
def store(tmp_path, monkeypatch):
    for name in ("MLFLOW_TRACKING_URI", "ERPE_STORAGE_URL"):
        monkeypatch.delenv(name, raising=False)
    return Store.open(tmp_path / "store")


@pytest.fixture
def embedded(store, empty_database):
    """A store whose MLflow database is there already."""
    shutil.copy(empty_database, store.root / "mlflow.db")
    return store


def results(folder, seed=0):
    """What training writes for a completed trial."""
    from erpe.model import build
    from erpe.training.checkpoint import save_model

    folder.mkdir(parents=True, exist_ok=True)
    save_model(folder, build(CONFIG.model, seed).eval(), CONFIG)
    history = [{"epoch": n, "train/loss": 2 / n, "val/loss": 2.1 / n, "val/accuracy": 1 - 1 / n} for n in (1, 2, 3)]
    outcome = {"metrics": {}, "history": history, "data_sha256": "d" * 64, "device": "cpu"}
    (folder / "outcome.json").write_text(json.dumps(outcome))
    matrix = np.eye(10, dtype=int).tolist()
    names = [str(n) for n in range(10)]
    for name, split in (("confusion.json", "validation"), ("confusion_test.json", "test")):
        (folder / name).write_text(json.dumps({"split": split, "classes": names, "matrix": matrix}))
    maps = np.full((4, 4, 16, 16), 1 / 16)
    np.savez_compressed(folder / "attention.npz", image=np.zeros((1, 8, 8)), maps=maps, grid=np.array((4, 4)))
    return folder


def play(store, tracker, *, files=False):
    """A small study: trial 0 completes, trial 1 is pruned, trial 2 fails. A restart makes the same calls again."""
    tracker.start_study("s", {"variant": "relu_general", "pair": (1, 2)}, {"variant": "relu_general"})
    folder = results(store.trial_folder(STUDY, 0, 0)) if files else None
    for n in range(3):
        uid = f"s:{n}"
        tracker.start_trial(uid, n, CONFIG, {"seed": str(n), "dataset": "digits"}, parent="s")
        for step in range(1, (2 if n == 1 else 3) + 1):
            tracker.epoch(uid, step, {"val/accuracy": step / 10 + n / 100, "train/loss": 1 / step})
        if n == 1:
            tracker.end_trial(uid, "PRUNED", {}, None, "pruned after epoch 2")
        elif n == 2:
            tracker.end_trial(
                uid, "FAIL", {}, None, "Traceback (most recent call last):\n  ...\nTrialError: loss is nan"
            )
        else:
            final = {"val/accuracy": 0.3, "params": 1e5, "memory/peak_mib": float("nan")}
            tracker.end_trial(uid, "COMPLETE", final, folder, None)
    tracker.end_study("s", "s:0", {"test/accuracy": 0.5}, folder, "COMPLETE", model=STUDY)


def metrics(database, study=STUDY):
    """{(run name, key): [(step, value), ...]} of every row MLflow has."""
    query = (
        "SELECT r.name, key, step, value, is_nan FROM metrics JOIN runs r USING (run_uuid) "
        "JOIN experiments e USING (experiment_id) "
        "WHERE r.lifecycle_stage = 'active' AND e.name = ? ORDER BY step"
    )
    found = {}
    for name, key, step, value, is_nan in rows(database, query, study):
        found.setdefault((name, key), []).append((step, "nan" if is_nan else value))
    return found


def test_a_study_that_has_only_started_leaves_the_machine_to_the_workers(embedded, monkeypatch):
    monkeypatch.setattr("erpe.tracking.tracker.BEGIN_SECONDS", 3600.0)
    steps = []
    monkeypatch.setattr(Sender, "step", lambda self: steps.append("step"))
    tracker = Tracker(embedded, STUDY)
    tracker.start_study("s", {}, {})
    tracker.start_trial("s:0", 0, CONFIG, {}, parent="s")
    time.sleep(0.2)
    assert not steps
    tracker.epoch("s:0", 1, {"val/accuracy": 0.5})
    until = time.monotonic() + 60
    while not steps and time.monotonic() < until:
        time.sleep(0.01)
    assert steps
    tracker.close(5)


EXPECTED = {
    (STUDY, "test/accuracy"): [(0, 0.5)],
    ("trial 0", "params"): [(3, 1e5)],
    ("trial 0", "memory/peak_mib"): [(3, "nan")],
    **{(f"trial {n}", "val/accuracy"): [(s, s / 10 + n / 100) for s in (1, 2, 3)[: 3 - (n == 1)]] for n in range(3)},
    **{(f"trial {n}", "train/loss"): [(s, 1 / s) for s in (1, 2, 3)[: 3 - (n == 1)]] for n in range(3)},
}


def tags(database, name):
    query = "SELECT key, value FROM tags JOIN runs USING (run_uuid) WHERE name = ? AND lifecycle_stage = 'active'"
    return dict(rows(database, query, name))


def names(database):
    return [name for (name,) in rows(database, "SELECT name FROM runs WHERE lifecycle_stage = 'active' ORDER BY name")]


def send(store, *, files=False):
    tracker = Tracker(store, STUDY)
    play(store, tracker, files=files)
    assert tracker.close(120) == 0, tracker.problem
    assert tracker.problem is None
    return store.root / "mlflow.db"


# What is recorded, without MLflow


def test_calling_again_records_nothing_even_in_a_new_process(store):
    first = Tracker(store, STUDY, send=False)
    play(store, first)
    lines = first.lag()
    for again in (1, 2):
        play(store, Tracker(store, STUDY, send=False))
        assert lags(store) == {STUDY: lines + 2 * again}  # the study went on, and ended


def test_the_first_word_on_an_epoch_counts(store):
    for value in (0.1, 0.2):
        Tracker(store, STUDY, send=False).epoch("s:0", 1, {"val/accuracy": value})
    (event,) = [event for event, _ in Sender(store, STUDY).outbox.read(0)]
    assert event.metrics == {"val/accuracy": 0.1}


def test_two_processes_record_an_epoch_once(store):
    first, second = Tracker(store, STUDY, send=False), Tracker(store, STUDY, send=False)
    for step in (1, 2, 3):
        first.epoch("s:0", step, {"val/accuracy": 0.1})
        second.epoch("s:0", step, {"val/accuracy": 0.2})
    assert lags(store) == {STUDY: 3}


def test_a_final_measure_that_replaces_an_epochs_comes_after_it(store):
    tracker = Tracker(store, STUDY, send=False)
    tracker.epoch("s:0", 1, {"val/accuracy": 0.1, "val/loss": 2.0})
    for _ in range(2):
        tracker.end_trial("s:0", "COMPLETE", {"val/accuracy": 0.15, "val/loss": 2.0}, None, None)
    *_, (end, _) = Sender(store, STUDY).outbox.read(0)
    assert end.metrics == {"val/accuracy": 0.15} and end.step == 2 and tracker.lag() == 2


def test_a_folder_in_the_store_moves_with_it(store):
    tracker = Tracker(store, STUDY, send=False)
    tracker.end_trial("s:0", "COMPLETE", {}, store.trial_folder(STUDY, 0, 0), None)
    ((event, _),) = Sender(store, STUDY).outbox.read(0)
    assert event.folder == f"checkpoints/{STUDY}/0000-0"


@pytest.mark.timeout(60)  # a call that waited for an answer would take minutes
def test_a_call_returns_while_no_server_is_there(store, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port()}")
    tracker = Tracker(store, STUDY)
    for step in range(100):
        tracker.epoch("s:0", step, {"val/accuracy": 0.5})
    assert tracker.lag() == 100
    tracker.close(0)


def test_an_outbox_that_cannot_be_written_is_one_line(store):
    tracker = Tracker(store, STUDY, send=False)
    shutil.rmtree(store.outbox)
    store.outbox.write_text("a file")
    with pytest.raises(StoreError) as error:
        tracker.epoch("s:0", 1, {})
    assert "cannot be written" in str(error.value) and "\n" not in str(error.value)


def test_no_mlflow_is_imported_until_there_is_something_to_send(store):
    script = (
        "import sys, time; from erpe.store import Store; from erpe.tracking.tracker import Tracker;"
        f"t = Tracker(Store.open({str(store.root)!r}), 'study'); time.sleep(0.5); t.close();"
        "print([name for name in ('mlflow', 'torch', 'ray', 'optuna', 'matplotlib') if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment())
    assert run.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("http://me:secret@host:5000/x", "http://host:5000/x"),
        ("postgresql+psycopg://me:se@cret@host/db", "postgresql+psycopg://host/db"),
        ("sqlite:////a/b@c.db", "sqlite:////a/b@c.db"),
    ],
)
def test_a_password_is_never_shown(uri, shown):
    assert redact(uri) == shown


@pytest.mark.parametrize(
    ("uri", "told"),
    [
        ("ftp://host", "sqlite:///FILE instead"),
        ("./mlruns", "sqlite:///FILE instead"),
        ("sqlite:////no/such/folder/mlflow.db", "unable to open"),
        ("postgresql://me:hunter22@127.0.0.1:1/mlflow", "no answer"),
        ("http://me:hunter22@127.0.0.1:1", "no answer"),
        ("http:///nohost", "not a URL"),
    ],
)
@pytest.mark.timeout(60)  # MLflow alone tries for minutes
def test_what_is_wrong_with_an_address_is_said_in_one_line_at_once(uri, told):
    line = probe(uri)
    assert told in line and redact(uri) in line and "\n" not in line and "hunter22" not in line


def test_to_sync_a_study_that_is_not_there_makes_none(store):
    Tracker(store, STUDY, send=False)
    with pytest.raises(StudyError, match=f"did you mean {STUDY}"):
        sync(store, "relu_general-digit")
    assert lags(store) == {STUDY: 0}


def test_provenance_names_code_versions_and_machine_and_nobody():
    found = collect("erpe tune", threads=3)
    assert found["mlflow.source.name"] == "erpe tune" and found["threads"] == "3"
    assert {"git_sha", "git_dirty", "lock_sha256", "version.torch", "version.ray", "platform"} <= found.keys()
    assert len(found["lock_sha256"]) == 64
    assert not {platform.node(), getpass.getuser(), str(Path.home())} & set(found.values())


def test_a_damaged_file_costs_its_own_figure_only(tmp_path):
    folder = results(tmp_path / "trial")
    (folder / "confusion.json").write_text("{")
    (folder / "attention.npz").write_bytes(b"PK no zip")
    (folder / "confusion_test.json").unlink()
    (folder / "confusion_test.json").symlink_to(folder / "outcome.json")
    (tmp_path / "out").mkdir()
    notes = draw(folder, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["learning_curves.png"]
    assert len(notes) == 2 and all("\n" not in note for note in notes)


def test_an_array_with_a_pickle_in_it_is_not_opened(tmp_path):
    folder = results(tmp_path / "trial")
    np.savez(folder / "attention.npz", image=np.array([object()]), maps=np.zeros(1), grid=np.zeros(2))
    (tmp_path / "out").mkdir()
    assert "attention.npz" in " ".join(draw(folder, tmp_path / "out"))


# What MLflow has, in the embedded database


@pytest.fixture(scope="module")
def finished(tmp_path_factory, empty_database):
    """A store after a study whose best trial has files; nobody changes it."""
    store = Store.open(tmp_path_factory.mktemp("finished") / "store")
    shutil.copy(empty_database, store.root / "mlflow.db")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.delenv("ERPE_STORAGE_URL", raising=False)
        send(store, files=True)
    return store


@slow
def test_mlflow_has_what_was_told_and_again_changes_nothing(finished):
    database = finished.root / "mlflow.db"
    assert names(database) == [STUDY, "trial 0", "trial 1", "trial 2"]
    assert metrics(database) == EXPECTED
    (parent,) = rows(database, "SELECT run_uuid FROM runs WHERE name = ?", STUDY)[0]
    for n, state in enumerate(("COMPLETE", "PRUNED", "FAIL")):
        found = tags(database, f"trial {n}")
        assert found["erpe.trial_uid"] == f"s:{n}" and found["optuna.number"] == found["seed"] == str(n)
        assert found["mlflow.parentRunId"] == parent and found["state"] == state and found["dataset"] == "digits"
    assert tags(database, "trial 2")["reason"] == "TrialError: loss is nan"
    assert tags(database, "trial 0")["data_sha256"] == "d" * 64
    assert tags(database, STUDY)["erpe.study_uid"] == "s" and "mlflow.parentRunId" not in tags(database, STUDY)
    status = dict(rows(database, "SELECT name, status FROM runs"))
    assert [status[name] for name in sorted(status)] == ["FINISHED", "FINISHED", "KILLED", "FAILED"]
    params = dict(rows(database, "SELECT key, value FROM params JOIN runs USING (run_uuid) WHERE name = 'trial 0'"))
    assert params == {key: str(value) for key, value in CONFIG.flat().items()}

    whole = rows(database, "SELECT count(*) FROM metrics"), rows(database, "SELECT count(*) FROM model_versions")
    (finished.outbox / f"{STUDY}.ack").unlink()
    assert sync(finished) == {STUDY: 0}
    assert names(database) == [STUDY, "trial 0", "trial 1", "trial 2"] and metrics(database) == EXPECTED
    assert (
        rows(database, "SELECT count(*) FROM metrics"),
        rows(database, "SELECT count(*) FROM model_versions"),
    ) == whole


@slow
def test_artifacts_are_complete_and_hold_no_pickle(finished):
    database = finished.root / "mlflow.db"
    held = {
        name: {str(p.relative_to(root)) for p in root.rglob("*") if p.is_file()}
        for name, uri in rows(database, "SELECT name, artifact_uri FROM runs")
        if (root := Path(uri.removeprefix("file://")))
    }
    figures = {f"figures/{name}.png" for name in ("learning_curves", "confusion", "confusion_test", "attention")}
    checkpoint = {f"checkpoint/{name}" for name in ("model.safetensors", "config.json", "outcome.json")}
    assert {"config.json", "confusion.json"} | figures | checkpoint <= held["trial 0"]
    assert {"study.json", "confusion_test.json"} | figures <= held[STUDY]
    assert held["trial 1"] == {"config.json"} and held["trial 2"] == {"config.json", "traceback.txt"}
    everything = {Path(name).suffix for found in held.values() for name in found}
    assert everything <= {".json", ".png", ".safetensors", ".html", ".txt", ".yaml", ".npz", ""}
    assert all(Path(name).suffix or Path(name).name == "MLmodel" for found in held.values() for name in found)


@slow
def test_the_champion_loads_and_predicts(finished):
    import mlflow
    import torch

    from erpe.training.checkpoint import load_model
    from erpe.training.data import load_test, normalise

    mlflow.set_tracking_uri(finished.tracking_uri)
    champion = mlflow.pyfunc.load_model(f"models:/{STUDY}@champion")
    images = load_test("digits").pixels[:7]
    model, _ = load_model(finished.trial_folder(STUDY, 0, 0))
    with torch.inference_mode():
        probabilities = model(normalise(images, "digits")).softmax(-1).numpy()
    np.testing.assert_allclose(champion.predict(images.numpy()), probabilities, atol=1e-6)


@slow
def test_a_database_that_was_deleted_is_filled_again(embedded, empty_database):
    database = send(embedded)
    shutil.copy(empty_database, database)
    assert Tracker(embedded, STUDY, send=False).lag() == 0  # as far as anyone can know
    tracker = Tracker(embedded, STUDY)
    tracker.epoch("s:9", 1, {"val/accuracy": 0.9})
    assert tracker.close(120) == 0
    assert {key: value for key, value in metrics(database).items() if key[0] != "s:9"} == EXPECTED


@slow
def test_a_run_that_a_killed_create_made_twice_becomes_one(embedded):
    from mlflow import MlflowClient

    tracker = Tracker(embedded, STUDY)
    tracker.start_trial("s:0", 0, CONFIG, {})
    tracker.epoch("s:0", 1, {"val/accuracy": 0.1})
    while tracker.lag():
        time.sleep(0.1)
    client = MlflowClient(embedded.tracking_uri)
    client.create_run(client.get_experiment_by_name(STUDY).experiment_id, tags={"erpe.trial_uid": "s:0"})
    tracker.end_trial("s:0", "COMPLETE", {"params": 5.0}, None, None)
    assert tracker.close(60) == 0
    database = embedded.root / "mlflow.db"
    assert names(database) == ["trial 0"]
    assert metrics(database) == {("trial 0", "val/accuracy"): [(1, 0.1)], ("trial 0", "params"): [(1, 5.0)]}


@slow
def test_a_database_whose_making_was_killed_is_made_again(store, tmp_path):
    """What is there under its name is whole: another process never meets half of the tables."""
    import sqlite3

    from erpe.tracking import connection as module

    draft = store.root / "mlflow.draft"
    killed = (
        "import os, pathlib; pathlib.Path.rename = lambda *_: os._exit(9)\n"
        f"from erpe.tracking.connection import connect; connect({store.tracking_uri!r})"
    )
    assert Fork(exec, (killed, {}), environment(), tmp_path / "log").wait() == 9
    assert draft.exists() and not (store.root / "mlflow.db").exists()
    draft.write_bytes(draft.read_bytes()[:8192])  # killed earlier still
    module.connect(store.tracking_uri).search_experiments(max_results=1)
    assert probe(store.tracking_uri) is None and not draft.exists()
    with sqlite3.connect(store.root / "mlflow.db") as database:
        assert database.execute("SELECT count(*) FROM alembic_version").fetchone() == (1,)


@slow
def test_a_run_that_a_user_deleted_stays_deleted(embedded):
    from mlflow import MlflowClient

    database = send(embedded)
    (run,) = rows(database, "SELECT run_uuid FROM runs WHERE name = 'trial 1'")[0]
    MlflowClient(embedded.tracking_uri).delete_run(run)
    (embedded.outbox / f"{STUDY}.ack").unlink()
    assert sync(embedded) == {STUDY: 0}
    assert names(database) == [STUDY, "trial 0", "trial 2"]


@slow
def test_an_event_mlflow_refuses_is_set_apart_and_tried_again_by_sync(embedded):
    tracker = Tracker(embedded, STUDY)
    tracker.start_trial("s:0", 0, CONFIG, {})
    tracker.start_trial("s:0", 0, CONFIG.replace({"train.lr": 0.5}), {})  # parameters cannot change
    tracker.epoch("s:0", 1, {"val/accuracy": 0.1})
    tracker.close(60)
    assert tracker.lag() == 0 and "refused" in tracker.problem and "\n" not in tracker.problem
    (line,) = (embedded.outbox / f"{STUDY}.refused").read_text().splitlines()
    assert "Changing param values is not allowed" in json.loads(line)["error"]
    assert metrics(embedded.root / "mlflow.db") == {("trial 0", "val/accuracy"): [(1, 0.1)]}
    with pytest.raises(TrackingError, match="refused"):
        sync(embedded)
    assert metrics(embedded.root / "mlflow.db") == {("trial 0", "val/accuracy"): [(1, 0.1)]}


@slow
@pytest.mark.parametrize("damage", ["older", "newer", "other", "garbage"])
def test_a_database_of_another_version_is_one_line_and_the_outbox_waits(embedded, damage):
    database = embedded.root / "mlflow.db"
    import sqlite3

    if damage == "garbage":
        database.write_bytes(b"no database" * 1000)
    else:
        with sqlite3.connect(database) as connection:
            version = {"older": "0a8213491aaa", "newer": "ffffffffffff", "other": "v3.0.0.d"}[damage]
            connection.execute("UPDATE alembic_version SET version_num = ?", (version,))
        connection.close()
    tracker = Tracker(embedded, STUDY)
    tracker.start_trial("s:0", 0, CONFIG, {})
    assert tracker.close(30) == 1
    assert str(database) in tracker.problem and "\n" not in tracker.problem
    assert tracker.problem == probe(embedded.tracking_uri)
    assert ("db upgrade" in tracker.problem) == (damage != "garbage")


# A server that is down, comes back, refuses, or is none


def environment():
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])}


@pytest.fixture(scope="module")
def server(tmp_path_factory, empty_database):
    """A server that answers as localhost, and refuses whoever calls it 127.0.0.1: its database and its port."""
    folder = tmp_path_factory.mktemp("server")
    shutil.copy(empty_database, folder / "server.db")
    with mlflow_server(folder / "server.db", folder / "served", allowed_hosts="localhost:*") as url:
        yield folder / "server.db", int(url.rpartition(":")[2])


@slow
def test_what_was_told_while_the_server_was_down_arrives_when_it_is_up(store, empty_database, tmp_path, monkeypatch):
    database, port = tmp_path / "server.db", free_port()
    shutil.copy(empty_database, database)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
    monkeypatch.setattr("erpe.tracking.publisher.LONGEST_PAUSE", 1.0)
    tracker = Tracker(store, STUDY)
    play(store, tracker, files=True)
    time.sleep(1)
    assert tracker.lag() == Outbox(store.outbox, STUDY).read(0)[-1][0].seq
    assert tracker.problem is None and not rows(database, "SELECT * FROM runs")
    with mlflow_server(database, tmp_path / "served", port):
        assert tracker.close(90) == 0, tracker.problem
    assert metrics(database) == EXPECTED
    assert rows(database, "SELECT count(*) FROM model_versions") == [(1,)]


def test_who_syncs_with_a_server_that_is_down_is_not_told_to_sync(store, monkeypatch):
    Tracker(store, STUDY, send=False).start_study("s", {}, {})
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port()}")
    with pytest.raises(TrackingError, match=r"no answer .*; start it, or name another with MLFLOW_TRACKING_URI"):
        sync(store)


HELD = """
import tracemalloc
from erpe.store import Store
from erpe.tracking import outbox
from erpe.tracking.connection import probe
from erpe.tracking.tracker import Tracker
outbox.BATCH_BYTES = 10_000
store = Store.open({store!r})
tracker = Tracker(store, "silent")
told = dict.fromkeys(("train/loss", "val/loss", "val/accuracy", "lr", "time/epoch_seconds"), 0.5)
def tell(trials):
    for trial in trials:
        for step in range(1, 201):
            tracker.epoch(f"s:{{trial}}", step, told)
tell(range(2))
assert "no answer" in probe(store.tracking_uri)  # and loads what takes more than all events
tracemalloc.start()
tell(range(2, 12))
growth, _ = tracemalloc.get_traced_memory()
tracemalloc.stop()
assert tracker.lag() == 2400 and tracker.close(0) == 2400
print(growth)
"""


def test_memory_stays_bounded_while_a_server_accepts_and_never_answers(store, tmp_path):
    """What waits is on disk; a batch is in memory, and of an epoch some bytes. No thread of another test is counted."""
    with hanging_server() as silent:
        script = HELD.format(store=str(store.root))
        told = Fork(exec, (script, {}), environment() | {"MLFLOW_TRACKING_URI": silent}, tmp_path / "log")
        assert told.wait() == 0
    assert int((tmp_path / "log").read_text()) < 2000 * 300


TELLER = """
import sys
from erpe.config import defaults
from erpe.store import Store
from erpe.tracking.tracker import Tracker
tracker = Tracker(Store.open({store!r}), "killed")
tracker.start_study("s", {{}}, {{}})
for n in range(6):
    tracker.start_trial(f"s:{{n}}", n, defaults("relu_general", "digits"), {{}}, parent="s")
    for step in range(1, 51):
        tracker.epoch(f"s:{{n}}", step, {{"val/accuracy": step / 100, "train/loss": 1 / step}})
    tracker.end_trial(f"s:{{n}}", "COMPLETE", {{"params": 1.0}}, None, None)
sys.exit(tracker.close(120))
"""


@slow
def test_a_sender_killed_in_the_middle_again_and_again_sends_everything_once(store, server, tmp_path):
    database, port = server
    script = TELLER.format(store=str(store.root))
    with_server = environment() | {"MLFLOW_TRACKING_URI": f"http://localhost:{port}"}

    def arrived():
        return sum(map(len, metrics(database, "killed").values()))

    def told():
        return Fork(exec, (script, {}), with_server, tmp_path / "log")

    for _ in range(3):
        teller, before = told(), arrived()
        while arrived() == before and teller.poll() is None:
            time.sleep(0.01)
        teller.end()  # some of what it was sending has arrived
    assert told().wait() == 0, (tmp_path / "log").read_text()
    found = metrics(database, "killed")
    assert len(found) == 6 * 3
    for n in range(6):
        assert found[f"trial {n}", "val/accuracy"] == [(step, step / 100) for step in range(1, 51)]
        assert found[f"trial {n}", "train/loss"] == [(step, 1 / step) for step in range(1, 51)]
    runs = "SELECT count(*) FROM runs JOIN experiments e USING (experiment_id) WHERE e.name = 'killed'"
    assert rows(database, runs) == [(7,)]


@slow
def test_a_server_that_refuses_our_host_is_one_line_and_nothing_is_lost(store, server, monkeypatch):
    database, port = server
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:hunter22@127.0.0.1:{port}")
    tracker = Tracker(store, STUDY)
    play(store, tracker)
    told = tracker.lag()
    assert tracker.close(60) == told
    assert "(403)" in tracker.problem and "allowed-hosts" in tracker.problem and "\n" not in tracker.problem
    with pytest.raises(TrackingError, match="403") as error:
        sync(store)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:hunter22@localhost:{port}")
    assert sync(store) == {STUDY: 0}
    assert metrics(database) == EXPECTED
    kept = b"".join(path.read_bytes() for path in (*store.outbox.iterdir(), database))
    assert b"hunter22" not in kept and "hunter22" not in tracker.problem + str(error.value)


@contextmanager
def http_server(answer, asked=None):
    """A web server that is not MLflow; `asked` is set as soon as it was."""
    asked = asked or threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            status, kind, body = answer
            asked.set()
            if status is None:
                return time.sleep(60)
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_GET

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@slow
@pytest.mark.parametrize(
    ("answer", "told"),
    [
        ((200, "text/html", b"<html>hello</html>"), "not MLflow"),
        ((404, "text/html", b"nothing here"), "not MLflow"),
        ((401, "text/plain", b"who are you"), "login"),
        ((403, "text/plain", b"no"), "403"),
        ((503, "text/plain", b"starting"), None),
    ],
)
def test_another_server_is_one_line_and_nothing_is_lost(store, monkeypatch, answer, told):
    with http_server(answer) as url:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", url)
        tracker = Tracker(store, STUDY)
        tracker.start_trial("s:0", 0, CONFIG, {})
        tracker.epoch("s:0", 1, {"val/accuracy": 0.1})
        until = time.monotonic() + (60 if told else 1)
        while tracker.problem is None and time.monotonic() < until:
            time.sleep(0.05)
        assert tracker.close(0) == 2
        if told:
            assert told in tracker.problem and url in tracker.problem and "\n" not in tracker.problem
        else:
            assert tracker.problem is None and "503" in probe(url)


@slow
@pytest.mark.timeout(60)
def test_a_server_that_never_answers_holds_nobody_up(store, monkeypatch):
    asked = threading.Event()
    with http_server((None, "", b""), asked) as url:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", url)
        tracker = Tracker(store, STUDY)
        tracker.start_trial("s:0", 0, CONFIG, {})
        tracker.epoch("s:0", 0, {"val/accuracy": 0.5})
        assert asked.wait(30)  # the sender hangs in its first call
        for step in range(1, 50):
            tracker.epoch("s:0", step, {"val/accuracy": 0.5})
        assert tracker.close(1) == 51


@slow
def test_only_one_process_sends_and_another_takes_over(embedded):
    first, second = Sender(embedded, STUDY), Sender(embedded, STUDY)
    tracker = Tracker(embedded, STUDY, send=False)
    tracker.epoch("s:0", 1, {"val/accuracy": 0.1})
    assert first.step() is True
    tracker.epoch("s:0", 2, {"val/accuracy": 0.2})
    assert second.step() is False and second.problem is None
    stop, wake, last = (threading.Event() for _ in range(3))
    stop.set()
    first.run(stop, wake, last)
    assert second.step() is True
    assert metrics(embedded.root / "mlflow.db") == {("s:0", "val/accuracy"): [(1, 0.1), (2, 0.2)]}
