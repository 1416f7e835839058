"""MLflow is an image of the study: it follows from database and folders, and what is lost of it comes back."""

from __future__ import annotations

import json
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from functools import partial

import pytest
import torch
from mlflow import MlflowClient
from mlflow_server import rows
from test_run_study import FILE, SMALL
from test_transfer import erpe
from test_tune import Doom, Killed, check_books
from toys import number_of, work

from erpe.cli.status import statuses
from erpe.cli.sync import repair
from erpe.cli.trials import lag_words, status_rows
from erpe.errors import StoreError, TrialError
from erpe.report.sources.mlflow import read
from erpe.search.run_study import run
from erpe.search.tune import tune
from erpe.store import HISTORY, STATE, Store
from erpe.study.plan_file import load_plan
from erpe.study.reading import mark_removed, read_studies
from erpe.study.session import StudySession
from erpe.study.spec import define
from erpe.study.storage import Database
from erpe.tracking.comparison import Call, diff
from erpe.tracking.history import read_history
from erpe.tracking.image import Point, RunImage, desired
from erpe.tracking.marks import GONE
from erpe.tracking.tracker import Tracker, sync
from erpe.tracking.waiting import lags
from erpe.training.checkpoint import save_tensors

slow = pytest.mark.slow
SPEC = define("relu_general", "digits", epochs=3, sampler="random", pruner="none")
SOLO, GROUP = SPEC.name, "digits-nine"
PLAN = load_plan(FILE, [*SMALL, 'variants=["relu"]', "search.trials=1", "confirm.seeds=1"])


def _diverge(folder, epoch):
    if number_of(folder) == 1 and epoch == 3:
        raise TrialError("step 17: the loss is nan")


def play(store, trials=2):
    """A search whose second trial fails and leaves its checkpoint, by its own driver, without MLflow."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("erpe.tracking.tracker.Tracker", partial(Tracker, send=False))
        tune(SPEC, store, trials=trials, executor="inline", work=work(accident=_diverge))
    for trial in read_studies(store, SOLO)[0].trials[1:]:
        folder = store.trial_folder(SOLO, trial.number, trial.config.seed)
        save_checkpoint(folder, trial, json.loads((folder / "toy.json").read_text()))


def save_checkpoint(folder, trial, history):
    facts = {"config": trial.config.model_dump_json(), "history": history}
    save_tensors(folder / STATE, {"x": torch.zeros(3)}, facts)


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """Two studies that MLflow was told nothing of; change a copy, not it."""
    store = Store.open(tmp_path_factory.mktemp("told") / "store")
    play(store)
    run(PLAN, store, executor="inline", offline=True, work=work())
    return store


@pytest.fixture(scope="module")
def sent(told, tmp_path_factory, empty_database):
    """The same in MLflow; and `older.db`, what MLflow had when only the first trial was done."""
    store = Store.open(tmp_path_factory.mktemp("sent") / "store")
    shutil.copy(empty_database, store.root / "mlflow.db")
    play(store, trials=1)
    assert sync(store) == {SOLO: 0}
    shutil.copy(store.root / "mlflow.db", store.root / "older.db")
    play(store)
    run(PLAN, store, executor="inline", offline=True, work=work())
    assert sync(store) == {SOLO: 0, GROUP: 0}
    return store


def copy_of(store, tmp_path):
    shutil.copytree(store.root, tmp_path / "copy", ignore=shutil.ignore_patterns("artifacts"))
    return Store.open(tmp_path / "copy")


@pytest.fixture
def store(told, tmp_path):
    return copy_of(told, tmp_path)


@pytest.fixture
def tracked(sent, tmp_path):
    return copy_of(sent, tmp_path)


def images(store, study, **how):
    """uid -> what MLflow should show."""
    members = [part for part in read_studies(store) if part.experiment == study]
    return {image.uid: image for image in desired(members, store, running=False, **how)}


def bare(images):
    """Without tags and times, which a history knows alone."""
    plain = {"tags": {}, "exact": False, "ended": 0, "started": 0}
    return {
        uid: image._replace(
            **plain, points={k: {n: p.value for n, p in own.items()} for k, own in image.points.items()}
        )
        for uid, image in images.items()
    }


# What should be, from the database and the folders


def test_the_image_has_all_that_was_measured_at_its_time(store):
    found = images(store, GROUP)
    (search, confirm) = sorted((p for p in read_studies(store) if p.experiment == GROUP), key=lambda part: part.name)
    seed = found[confirm.trials[0].uid]
    assert seed.points["time/inference_ms_per_image"][2].value > 0 and seed.state == "COMPLETE"
    assert found[confirm.about.uid].points["seeds"][0].value == 1
    for part in (search, confirm):
        assert {found[trial.uid].parent for trial in part.trials} == {part.about.uid}
    asked = {"variant", "arm", "phase", "seed", "study_hash", "seeds_planned", "budget", "git_sha", "version.erpe"}
    assert all(asked <= image.tags.keys() for image in found.values() if image.is_trial)
    for image in (image for image in found.values() if image.is_trial):
        times = [image.started, *(point.at for point in image.points["train/loss"].values()), image.ended]
        assert times == sorted(set(times))


@pytest.mark.parametrize("left", ["results", "neither"])
def test_without_histories_the_results_and_checkpoints_tell_the_same(store, left):
    wanted, epochs = {study: bare(images(store, study)) for study in (SOLO, GROUP)}, 0
    for path in [*store.checkpoints.rglob(HISTORY)]:
        path.write_bytes(b"damaged\n" if left == "results" else b"")
        if left == "neither":
            for name in ("outcome.json", STATE):
                (path.parent / name).unlink(missing_ok=True)
    for study in (SOLO, GROUP):
        found = images(store, study)
        if left == "results":
            assert bare(found) == wanted[study]
        for uid, image in found.items():
            assert image.points.get("val/accuracy") or not image.is_trial or study == GROUP
            epochs += image.is_trial and len(max(image.points.values(), key=len))
            times = [point.at for own in image.points.values() for point in own.values()]
            assert uid not in wanted[study] or image.started <= min(times) <= max(times) <= image.ended + 1
    assert epochs == 3 + 2 + 2 + 2


def test_of_the_checkpoint_only_what_the_database_has_too_is_shown(store):
    (study,) = read_studies(store, SOLO)
    failed = study.trials[1]
    folder = store.trial_folder(SOLO, 1, failed.config.seed)
    history = [{"epoch": float(n), "val/accuracy": value, "train/loss": 1 / n} for n, value in failed.epochs.items()]
    history[1]["val/accuracy"] -= 0.25  # not what the database has
    save_checkpoint(folder, failed, history)
    (folder / HISTORY).unlink()
    found = images(store, SOLO)[failed.uid].points
    assert found["train/loss"].keys() == {1} and found["val/accuracy"].keys() == {1, 2}
    assert found["val/accuracy"][2].value == failed.epochs[2]


def test_a_trial_that_was_removed_should_not_be_there(store):
    (study,) = read_studies(store, SOLO)
    with closing(Database(store.storage_url)) as database:
        mark_removed(database, SOLO, {study.trials[1].number})
    found = images(store, SOLO)
    assert found[study.trials[1].uid].state == GONE and found[study.about.uid].tags["erpe.removed"] == "1"
    rest = images(store, SOLO, known=lambda uid, mark: mark.state == GONE)
    assert rest.keys() == found.keys() - {study.trials[1].uid}


@slow
def test_killed_before_any_write_the_image_has_all_that_the_database_knows(tmp_path, monkeypatch):
    """Every write to the database and to a history, one after the other, is the one that never happens."""
    store, doom = Store.open(tmp_path), Doom(monkeypatch)
    monkeypatch.setattr("erpe.tracking.tracker.Tracker", partial(Tracker, send=False))
    spec = define("relu_general", "digits", epochs=1, sampler="random", pruner="none")
    for kill in range(1, 100):
        name, doom.left = f"killed-{kill}", kill
        how = {"trials": 1, "executor": "inline", "work": work(), "name": name}
        try:
            tune(spec, store, **how)
            break
        except Killed:
            doom.left = 0
        studies = {study.name: study for study in read_studies(store)}
        found = images(store, name)
        for trial in studies[name].trials if name in studies else ():
            image = found[trial.uid]
            assert {step for own in image.points.values() for step in own} == set(trial.epochs)
            assert image.state == (trial.verdict.state if trial.verdict else "RUNNING")
            assert found[image.parent].state == ("COMPLETE" if studies[name].finals else "INTERRUPTED")
        tune(spec, store, **how)
        check_books(store, 1, name)
    assert kill > 10


def test_nothing_heavy_is_imported(store):
    script = (
        f"import sys; from erpe.store import Store; from erpe.tracking.waiting import lags;"
        f"assert sum(lags(Store.open({str(store.root)!r})).values());"
        "print([name for name in ('torch', 'ray', 'mlflow', 'matplotlib') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# What is left to do


def trial(**more):
    fields = {"state": "COMPLETE", "tags": {"a": "1"}, "params": {"p": "1"}, "parent": "s", "ended": 9}
    points = {"loss": {1: Point(1, 0.5), 2: Point(2, 0.4)}}
    return RunImage("s-0", is_trial=True, **(fields | {"points": points, "exact": True} | more))


def shown(**more):
    return trial(**({"run": "r", "status": "FINISHED"} | more))


def whats(want, seen):
    return [call.what for call in diff(want, seen)]


@pytest.mark.parametrize(
    ("want", "seen", "calls"),
    [
        (trial(), None, ["create", "describe", "log", "file", "close"]),
        (trial(), shown(), []),
        (trial(), shown(deleted=True), []),
        (trial(), shown(twins=("t",)), ["merge"]),
        (trial(), shown(points={}), ["log"]),
        (trial(), shown(params={}), ["describe"]),
        (trial(), shown(tags={"a": "2", "b": "a user's"}), ["describe"]),
        (trial(exact=False), shown(tags={"a": "2"}), []),
        (trial(), shown(parent=""), ["describe"]),
        (trial(), shown(state="RUNNING", status="RUNNING", ended=0), ["file", "close"]),
        (trial(), shown(status="FAILED"), ["close"]),
        (trial(), shown(ended=8), []),
        (trial(state=GONE), shown(), ["remove"]),
        (trial(state=GONE), None, []),
    ],
)
def test_only_what_differs_is_called(want, seen, calls):
    assert whats(want, seen) == calls


def test_of_the_measures_only_steps_that_lack_and_a_last_value_that_differs_are_logged():
    seen = shown(points={"loss": {1: Point(7, 0.5)}})
    assert diff(trial(), seen) == [Call("log", trial(), {"loss": {2: Point(2, 0.4)}})]
    other = shown(points={"loss": {1: Point(7, 9.9), 2: Point(7, 9.9)}})  # the first word on an epoch counts
    later = {2: Point(8, 0.4)}  # at the same time or before, MLflow would go on to show the 9.9
    assert diff(trial(), other) == [Call("log", trial(), {"loss": later})]
    ahead = shown(points={"loss": {1: Point(1, 0.5), 2: Point(2, 0.4), 3: Point(3, 0.3)}})
    assert diff(trial(), ahead) == []
    nan = {"loss": {1: Point(1, float("nan"))}}
    assert diff(trial(points=nan), shown(points=nan)) == []


# How much MLflow does not show yet


def test_status_tells_how_much_waits_and_for_how_long(store):
    waits = lags(store)
    assert [row["lag"] for row in status_rows(store, SOLO)] == [waits[SOLO]] == [(3 + 2) + (2 + 2) + (2 + 1 + 2)]
    parts = [row["lag"] for row in status_rows(store, GROUP)]
    assert len(parts) == 2 and all(parts) and sum(parts) == waits[GROUP]
    (whole,) = statuses(store, GROUP)
    assert whole.lag == waits[GROUP] and 0 <= whole.lag_seconds < 3600
    assert lag_words(2, 720.0) == " · 2 changes wait for MLflow, the oldest for 12 min" and lag_words(0, None) == ""


def test_status_commands_show_the_lag(store, monkeypatch, capsys):
    for words in (("status",), ("study", "status")):
        code, said = erpe(monkeypatch, capsys, *words, "--store", store.root)
        assert code == 0 and "wait for MLflow" in " ".join(said.split())
        code, said = erpe(monkeypatch, capsys, *words, "--store", store.root, "--json")
        assert code == 0 and all(row["lag"] > 0 and row["lag_seconds"] >= 0 for row in json.loads(said))


# MLflow, from the store


def snapshot(store):
    """Every run by its uid: how it ended, when, its parameters, tags and all points of its measures."""
    database = store.root / "mlflow.db"
    found = {}
    runs = "SELECT run_uuid, name, status, start_time, end_time FROM runs WHERE lifecycle_stage = 'active'"
    names = {
        key: value for key, value in rows(database, "SELECT run_uuid, value FROM tags WHERE key LIKE 'erpe.%_uid'")
    }
    for key, *row in rows(database, runs):
        tags = dict(rows(database, "SELECT key, value FROM tags WHERE run_uuid = ?", key))
        if "mlflow.parentRunId" in tags:
            tags["mlflow.parentRunId"] = names[tags["mlflow.parentRunId"]]
        assert names[key] not in found, "a run is there once"
        points = "SELECT key, step, value, timestamp FROM {} WHERE run_uuid = ? ORDER BY 1, 2, 4"
        found[names[key]] = {
            "row": row, "tags": tags, "metrics": rows(database, points.format("metrics"), key),
            "latest": rows(database, points.format("latest_metrics"), key),
            "params": rows(database, "SELECT key, value FROM params WHERE run_uuid = ? ORDER BY 1", key),
        }  # fmt: skip
    return found


def synced(store):
    """Study -> runs that MLflow had lost."""
    lost = {}
    assert set(sync(store, tell=lambda study, left, repaired: lost.update({study: tuple(repaired)})).values()) == {0}
    return lost


def change(store, *statements):
    with closing(sqlite3.connect(store.root / "mlflow.db")) as database:
        for statement in statements:
            database.execute(statement)
        database.commit()


@slow
def test_mlflow_is_filled_again_if_its_database_was_deleted(tracked, sent, empty_database):
    shutil.copy(empty_database, tracked.root / "mlflow.db")
    assert synced(tracked) == {SOLO: (3, 0), GROUP: (4, 0)}
    assert snapshot(tracked) == snapshot(sent)


@slow
@pytest.mark.parametrize("damage", ["no histories", "no cursor"])
def test_what_is_known_less_well_changes_nothing_in_mlflow(tracked, sent, damage):
    for path in [*tracked.checkpoints.rglob(HISTORY)] if damage == "no histories" else [*tracked.tracking.iterdir()]:
        path.unlink()
    synced(tracked)
    assert snapshot(tracked) == snapshot(sent)


@slow
def test_an_older_copy_of_the_database_is_completed(tracked, sent):
    shutil.copy(tracked.root / "older.db", tracked.root / "mlflow.db")
    assert synced(tracked) == {SOLO: (1, 1), GROUP: (4, 0)}
    assert snapshot(tracked) == snapshot(sent)


ONE = "run_uuid = (SELECT run_uuid FROM tags WHERE key = 'optuna.number' AND value = '1')"


@slow
@pytest.mark.parametrize(
    "statements",
    [
        (f"DELETE FROM metrics WHERE {ONE}",),
        (f"DELETE FROM metrics WHERE {ONE}", f"DELETE FROM latest_metrics WHERE {ONE}"),
        (f"DELETE FROM metrics WHERE {ONE} AND step = 1",),
        (f"DELETE FROM params WHERE {ONE}",),
        (f"DELETE FROM tags WHERE {ONE} AND key = 'variant'",),
        (f"UPDATE tags SET value = 'RUNNING' WHERE {ONE} AND key = 'state'",),
        (f"UPDATE runs SET status = 'FINISHED', end_time = 1 WHERE {ONE}",),
    ],
    ids=["its history", "its measures", "an epoch", "its parameters", "a tag", "its state", "its status"],
)
def test_what_a_run_has_lost_comes_back(tracked, sent, statements):
    change(tracked, *statements)
    assert snapshot(tracked) != snapshot(sent)
    assert synced(tracked) == {SOLO: (0, 1), GROUP: (0, 0)}
    assert snapshot(tracked) == snapshot(sent)


@slow
def test_a_look_reads_some_curves_and_an_epoch_that_was_lost_is_found_in_turn(tracked, sent, monkeypatch):
    """A run that was confirmed and whose last values are right is trusted until its turn."""
    monkeypatch.setattr("erpe.tracking.cursor.CHECKED", 1)
    read, ask = [], MlflowClient.get_metric_history
    monkeypatch.setattr(MlflowClient, "get_metric_history", lambda *given: read.append(given) or ask(*given))
    built = []
    monkeypatch.setattr("erpe.tracking.image.read_history", lambda *given: built.append(given) or read_history(*given))
    for _ in range(3):  # runs: the study and two trials
        assert sync(tracked, SOLO) == {SOLO: 0}
    assert len(read) == len(built) == 2, "each trial once"
    change(tracked, f"DELETE FROM metrics WHERE {ONE} AND step = 1")
    found = [synced(tracked)[SOLO] for _ in images(tracked, SOLO)]
    assert sorted(found) == [(0, 0), (0, 0), (0, 1)]
    assert snapshot(tracked) == snapshot(sent)


@slow
def test_a_database_that_nobody_wrote_to_since_all_was_there_is_not_asked_again(tracked, sent, monkeypatch):
    looks, ask = [], MlflowClient.search_runs
    monkeypatch.setattr(MlflowClient, "search_runs", lambda *given, **how: looks.append(given) or ask(*given, **how))
    assert synced(tracked) == {SOLO: (0, 0), GROUP: (0, 0)} and looks, "a copy is another file"
    looks.clear()
    assert synced(tracked) == {SOLO: (0, 0), GROUP: (0, 0)} and not looks
    change(tracked, f"DELETE FROM params WHERE {ONE}")
    assert synced(tracked) == {SOLO: (0, 1), GROUP: (0, 0)} and looks
    assert snapshot(tracked) == snapshot(sent)
    assert synced(tracked) == {SOLO: (0, 0), GROUP: (0, 0)}
    looks.clear()
    monkeypatch.setattr("erpe.tracking.cursor.__version__", "another")
    assert synced(tracked) == {SOLO: (0, 0), GROUP: (0, 0)} and looks


@slow
def test_a_parent_that_is_lost_gets_its_trials_back(tracked, sent):
    lost = "run_uuid IN (SELECT run_uuid FROM tags WHERE key = 'erpe.study_uid')"
    for table in ("metrics", "latest_metrics", "params"):
        change(tracked, f"DELETE FROM {table} WHERE {lost}")
    change(
        tracked, f"DELETE FROM runs WHERE {lost}", "DELETE FROM tags WHERE run_uuid NOT IN (SELECT run_uuid FROM runs)"
    )
    assert synced(tracked) == {SOLO: (1, 2), GROUP: (2, 2)}
    assert snapshot(tracked) == snapshot(sent)


@slow
def test_syncing_again_changes_no_row(tracked):
    with closing(sqlite3.connect(tracked.root / "mlflow.db")) as database:
        before = [*database.iterdump()]
    for _ in range(2):
        assert synced(tracked) == {SOLO: (0, 0), GROUP: (0, 0)}
    with closing(sqlite3.connect(tracked.root / "mlflow.db")) as database:
        assert [*database.iterdump()] == before


@pytest.mark.parametrize("damaged", [False, True])
def test_without_the_database_of_trials_nothing_is_said_to_mlflow(store, empty_database, damaged):
    shutil.copy(empty_database, store.root / "mlflow.db")
    for file in store.root.glob("optuna.db*"):
        file.unlink()
    if damaged:
        (store.root / "optuna.db").write_bytes(b"no database" * 1000)
    with pytest.raises(StoreError, match="not a database" if damaged else "missing"):
        repair(store, None, pytest.fail, pytest.fail)


@slow
def test_the_command_says_what_it_mended(tracked, monkeypatch, capsys):
    shutil.copy(tracked.root / "older.db", tracked.root / "mlflow.db")
    code, said = erpe(monkeypatch, capsys, "sync", "--store", tracked.root)
    assert code == 0 and said.splitlines() == [
        f"{GROUP}: 4 runs were missing in MLflow, sent again; everything arrived",
        f"{SOLO}: 1 run was missing in MLflow, sent again; 1 run was incomplete in MLflow, sent again; "
        "everything arrived",
    ]
    code, said = erpe(monkeypatch, capsys, "sync", SOLO, "--store", tracked.root)
    assert code == 0 and said == f"{SOLO}: everything arrived\n"
    code, said = erpe(monkeypatch, capsys, "sync", f"{GROUP}/relu", "--store", tracked.root)
    assert code == 0 and said == f"{GROUP}: everything arrived\n"


@slow
def test_a_margin_that_changed_is_told_and_read(tracked):
    plan = load_plan(FILE, [*SMALL, 'variants=["relu"]', "search.trials=1", "confirm.seeds=1", "compare.margin=2"])
    run(plan, tracked, executor="inline", work=work())
    assert read(tracked.tracking_uri, [GROUP]).margins == {GROUP: 2}


@slow
def test_a_driver_mends_its_own_study_at_its_start_and_one_that_runs_elsewhere_is_not_ended(tracked, sent):
    shutil.copy(tracked.root / "older.db", tracked.root / "mlflow.db")
    result = tune(SPEC, tracked, trials=2, executor="inline", work=work(accident=_diverge))
    assert result.lag == 0 and result.problem is None
    found, wanted = snapshot(tracked), snapshot(sent)
    assert found == {uid: wanted[uid] for uid in found} and len(found) == 3
    with StudySession.open(tracked, SPEC, trials=3) as session:
        session.ask(3)
        sync(tracked, SOLO)
        assert snapshot(tracked)[session.uid]["tags"]["state"] == "RUNNING"
    sync(tracked, SOLO)
    assert snapshot(tracked)[session.uid]["tags"]["state"] == "INTERRUPTED"


@slow
def test_from_postgresql(postgres, tmp_path, monkeypatch, empty_database):
    monkeypatch.setenv("ERPE_STORAGE_URL", postgres.url)
    store = Store.open(tmp_path / "store")
    shutil.copy(empty_database, store.root / "mlflow.db")
    play(store)
    run(PLAN, store, executor="inline", offline=True, work=work())
    assert synced(store).keys() == {SOLO, GROUP} and len(snapshot(store)) == 7
    before = snapshot(store)
    assert synced(store) == {SOLO: (0, 0), GROUP: (0, 0)} and snapshot(store) == before
