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
from erpe.execution.controller import StudyController
from erpe.execution.trial_loop import TrialEvent
from erpe.store import HISTORY, Store
from erpe.study.reading import read_studies
from erpe.study.session import StudySession
from erpe.study.spec import define
from erpe.text import redact
from erpe.tracking.artifacts import draw
from erpe.tracking.connection import probe
from erpe.tracking.history import Journal, read_history
from erpe.tracking.provenance import collect
from erpe.tracking.publisher import Publisher
from erpe.tracking.study_tags import study_tags
from erpe.tracking.tracker import Tracker, sync
from erpe.tracking.waiting import lags

STUDY = "relu_general-digits"
SPEC = define("relu_general", "digits", epochs=3, sampler="random", pruner="none")
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


@contextmanager
def driver(store, name=STUDY, *, send=True, trials=3):
    """A driver of a study, whose workers are the test."""
    with StudySession.open(store, SPEC, trials=trials, name=name) as session:
        tags = study_tags(SPEC, name, None)
        tracker = Tracker(store, name, send=send)
        session.record_tags(tags)
        tracker.tell(name)
        try:
            yield StudyController(session, SPEC, tracker, store, trials, tags=tags)
        finally:
            tracker.close(0)


def epoch(controller, trial, step, **more):
    measures = {"epoch": float(step), "val/accuracy": step / 10 + trial.number / 100, "train/loss": 1 / step}
    controller.on_trial_result(trial, TrialEvent(epochs=(measures | more,)))


def play(controller, *, files=False):
    """A small study: trial 0 completes, trial 1 is pruned, trial 2 fails. A restart makes the same calls again."""
    session, tracker = controller.session, controller.tracker
    while trial := controller.next_trial():
        n = trial.number
        for step in range(1, (2 if n == 1 else 3) + 1):
            epoch(controller, trial, step)
        if n == 1:
            session.decide(n, "PRUNED", {}, "pruned after epoch 2")
            session.tell(n)
            tracker.end_trial(session.name, trial)
        elif n == 2:
            failure = "Traceback (most recent call last):\n  ...\nTrialError: loss is nan"
            controller.on_trial_result(trial, TrialEvent(failure=failure))
        else:
            if files:
                results(controller.folder(trial))
            final = {"val/accuracy": 0.3, "params": 1e5, "memory/peak_mib": float("nan")}
            controller.on_trial_result(trial, TrialEvent(outcome=final))
    session.record_final(0, {"test/accuracy": 0.5})
    tracker.tell(session.name)


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
    steps = threading.Event()
    monkeypatch.setattr(Publisher, "step", lambda *_: steps.set())
    with driver(embedded) as controller:
        trial = controller.next_trial()
        assert not steps.wait(0.2)
        epoch(controller, trial, 1)
        assert steps.wait(60)


EXPECTED = {
    (STUDY, "test/accuracy"): [(0, 0.5)],
    (STUDY, "val/accuracy"): [(0, 0.3)],
    (STUDY, "params"): [(0, 1e5)],
    (STUDY, "memory/peak_mib"): [(0, "nan")],
    (f"{STUDY}/0", "params"): [(3, 1e5)],
    (f"{STUDY}/0", "memory/peak_mib"): [(3, "nan")],
    **{(f"{STUDY}/{n}", "val/accuracy"): [(s, s / 10 + n / 100) for s in (1, 2, 3)[: 3 - (n == 1)]] for n in range(3)},
    **{(f"{STUDY}/{n}", "train/loss"): [(s, 1 / s) for s in (1, 2, 3)[: 3 - (n == 1)]] for n in range(3)},
}
NAMES = [STUDY, *(f"{STUDY}/{n}" for n in range(3))]


def tags(database, name):
    query = "SELECT key, value FROM tags JOIN runs USING (run_uuid) WHERE name = ? AND lifecycle_stage = 'active'"
    return dict(rows(database, query, name))


def names(database):
    return [name for (name,) in rows(database, "SELECT name FROM runs WHERE lifecycle_stage = 'active' ORDER BY name")]


def send(store, *, files=False):
    with driver(store) as controller:
        play(controller, files=files)
        assert controller.tracker.close(120) == 0, controller.tracker.problem
        assert controller.tracker.problem is None
    return store.root / "mlflow.db"


# What is kept with a trial, without MLflow


def lines(store):
    return [path.read_text() for path in sorted(store.checkpoints.rglob(HISTORY))]


def test_calling_again_keeps_nothing_even_in_a_new_process(store):
    with driver(store, send=False) as controller:
        play(controller)
    before, waits = lines(store), lags(store)
    assert len(before) == 3 and waits == {STUDY: (3 + 2) + (2 + 2) + (3 + 2) + (3 + 1 + 2)}
    with driver(store, send=False) as controller:
        play(controller)
    assert (lines(store), lags(store)) == (before, waits)


def test_the_first_word_on_an_epoch_counts_and_a_torn_line_costs_itself(store):
    with driver(store, send=False, trials=1) as controller:
        trial = controller.next_trial()
        for told in (0.1, 0.2):
            epoch(controller, trial, 1, **{"train/loss": told})
        path = controller.folder(trial) / HISTORY
        path.write_bytes(path.read_bytes() + b'{"at": 17, "epo')
        for told in (0.3, 0.4):
            Journal(path.parent).epoch({"epoch": 2.0, "val/accuracy": told})
        controller.session.report(0, 2, 0.3)
        found = read_history(controller.session.trial(0), path.parent, SPEC)
    assert [each.measures for each in found.epochs.values()] == [
        {"epoch": 1.0, "val/accuracy": 0.1, "train/loss": 0.1}, {"epoch": 2.0, "val/accuracy": 0.3}
    ]  # fmt: skip
    assert found.tags["variant"] == "relu_general" and 17 < found.epochs[1].at < found.epochs[2].at


def test_a_final_measure_that_replaces_an_epochs_comes_after_it(embedded):
    with driver(embedded, trials=1) as controller:
        trial = controller.next_trial()
        epoch(controller, trial, 1, **{"val/loss": 2.0})
        controller.on_trial_result(trial, TrialEvent(outcome={"val/accuracy": 0.15, "val/loss": 2.0}))
        assert controller.tracker.close(60) == 0
    found = metrics(embedded.root / "mlflow.db")
    assert found[f"{STUDY}/0", "val/accuracy"] == [(1, 0.1), (2, 0.15)] and found[f"{STUDY}/0", "val/loss"] == [(1, 2)]


@pytest.mark.timeout(60)  # a call that waited for an answer would take minutes
def test_a_call_returns_while_no_server_is_there(store, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port()}")
    with driver(store, trials=1) as controller:
        trial = controller.next_trial()
        for step in range(1, 100):
            epoch(controller, trial, step)
        assert controller.tracker.lag() == 1 + 1 + 99


def test_a_history_that_cannot_be_written_is_one_line(store):
    with driver(store, send=False, trials=1) as controller:
        trial = controller.next_trial()
        (controller.folder(trial) / HISTORY).unlink()
        (controller.folder(trial) / HISTORY).mkdir()
        with pytest.raises(StoreError) as error:
            epoch(controller, trial, 1)
    assert "cannot be written" in str(error.value) and "\n" not in str(error.value)


def test_no_mlflow_is_imported_until_there_is_something_to_send(store):
    script = (
        "import sys, time; from erpe.store import Store; from erpe.tracking.tracker import Tracker;"
        f"t = Tracker(Store.open({str(store.root)!r}), 'study'); time.sleep(0.5); t.close();"
        "print([name for name in ('mlflow', 'torch', 'ray', 'matplotlib') if name in sys.modules])"
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


def test_to_sync_a_study_that_is_not_there_makes_none(store, tmp_path, monkeypatch):
    with driver(store, send=False) as controller:
        controller.next_trial()
    with pytest.raises(StudyError, match=f"did you mean {STUDY}"):
        sync(store, "relu_general-digit")
    assert lags(store).keys() == {STUDY}
    monkeypatch.setenv("ERPE_STORAGE_URL", store.storage_url)
    with pytest.raises(StudyError, match=f"{STUDY}: none of its trials is in this store; use --store with the one"):
        sync(Store.open(tmp_path / "another"), STUDY)


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
    assert names(database) == NAMES
    assert metrics(database) == EXPECTED
    (parent,) = rows(database, "SELECT run_uuid FROM runs WHERE name = ?", STUDY)[0]
    (study,) = read_studies(finished)
    for n, state in enumerate(("COMPLETE", "PRUNED", "FAIL")):
        found, trial = tags(database, f"{STUDY}/{n}"), study.trials[n]
        assert found["erpe.trial_uid"] == trial.uid
        assert (found["optuna.number"], found["seed"]) == (str(n), str(trial.config.seed))
        assert found["mlflow.parentRunId"] == parent and found["state"] == state and found["dataset"] == "digits"
    assert tags(database, NAMES[3])["reason"] == "TrialError: loss is nan"
    assert tags(database, NAMES[1])["data_sha256"] == "d" * 64
    assert tags(database, STUDY)["erpe.study_uid"] == study.about.uid and "mlflow.parentRunId" not in tags(
        database, STUDY
    )
    status = dict(rows(database, "SELECT name, status FROM runs"))
    assert [status[name] for name in sorted(status)] == ["FINISHED", "FINISHED", "KILLED", "FAILED"]
    params = dict(rows(database, "SELECT key, value FROM params JOIN runs USING (run_uuid) WHERE name = ?", NAMES[1]))
    assert params == {key: str(value) for key, value in study.trials[0].config.flat().items()}

    whole = rows(database, "SELECT count(*) FROM metrics"), rows(database, "SELECT count(*) FROM model_versions")
    for cursor in finished.tracking.glob("*.json"):
        cursor.unlink()
    assert sync(finished) == {STUDY: 0}
    assert names(database) == NAMES and metrics(database) == EXPECTED
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
    assert {"config.json", "confusion.json"} | figures | checkpoint <= held[NAMES[1]]
    assert {"study.json", "confusion_test.json"} | figures <= held[STUDY]
    assert held[NAMES[2]] == {"config.json"} and held[NAMES[3]] == {"config.json", "traceback.txt"}
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
    model, _ = load_model(next(finished.checkpoints.glob(f"{STUDY}/0000-*")))
    with torch.inference_mode():
        probabilities = model(normalise(images, "digits")).softmax(-1).numpy()
    np.testing.assert_allclose(champion.predict(images.numpy()), probabilities, atol=1e-6)


@slow
def test_a_database_that_was_deleted_is_filled_again(embedded, empty_database):
    database = send(embedded)
    shutil.copy(empty_database, database)
    assert lags(embedded) == {STUDY: 0}  # as far as anyone can know
    with driver(embedded, trials=4) as controller:
        epoch(controller, controller.next_trial(), 1)
        assert controller.tracker.close(120) == 0
    found = metrics(database)
    assert found[f"{STUDY}/3", "train/loss"] == [(1, 1.0)]
    assert {key: value for key, value in found.items() if key[0] != f"{STUDY}/3"} == EXPECTED


@slow
def test_a_run_that_a_killed_create_made_twice_becomes_one(embedded):
    from mlflow import MlflowClient

    with driver(embedded, trials=1) as controller:
        trial = controller.next_trial()
        epoch(controller, trial, 1)
        while controller.tracker.lag():
            time.sleep(0.1)
        client = MlflowClient(embedded.tracking_uri)
        client.create_run(client.get_experiment_by_name(STUDY).experiment_id, tags={"erpe.trial_uid": trial.uid})
        controller.on_trial_result(trial, TrialEvent(outcome={"params": 5.0}))
        assert controller.tracker.close(60) == 0
    database = embedded.root / "mlflow.db"
    assert names(database) == NAMES[:2]
    assert metrics(database)[NAMES[1], "val/accuracy"] == [(1, 0.1)]
    assert metrics(database)[NAMES[1], "params"] == [(1, 5.0)]


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
    (run,) = rows(database, "SELECT run_uuid FROM runs WHERE name = ?", NAMES[2])[0]
    MlflowClient(embedded.tracking_uri).delete_run(run)
    for cursor in embedded.tracking.glob("*.json"):
        cursor.unlink()
    assert sync(embedded) == {STUDY: 0}
    assert names(database) == [name for name in NAMES if name != NAMES[2]]


@slow
def test_a_run_mlflow_refuses_is_set_apart_and_tried_again_by_sync(embedded):
    with driver(embedded, trials=2) as controller:
        controller.tags = controller.tags | {"k" * 251: "too long a name of a tag"}
        refused = controller.next_trial()
        epoch(controller, refused, 1)
        del controller.tags["k" * 251]
        epoch(controller, controller.next_trial(), 1)
        left, problem = controller.tracker.close(60), controller.tracker.problem
    assert left == 2 and refused.uid in problem and "refuses 1 run" in problem and "\n" not in problem
    database = embedded.root / "mlflow.db"
    assert metrics(database)[NAMES[2], "train/loss"] == [(1, 1.0)]
    with pytest.raises(TrackingError, match="refuses 1 run"):
        sync(embedded)
    path = controller.folder(refused) / HISTORY
    path.write_text(path.read_text().replace("k" * 251, "short"))
    assert sync(embedded) == {STUDY: 0}
    assert metrics(database)[NAMES[1], "train/loss"] == [(1, 1.0)] and tags(database, NAMES[1])["short"]


@slow
@pytest.mark.parametrize("damage", ["older", "newer", "other", "garbage"])
def test_a_database_of_another_version_is_one_line_and_the_study_waits(embedded, damage):
    database = embedded.root / "mlflow.db"
    import sqlite3

    if damage == "garbage":
        database.write_bytes(b"no database" * 1000)
    else:
        with sqlite3.connect(database) as connection:
            version = {"older": "0a8213491aaa", "newer": "ffffffffffff", "other": "v3.0.0.d"}[damage]
            connection.execute("UPDATE alembic_version SET version_num = ?", (version,))
        connection.close()
    with driver(embedded) as controller:
        controller.next_trial()
        tracker = controller.tracker
        assert tracker.close(30) == 2
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
    with driver(store) as controller:
        play(controller, files=True)
        time.sleep(1)
        tracker = controller.tracker
        assert tracker.lag() and tracker.problem is None and not rows(database, "SELECT * FROM runs")
        with mlflow_server(database, tmp_path / "served", port):
            assert tracker.close(90) == 0, tracker.problem
    assert metrics(database) == EXPECTED
    assert rows(database, "SELECT count(*) FROM model_versions") == [(1,)]


def test_who_syncs_with_a_server_that_is_down_is_not_told_to_sync(store, monkeypatch):
    with driver(store, send=False) as controller:
        controller.next_trial()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port()}")
    with pytest.raises(TrackingError, match=r"no answer .*; start it, or name another with MLFLOW_TRACKING_URI"):
        sync(store)


HELD = """
import sys, tracemalloc
sys.path.insert(0, {tests!r})
from test_tracker import STUDY, Store, driver, probe
with driver(Store.open({store!r}), trials=6) as controller:
    tracker, held = controller.tracker, {{}}
    def tell(trials):
        for _ in range(trials):
            trial = controller.next_trial()
            for step in range(1, 201):
                measures = dict.fromkeys(("train/loss", "val/loss", "val/accuracy", "lr"), 0.5)
                tracker.epoch(STUDY, trial, measures | {{"epoch": float(step)}})
    tell(1)
    assert "no answer" in probe(controller.store.tracking_uri)  # and loads what takes more than all epochs
    tracemalloc.start()
    tell(5)
    growth, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert tracker.lag() == 1 + 6 * 201
print(growth)
"""


def test_memory_stays_bounded_while_a_server_accepts_and_never_answers(store, tmp_path):
    """What waits is on disk; of an epoch some bytes are in memory. No thread of another test is counted."""
    with hanging_server() as silent:
        script = HELD.format(store=str(store.root), tests=str(Path(__file__).parent))
        told = Fork(exec, (script, {}), environment() | {"MLFLOW_TRACKING_URI": silent}, tmp_path / "log")
        assert told.wait() == 0, (tmp_path / "log").read_text()
    assert int((tmp_path / "log").read_text()) < 1000 * 500


TELLER = """
import sys
sys.path.insert(0, {tests!r})
from test_tracker import Store, TrialEvent, driver, epoch
with driver(Store.open({store!r}), "killed", trials=6) as controller:
    while trial := controller.next_trial():
        for step in range(1, 51):
            epoch(controller, trial, step)
        controller.on_trial_result(trial, TrialEvent(outcome={{"params": 1.0}}))
    sys.exit(controller.tracker.close(120))
"""


@slow
def test_a_publisher_killed_in_the_middle_again_and_again_shows_everything_once(store, server, tmp_path):
    database, port = server
    script = TELLER.format(store=str(store.root), tests=str(Path(__file__).parent))
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
    found, numbers = metrics(database, "killed"), [trial.number for trial in read_studies(store)[0].trials]
    assert len(numbers) == 6
    for n in numbers:
        value = [(step, step / 10 + n / 100) for step in range(1, 51)]
        assert found[f"killed/{n}", "val/accuracy"] == value and found[f"killed/{n}", "params"] == [(50, 1.0)]
        assert found[f"killed/{n}", "train/loss"] == [(step, 1 / step) for step in range(1, 51)]
    runs = "SELECT count(*) FROM runs JOIN experiments e USING (experiment_id) WHERE e.name = 'killed'"
    assert rows(database, runs) == [(7,)]


@slow
def test_a_server_that_refuses_our_host_is_one_line_and_nothing_is_lost(store, server, monkeypatch):
    database, port = server
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:hunter22@127.0.0.1:{port}")
    with driver(store) as controller:
        play(controller)
        tracker = controller.tracker
        assert tracker.close(60) == lags(store)[STUDY] > 0
    assert "(403)" in tracker.problem and "allowed-hosts" in tracker.problem and "\n" not in tracker.problem
    with pytest.raises(TrackingError, match="403") as error:
        sync(store)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:hunter22@localhost:{port}")
    assert sync(store) == {STUDY: 0}
    assert metrics(database) == EXPECTED
    kept = b"".join(path.read_bytes() for path in (*store.tracking.iterdir(), database))
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
        with driver(store, trials=1) as controller:
            tracker = controller.tracker
            epoch(controller, controller.next_trial(), 1)
            until = time.monotonic() + (60 if told else 1)
            while tracker.problem is None and time.monotonic() < until:
                time.sleep(0.05)
            assert tracker.close(0) == 3
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
        with driver(store, trials=1) as controller:
            trial = controller.next_trial()
            epoch(controller, trial, 1)
            assert asked.wait(30)  # the publisher hangs in its first call
            for step in range(2, 50):
                epoch(controller, trial, step)
            assert controller.tracker.close(1) == 49 + 2


@slow
def test_only_one_process_publishes_and_another_takes_over(embedded):
    with driver(embedded, send=False, trials=1) as controller:
        trial = controller.next_trial()
        epoch(controller, trial, 1)
        read, stop, wake, last = lambda: (read_studies(embedded), True), *(threading.Event() for _ in range(3))
        first, second = Publisher(embedded, STUDY), Publisher(embedded, STUDY)
        assert first.step(read, stop) is True
        epoch(controller, trial, 2)
        assert second.step(read, stop) is False and second.problem is None
        stop.set()
        first.run(read, lambda: None, stop, wake, last)
        assert second.step(read, threading.Event()) is True
    assert metrics(embedded.root / "mlflow.db")[NAMES[1], "val/accuracy"] == [(1, 0.1), (2, 0.2)]
