import getpass
import platform
import shlex
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from forks import Fork
from mlflow_server import free_port, rows
from told import EXPECTED, NAMES, SPEC, STUDY, driver, environment, epoch, metrics, play, results, send

from erpe.cli.sync import repair
from erpe.errors import StoreError, StudyError, TrackingError
from erpe.execution.trial_loop import TrialEvent
from erpe.store import HISTORY, Store
from erpe.study.reading import read_studies
from erpe.text import redact
from erpe.tracking.artifacts import draw
from erpe.tracking.connection import probe
from erpe.tracking.history import Journal, read_history
from erpe.tracking.mlflow_calls import Experiment
from erpe.tracking.provenance import collect
from erpe.tracking.publisher import Publisher
from erpe.tracking.tracker import _Parts, sync
from erpe.tracking.waiting import lags

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


def test_a_study_that_has_only_started_leaves_the_machine_to_the_workers(embedded, monkeypatch):
    monkeypatch.setattr("erpe.tracking.tracker.BEGIN_SECONDS", 3600.0)
    steps = threading.Event()
    monkeypatch.setattr(Publisher, "step", lambda *_: steps.set())
    with driver(embedded) as controller:
        trial = controller.next_trial()
        assert not steps.wait(0.2)
        epoch(controller, trial, 1)
        assert steps.wait(60)


def test_that_an_experiment_was_deleted_is_told_with_the_command_that_restores_it_there(embedded):
    experiment = Experiment(embedded, STUDY)
    experiment.client.delete_experiment(experiment.id)
    with pytest.raises(TrackingError, match="was deleted in MLflow") as told:
        Experiment(embedded, STUDY)
    hint = str(told.value).split("`")[1]
    assert hint.split("mlflow")[-1].split() == ["experiments", "restore", "-x", experiment.id]
    assert shlex.split(hint)[0] == f"MLFLOW_TRACKING_URI={embedded.tracking_uri}"


def tags(database, name):
    query = "SELECT key, value FROM tags JOIN runs USING (run_uuid) WHERE name = ? AND lifecycle_stage = 'active'"
    return dict(rows(database, query, name))


def names(database):
    return [name for (name,) in rows(database, "SELECT name FROM runs WHERE lifecycle_stage = 'active' ORDER BY name")]


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
    accuracy = found.points.pop("val/accuracy")
    assert {step: point.value for step, point in accuracy.items()} == {1: 0.1, 2: 0.3}
    assert found.points == {"train/loss": {1: (accuracy[1].at, 0.1)}}
    assert found.tags["variant"] == "relu_general" and 17 < accuracy[1].at < accuracy[2].at


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


@pytest.mark.timeout(60)  # who waited would wait ten minutes
def test_nobody_waits_for_a_mlflow_that_is_not_installed(store, monkeypatch):
    monkeypatch.setattr("erpe.tracking.connection.find_spec", lambda _: None)
    with driver(store) as controller:
        epoch(controller, controller.next_trial(), 1)
        tracker = controller.tracker
        assert tracker.close(600) and tracker.problem.startswith("MLflow is not installed; pip install")
    with pytest.raises(TrackingError, match="MLflow is not installed; pip install"):
        sync(store)


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
    repair(Store.open(tmp_path / "another"), None, (said := []).append, pytest.fail)
    assert said == ["nothing to send: no study has trials in this store"]


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
def test_a_part_without_news_is_not_read_again_until_the_end(digits_study, monkeypatch):
    read = []
    monkeypatch.setattr("erpe.tracking.tracker.read_study", lambda study, ended: read.append(study.study_name))
    parts = _Parts(digits_study, "digits-nine")
    parts.read()
    every, (first, *_) = sorted(read), read
    for told, wanted in ((set(), []), ({first}, [first])):
        read.clear()
        parts.news |= told
        parts.read()
        assert read == wanted
    read.clear()
    parts.look_again()
    assert len(parts.read()) == len(every) > 2 and sorted(read) == every
    parts.close()


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


@slow
def test_only_one_process_publishes_and_another_takes_over(embedded):
    with driver(embedded, send=False, trials=1) as controller:
        trial = controller.next_trial()
        epoch(controller, trial, 1)
        first, second = (Publisher(embedded, STUDY, lambda: read_studies(embedded)) for _ in range(2))
        assert first.step(running=True) is True
        epoch(controller, trial, 2)
        assert second.step(running=True) is False and second.problem is None
        first.close()
        assert second.step(running=True) is True
    assert metrics(embedded.root / "mlflow.db")[NAMES[1], "val/accuracy"] == [(1, 0.1), (2, 0.2)]
