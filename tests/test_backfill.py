"""Whatever was lost of outbox and MLflow comes back from what is left, each run and each epoch once."""

from __future__ import annotations

import json
import shutil
import sqlite3
import subprocess
import sys
from collections import Counter
from contextlib import closing
from functools import partial

import pytest
import torch
from mlflow_server import rows
from test_run_study import FILE, SMALL
from test_transfer import erpe
from test_tune import Doom, Killed, check_books
from toys import number_of, work

from erpe.cli.status import statuses
from erpe.cli.sync import repair
from erpe.cli.trials import lag_words, status_rows
from erpe.errors import StoreError, TrialError
from erpe.search.run_study import run
from erpe.search.tune import tune
from erpe.store import STATE, Store
from erpe.study.plan import load_plan
from erpe.study.records import mark_removed, read_studies
from erpe.study.session import StudySession
from erpe.study.spec import define
from erpe.study.storage import Database
from erpe.tracking import backfill as module
from erpe.tracking.backfill import reconcile
from erpe.tracking.outbox import Outbox
from erpe.tracking.tracker import Tracker, lags, sync
from erpe.training.checkpoint import save_tensors

slow = pytest.mark.slow
SPEC = define("relu_general", "digits", epochs=3, sampler="random", pruner="none")
SOLO, GROUP = SPEC.name, "digits-nine"
PLAN = load_plan(FILE, [*SMALL, 'variants=["relu"]', "search.trials=1", "confirm.seeds=1"])


def _diverge(folder, epoch):
    if number_of(folder) == 1 and epoch == 3:
        raise TrialError("step 17: the loss is nan")


def play(store, trials=2):
    """A search whose second trial fails and leaves its checkpoint, by its own driver, for the outbox only."""
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
    """Two studies whose events wait in the outboxes; change a copy, not it."""
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


def events(store, study):
    return [event for event, _ in Outbox(store.outbox, study).read(0)]


def essentials(store, study):
    """What the outbox tells of each run, without places, times and tags."""
    bare = {"seq": 0, "ts": 0, "tags": {}, "rebuilt": False}
    found = {}
    for event in events(store, study):
        found.setdefault(event.uid, []).append(event.model_copy(update=bare))
    return found


def alike(one, other):
    """Whether runs have the same events, in whatever order."""
    return {uid: Counter(map(repr, own)) for uid, own in one.items()} == {
        uid: Counter(map(repr, own)) for uid, own in other.items()
    }


def lose(store, study, lost):
    """Write an outbox anew without some of its events."""
    kept = [event for event in events(store, study) if not lost(event)]
    (store.outbox / f"{study}.jsonl").unlink()
    outbox = Outbox(store.outbox, study)
    with outbox.exclusive():
        outbox.adopt(kept)


# The outbox, from the database and the checkpoints


def test_an_outbox_that_is_gone_is_told_again(store):
    wanted = {study: essentials(store, study) for study in (SOLO, GROUP)}
    for study in (SOLO, GROUP):
        (store.outbox / f"{study}.jsonl").unlink()
    counts = {found.study: found.events for found in reconcile(store)}
    for study in (SOLO, GROUP):
        assert essentials(store, study) == wanted[study]
        assert counts[study] == len(events(store, study)) == sum(map(len, wanted[study].values()))
    starts = [event for event in events(store, GROUP) if event.kind == "start_trial"]
    asked = {"variant", "arm", "phase", "seed", "study_hash", "seeds_planned", "budget", "git_sha", "version.erpe"}
    assert all(asked <= event.tags.keys() for event in starts)


def test_an_outbox_in_order_costs_a_look_and_changes_nothing(store, monkeypatch):
    (store.outbox / f"{SOLO}.jsonl").unlink()
    reconcile(store)
    before = {path: path.read_bytes() for path in store.outbox.glob("*.jsonl")}
    monkeypatch.setattr(module, "acquire", pytest.fail)
    assert [found.events for found in reconcile(store)] == [0, 0]
    assert {path: path.read_bytes() for path in store.outbox.glob("*.jsonl")} == before


@pytest.mark.parametrize(
    "lost",
    [
        lambda event: event.kind == "start_study",
        lambda event: event.kind == "start_trial",
        lambda event: event.kind == "epoch" and event.step == 2,
        lambda event: event.kind == "end_trial",
        lambda event: event.kind == "end_trial" and "time/inference_ms_per_image" in event.metrics,
        lambda event: event.kind == "end_study",
    ],
    ids="parents trials epochs ends times summaries".split(),
)
def test_any_kind_of_event_that_is_lost_comes_back_and_no_other(store, lost):
    wanted = {study: essentials(store, study) for study in (SOLO, GROUP)}
    for study in (SOLO, GROUP):
        lose(store, study, lost)
    reconcile(store)
    for study in (SOLO, GROUP):
        assert alike(essentials(store, study), wanted[study])


def test_what_is_rebuilt_has_the_time_when_it_happened(store):
    before = {(event.uid, event.kind): event.ts for event in events(store, SOLO) if event.kind == "end_trial"}
    (store.outbox / f"{SOLO}.jsonl").unlink()
    reconcile(store)
    for uid in {uid for uid, _ in before}:
        times = [event.ts for event in events(store, SOLO) if event.uid == uid]
        assert times == sorted(set(times)) and abs(times[-1] - before[uid, "end_trial"]) < 60_000


def test_the_checkpoint_of_a_trial_that_did_not_end_well_has_its_other_measures(store):
    (study,) = read_studies(store, SOLO)
    failed = study.trials[1]
    folder = store.trial_folder(SOLO, 1, failed.config.seed)
    history = [{"epoch": float(n), "val/accuracy": value, "train/loss": 1 / n} for n, value in failed.epochs.items()]
    history[1]["val/accuracy"] -= 0.25  # not what the database has
    save_checkpoint(folder, failed, history)
    (store.outbox / f"{SOLO}.jsonl").unlink()
    reconcile(store)
    found = [event.metrics for event in events(store, SOLO) if event.kind == "epoch" and event.uid == failed.uid]
    assert found == [history[0], {"val/accuracy": failed.epochs[2]}]


@pytest.mark.parametrize("name", ["outcome.json", STATE])
def test_a_damaged_folder_costs_the_other_measures_only(store, name):
    for folder in (store.checkpoints / SOLO).iterdir():
        for known in ("outcome.json", STATE):
            (folder / known).unlink(missing_ok=True)
        (folder / name).write_bytes(b"\x08\0\0\0\0\0\0\0{}")
    (store.outbox / f"{SOLO}.jsonl").unlink()
    reconcile(store)
    found = [event.metrics for event in events(store, SOLO) if event.kind == "epoch"]
    assert len(found) == 5 and all(metrics.keys() == {"val/accuracy"} for metrics in found)


@pytest.mark.parametrize(("useless", "other"), [(SOLO, GROUP), (GROUP, SOLO)])
def test_an_outbox_that_is_none_stops_no_other(store, useless, other):
    (store.outbox / f"{useless}.jsonl").unlink()
    (store.outbox / f"{useless}.jsonl").mkdir()
    (store.outbox / f"{other}.jsonl").unlink()
    found = {found.study: found for found in reconcile(store)}
    assert "Is a directory" in str(found[useless].broken) and not found[useless].events
    assert found[other].events and found[other].broken is None


def test_a_damaged_line_is_told_again(store):
    wanted = essentials(store, SOLO)
    path = store.outbox / f"{SOLO}.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    number = next(n for n, line in enumerate(lines) if b'"epoch"' in line)
    lines[number] = lines[number].replace(b"val", b"vla")
    path.write_bytes(b"".join(lines))
    found = {found.study: found for found in reconcile(store)}[SOLO]
    assert found.events == 1 and "moved to" in found.damage
    assert alike(essentials(store, SOLO), wanted)


def test_a_study_that_is_being_driven_is_left_alone(store):
    for study in (SOLO, GROUP):
        (store.outbox / f"{study}.jsonl").unlink()
    with (
        StudySession.open(store, SPEC),
        StudySession.open(store, PLAN.search_spec(PLAN.arms()[0]), name=f"{GROUP}.relu"),
    ):
        assert [(found.study, found.events, found.running) for found in reconcile(store)] == [
            (GROUP, 0, True), (SOLO, 0, True)
        ]  # fmt: skip
    assert not events(store, SOLO) and not events(store, GROUP)
    assert all(found.events for found in reconcile(store))


def test_a_trial_that_was_removed_stays_removed(store):
    (study,) = read_studies(store, SOLO)
    with closing(Database(store.storage_url)) as database:
        mark_removed(database, SOLO, {study.trials[1].number})
    (store.outbox / f"{SOLO}.jsonl").unlink()
    reconcile(store)
    told = essentials(store, SOLO)
    assert study.trials[0].uid in told and study.trials[1].uid not in told


@slow
def test_killed_before_any_write_the_reconciler_alone_tells_all_that_the_database_knows(tmp_path, monkeypatch):
    """Every write to the database and to the outbox, one after the other, is the one that never happens."""
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
        reconcile(store, name)
        _tells_what_the_session_knows(store, name)
        before = events(store, name)
        reconcile(store, name)
        assert events(store, name) == before
        tune(spec, store, **how)
        check_books(store, 1, name)
    assert kill > 10


def _tells_what_the_session_knows(store, name):
    studies = {study.name: study for study in read_studies(store)}
    for trial in studies[name].trials if name in studies else ():
        own = [event for event in events(store, name) if event.uid == trial.uid]
        kinds = Counter((event.kind, event.step if event.kind == "epoch" else 0) for event in own)
        assert kinds == Counter(
            [
                ("start_trial", 0),
                *(("epoch", step) for step in trial.epochs),
                *([("end_trial", 0)] if trial.verdict else []),
            ]
        )
        assert events(store, name)[-1].state == ("COMPLETE" if studies[name].finals else "INTERRUPTED")


def test_nothing_heavy_is_imported(store):
    script = (
        f"import sys; from erpe.store import Store; from erpe.tracking.backfill import reconcile;"
        f"reconcile(Store.open({str(store.root)!r}));"
        "print([name for name in ('torch', 'ray', 'mlflow', 'matplotlib') if name in sys.modules])"
    )
    (store.outbox / f"{SOLO}.jsonl").unlink()
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# How much MLflow has not got yet


def test_status_tells_how_much_waits_and_for_how_long(store):
    waits = lags(store)
    assert [row["lag"] for row in status_rows(store, SOLO)] == [waits[SOLO]] == [len(events(store, SOLO))]
    parts = [row["lag"] for row in status_rows(store, GROUP)]
    assert len(parts) == 2 and all(parts) and sum(parts) == waits[GROUP]
    (whole,) = statuses(store, GROUP)
    assert whole.lag == waits[GROUP] and 0 <= whole.lag_seconds < 3600
    assert lag_words(2, 720.0) == " · 2 events wait for MLflow, the oldest for 12 min" and lag_words(0, None) == ""


def test_status_commands_show_the_lag(store, monkeypatch, capsys):
    for words in (("status",), ("study", "status")):
        code, said = erpe(monkeypatch, capsys, *words, "--store", store.root)
        assert code == 0 and "wait for MLflow" in " ".join(said.split())
        code, said = erpe(monkeypatch, capsys, *words, "--store", store.root, "--json")
        assert code == 0 and all(row["lag"] > 0 and row["lag_seconds"] >= 0 for row in json.loads(said))


# MLflow, from the outbox


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
    reconcile(store)
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
def test_mlflow_and_outbox_are_filled_again_from_the_database_and_the_checkpoints(tracked, sent, empty_database):
    shutil.copy(empty_database, tracked.root / "mlflow.db")
    shutil.rmtree(tracked.outbox)
    synced(Store.open(tracked.root))
    found, wanted = snapshot(tracked), snapshot(sent)
    assert found.keys() == wanted.keys()
    for uid, own in found.items():
        assert own["row"][:2] == wanted[uid]["row"][:2] and own["params"] == wanted[uid]["params"]
        assert [row[:3] for row in own["metrics"]] == [row[:3] for row in wanted[uid]["metrics"]]
        note = own["tags"].pop("mlflow.note.content")  # the command is known to the one that ran it
        assert own["tags"].items() <= wanted[uid]["tags"].items()
        assert wanted[uid]["tags"]["mlflow.note.content"].startswith(note)


@slow
@pytest.mark.parametrize("damage", ["gone", "an epoch lost"])
def test_an_outbox_that_is_rebuilt_changes_nothing_in_mlflow(tracked, sent, damage):
    if damage == "gone":
        shutil.rmtree(tracked.outbox)
    else:
        lose(tracked, SOLO, lambda event: event.kind == "epoch" and event.step == 2)
    synced(Store.open(tracked.root))
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


@slow
@pytest.mark.parametrize("damaged", [False, True])
def test_what_only_the_outboxes_know_is_sent(tracked, sent, empty_database, damaged):
    shutil.copy(empty_database, tracked.root / "mlflow.db")
    for file in tracked.root.glob("optuna.db*"):
        file.unlink()
    if damaged:
        (tracked.root / "optuna.db").write_bytes(b"no database" * 1000)
    said = []
    with pytest.raises(StoreError, match="not a database" if damaged else "missing"):
        repair(tracked, None, said.append, pytest.fail)
    assert len(said) == 2 and all(line.endswith("sent again; everything arrived") for line in said)
    assert snapshot(tracked) == snapshot(sent)


@slow
def test_the_command_says_what_it_mended(tracked, sent, monkeypatch, capsys):
    shutil.copy(tracked.root / "older.db", tracked.root / "mlflow.db")
    (tracked.outbox / f"{GROUP}.jsonl").unlink()
    told = len(events(sent, GROUP))
    code, said = erpe(monkeypatch, capsys, "sync", "--store", tracked.root)
    assert code == 0 and said.splitlines() == [
        f"{GROUP}: {told} events were told again from the database and checkpoints; everything arrived",
        f"{SOLO}: 1 run was missing in MLflow, sent again; 1 run was incomplete in MLflow, sent again; "
        "everything arrived",
    ]
    code, said = erpe(monkeypatch, capsys, "sync", SOLO, "--store", tracked.root)
    assert code == 0 and said == f"{SOLO}: everything arrived\n"


@slow
def test_a_driver_mends_its_own_study_at_its_start(tracked, sent):
    shutil.copy(tracked.root / "older.db", tracked.root / "mlflow.db")
    lose(tracked, SOLO, lambda event: event.kind == "end_trial" and event.state == "FAIL")
    result = tune(SPEC, tracked, trials=2, executor="inline", work=work(accident=_diverge))
    assert result.lag == 0 and result.problem is None
    found, wanted = snapshot(tracked), snapshot(sent)
    assert found.keys() == {uid for uid in wanted if uid in essentials(tracked, SOLO)}
    for uid in found:
        assert found[uid]["tags"] == wanted[uid]["tags"] and found[uid]["metrics"] == wanted[uid]["metrics"]


@slow
def test_from_postgresql(postgres, tmp_path, monkeypatch, empty_database):
    monkeypatch.setenv("ERPE_STORAGE_URL", postgres.url)
    store = Store.open(tmp_path / "store")
    shutil.copy(empty_database, store.root / "mlflow.db")
    play(store)
    run(PLAN, store, executor="inline", offline=True, work=work())
    wanted = {study: essentials(store, study) for study in (SOLO, GROUP)}
    shutil.rmtree(store.outbox)
    lost = synced(Store.open(store.root))
    assert lost.keys() >= {SOLO, GROUP}
    assert {study: essentials(store, study) for study in (SOLO, GROUP)} == wanted
    assert len(snapshot(store)) == 7
