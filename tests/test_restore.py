"""The database of trials is the one truth: it has two backups, and damage is told in one line with the way back."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from told import metrics, send
from toys import work

from erpe.cli import app
from erpe.errors import BusyError, StoreError, StudyError
from erpe.search.tune import tune
from erpe.store import Store
from erpe.study.backup import backup_files, restore, survey
from erpe.study.lock import acquire
from erpe.study.reading import read_studies
from erpe.study.spec import define
from erpe.study.storage import parse
from erpe.tracking.connection import probe

SPEC = define("relu_general", "digits", epochs=1, sampler="random", pruner="none")


def search(store, trials):
    return tune(SPEC, store, trials=trials, executor="inline", work=work())


def trials(store):
    return [trial.uid for study in read_studies(store) for trial in study.trials]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A store after two commands, three trials; change a copy, not it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", "nowhere://")
        store = Store.open(tmp_path_factory.mktemp("made") / "store")
        search(store, 2)
        search(store, 3)
    return store


@pytest.fixture
def store(made, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nowhere://")
    return Store.existing(shutil.copytree(made.root, tmp_path / "store"))


@pytest.fixture
def command(store, monkeypatch, capsys):
    def run(*words):
        monkeypatch.setattr(sys, "argv", ["erpe", *words, "--store", str(store.root)])
        with pytest.raises(SystemExit) as ended:
            app.main()
        said = capsys.readouterr()
        return ended.value.code, said.out, said.err

    return run


def truncated(path):
    os.truncate(path, path.stat().st_size * 2 // 3 // 4096 * 4096 - 100)


def overwritten(path):
    data = bytearray(path.read_bytes())
    data[4096:] = b"\xff" * (len(data) - 4096)
    path.write_bytes(data)


def headless(path):
    path.write_bytes(b"no database" * 1000)


def empty(path):
    os.truncate(path, 0)


DAMAGE = [truncated, overwritten, headless, empty, Path.unlink]


def test_there_are_two_backups_and_a_command_that_changes_nothing_makes_none(store):
    def state():
        return {file.name: file.read_bytes() for file in backup_files(store)}

    now, backups = survey(store)
    assert (now.damage, now.trials) == ("", 3)
    assert {word: (found.damage, found.trials) for word, found in backups.items()} == {
        "newest": ("", 3), "older": ("", 2),
    }  # fmt: skip
    before = state()
    search(store, 3)
    assert len({*before.values()}) == 2
    newest = survey(store)[1]["newest"]
    assert newest.trials == 3 and not newest.damage


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_told_with_the_way_back_which_brings_every_trial(store, command, damage):
    before, old = trials(store), backup_files(store)[1].read_bytes()
    for end in ("-wal", "-shm"):
        (store.root / f"optuna.db{end}").unlink(missing_ok=True)
    damage(store.root / "optuna.db")
    with pytest.raises(StoreError, match="`erpe restore") as told:
        search(store, 4)
    assert "\n" not in str(told.value)
    assert backup_files(store)[1].read_bytes() == old
    code, out, err = command("status")
    assert code == 1 and "`erpe restore --store " in err and "Traceback" not in err
    code, out, err = command("restore", "--json")
    shown = json.loads(out)
    assert code == 0 and shown["database"]["damage"] and shown["backups"]["newest"]["trials"] == 3
    assert shown["checkpoints"] == 3
    there = (store.root / "optuna.db").exists()
    code, out, err = command("restore", "newest")
    assert code == 0 and "restored" in out, err
    assert trials(store) == before
    assert len([*store.root.glob("optuna.db.before-restore-?")]) == there
    assert search(store, 4).counts["COMPLETE"] == 4 and trials(store)[:3] == before


def test_the_older_backup_lacks_only_the_later_trials_which_run_again(store):
    before = trials(store)
    kept = restore(store, "older")
    assert trials(store) == before[:2] and kept.exists()
    search(store, 3)
    assert trials(store) == before


def test_nothing_is_restored_under_a_running_study(store):
    lease = acquire(parse(store.storage_url), SPEC.name)
    before = (store.root / "optuna.db").read_bytes()
    with pytest.raises(BusyError, match=f"{SPEC.name}: another erpe is running it"):
        restore(store, "newest")
    lease.release()
    assert (store.root / "optuna.db").read_bytes() == before
    restore(store, "newest")


def test_a_word_that_is_no_backup_and_a_damaged_backup_are_one_line(store, command):
    with pytest.raises(StudyError, match=r"no backup 'newset'.*newest"):
        restore(store, "newset")
    headless(backup_files(store)[0])
    before = (store.root / "optuna.db").read_bytes()
    with pytest.raises(StoreError, match=r"not a database.*use the other backup instead"):
        restore(store, "newest")
    assert (store.root / "optuna.db").read_bytes() == before
    said = command("restore")[1]
    assert "damaged (file is not a database)" in said and f"erpe restore older --store {store.root};" in said


def test_a_database_elsewhere_is_not_ours_to_back_up(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nowhere://")
    monkeypatch.setenv("ERPE_STORAGE_URL", f"sqlite:///{tmp_path / 'elsewhere.db'}")
    store = Store.open(tmp_path / "store")
    search(store, 1)
    assert not (store.root / "backups").exists()
    with pytest.raises(StoreError, match="outside of the store"):
        survey(store)


@pytest.mark.slow
@pytest.mark.parametrize("damage", [overwritten, empty])
def test_a_damaged_mlflow_database_is_filled_again_by_sync(tmp_path, damage, empty_database):
    store = Store.open(tmp_path / "store")
    path = Path(shutil.copy(empty_database, store.root / "mlflow.db"))
    send(store)
    told = metrics(path)
    damage(path)
    if damage is overwritten:
        assert "`erpe sync` puts it aside and fills a new one" in (probe(store.tracking_uri) or "")
    # another process: MLflow keeps connections to the file that was moved away
    words = [sys.executable, "-m", "erpe", "sync", "--store", store.root]
    run = subprocess.run(words, capture_output=True, text=True)
    assert run.returncode == 0 and "sent again; everything arrived" in run.stdout, run.stderr
    assert metrics(path) == told
    aside = [*store.root.glob("mlflow.db.damaged-?")]
    assert len(aside) == ("was damaged and is now" in run.stderr) == (damage is not empty)
