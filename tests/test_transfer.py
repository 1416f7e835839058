"""A study that was run elsewhere arrives here once: whole, whatever happens in between, and nothing hostile with it."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import sqlite3
import sys
from contextlib import closing
from pathlib import Path

import numpy as np
import optuna
import pytest
from mlflow_server import rows
from test_run_study import calls, is_confirmation
from test_run_study import play as play_three
from test_run_study import played as played_three
from toys import work

from erpe.cli import app
from erpe.errors import ErpeError, StoreError, StudyError
from erpe.report.sources.store import load
from erpe.store import Store
from erpe.study.reading import read_studies
from erpe.study.records import EPOCH
from erpe.study.session import StudySession
from erpe.study.storage import Database
from erpe.tracking import artifacts
from erpe.tracking.image import desired
from erpe.tracking.publisher import Repaired
from erpe.training import checkpoint
from erpe.transfer import importer as adopting
from erpe.transfer import source
from erpe.transfer.importer import adopt
from erpe.transfer.optuna_copy import facts

NAME = "digits-nine"
ARMS = ("softmax", "relu")
ONE = ('variants=["relu"]', "search.trials=1", "confirm.seeds=1")


def play(store, *changes, **options):
    """A study of toys with two arms, each with two trials and two seeds."""
    return play_three(store, f"variants={json.dumps(ARMS)}", *changes, **options)


def played(store, *changes):
    """See `play`; copied."""
    played_three(store, f"variants={json.dumps(ARMS)}", *changes)


@pytest.fixture
def there(tmp_path):
    """Where there is neither Ray nor MLflow."""
    return Store.open(tmp_path / "there")


@pytest.fixture
def here(tmp_path):
    return Store.open(tmp_path / "here")


def contents(store):
    """All that should arrive: studies, files, and so the image; without what counts drivers or places."""
    database = Database(store.storage_url)
    with closing(database):
        studies = {name: optuna.load_study(study_name=name, storage=database.backend) for name in database.names()}
        found = {
            name: (study.directions, study.user_attrs | {EPOCH: 0}, [facts(trial) for trial in study.get_trials()])
            for name, study in studies.items()
        }
    files = {
        str(path.relative_to(store.root)): path.read_bytes()
        for path in sorted(store.checkpoints.rglob("*"))
        if path.name in source.FILES and path.is_file()
    }
    members = read_studies(store)
    images = {image.uid: image._replace(folder=None) for image in desired(members, store, running=False)}
    return found, files, images


def every_byte(folder):
    """Of a store nobody should write to."""
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file() and not path.is_symlink()}


def interrupted(after):
    """Work whose Ctrl-C comes in the second epoch of a trial."""
    starts = []

    def accident(folder, epoch):
        starts.append(folder)
        if len(starts) == after:
            raise KeyboardInterrupt

    return work(accident=accident)


@pytest.mark.slow
def test_a_study_run_elsewhere_is_here_as_if_it_were_run_here(there, here, tmp_path):
    played(there)
    before = every_byte(there.root)
    (found,) = adopt(there.root, here)
    assert found == (NAME, 2 * (2 + 2))
    assert contents(here) == contents(there) and len(contents(here)[1]) == 3 * 8
    assert every_byte(there.root) == before, "it only reads there"
    local = Store.open(tmp_path / "local")
    played(local)
    for name, without in (("arms", []), ("runs", ["uid"]), ("trials", ["uid", "seconds"]), ("epochs", ["uid"])):
        mine, theirs = (getattr(load(store), name).drop(columns=without) for store in (here, local))
        assert mine.equals(theirs), name


def test_twice_is_once(there, here):
    played(there)
    adopt(there.root, here)
    before = contents(here)
    assert adopt(there.root, here) == [(NAME, 0)]
    assert contents(here) == before


@pytest.mark.slow
@pytest.mark.parametrize("after", [3, 10])
def test_what_went_on_there_arrives_later_and_nothing_is_doubled(there, here, after):
    with pytest.raises(KeyboardInterrupt):
        play(there, work=interrupted(after=after))
    adopt(there.root, here)
    assert contents(here) == contents(there), "a trial that runs is here, too"
    play(there)
    (found,) = adopt(there.root, here)
    assert 0 < found.trials < 9 and contents(here) == contents(there)
    play(there, "search.trials=3", "confirm.seeds=3", replace=True)
    adopt(there.root, here)
    assert contents(here) == contents(there)


@pytest.mark.slow
def test_begun_there_it_can_be_finished_here_and_then_there_is_no_news(there, here, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        play(there, work=interrupted(after=9))
    adopt(there.root, here)
    assert play(here).confirmed == dict.fromkeys(ARMS, 2)
    whole = Store.open(tmp_path / "whole")
    played(whole)
    assert load(here).runs.drop(columns="uid").equals(load(whole).runs.drop(columns="uid"))
    tests = calls(here, "test")
    assert set(tests.values()) == {1} and all(is_confirmation(folder) for folder in tests)
    before = contents(here)
    assert adopt(there.root, here) == [(NAME, 0)] and contents(here) == before


class Killed(BaseException):
    """Stands for SIGKILL: no handler of ours catches it."""


@pytest.mark.parametrize("half", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["first", "later"])
def test_killed_at_any_write_the_same_call_finishes_it(there, here, monkeypatch, half):
    """Every file and every row, one after the other, is the write that is cut short."""
    Database(here.storage_url).close()
    if half:
        with pytest.raises(KeyboardInterrupt):
            play(there, *ONE, work=interrupted(after=2))
        adopt(there.root, here)
    play(there, *ONE)
    template = shutil.copytree(here.root, here.root.with_name("template"))
    left, turn, wanted = 0, 0, contents(there)

    def mortal(call):
        def killed(*args, **kwargs):
            nonlocal left
            left -= 1
            if left == 0:
                raise Killed
            return call(*args, **kwargs)

        return killed

    def some(call, every):
        """Not each of many small writes: a repetition takes a second."""

        def killed(*args, **kwargs):
            nonlocal turn
            turn += 1
            return (call if turn % every else mortal(call))(*args, **kwargs)

        return killed

    monkeypatch.setattr(adopting, "write_atomic", mortal(adopting.write_atomic))
    for name, every in {
        "delete_study": 1,
        "create_new_study": 1,
        "create_new_trial": 1,
        "set_study_user_attr": 3,
    }.items():
        call = getattr(optuna.storages.RDBStorage, name)
        monkeypatch.setattr(optuna.storages.RDBStorage, name, some(call, every) if every > 1 else mortal(call))
    for kill in range(1, 200):
        shutil.rmtree(here.root)
        shutil.copytree(template, here.root)
        left, turn = kill, 0
        try:
            adopt(there.root, here)
            break
        except Killed:
            left = 0
        adopt(there.root, here)
        assert contents(here) == wanted, kill
    assert contents(here) == wanted and kill > 5


def refused(there, here, said, kind=ErpeError):
    """Adopting is refused in one line, before anything is written."""
    before = contents(here)
    with pytest.raises(kind, match=said) as error:
        adopt(there.root, here)
    assert "\n" not in str(error.value) and "Traceback" not in str(error.value)
    assert contents(here) == before


def test_another_study_of_that_name_is_refused(there, here):
    played(there, *ONE)
    play(here, *ONE)
    refused(there, here, r"study digits-nine/relu: a different study here has this name; use --store", StudyError)


def test_other_arms_under_the_same_name_are_refused(there, here):
    played(there, *ONE)
    play(here, *ONE, 'variants=["softmax"]')
    refused(there, here, "study digits-nine: a different one here has this name", StudyError)


@pytest.mark.slow
def test_what_went_on_in_both_places_is_refused(there, here):
    played(there, *ONE)
    adopt(there.root, here)
    play(there, *ONE, "search.trials=2", replace=True)
    play(here, *ONE, "search.trials=3", replace=True)
    refused(there, here, r"digits-nine/relu: it continued here and there", StudyError)


def test_a_study_that_runs_here_or_there_is_left_alone(there, here):
    from erpe.study.spec import define

    spec = define("relu", "digits", epochs=1)
    for store, said in ((there, "is running in"), (here, "another erpe is running it")):
        with (
            StudySession.open(there, spec, name="solo")
            if store is there
            else StudySession.open(here, spec, name="solo")
        ):
            if store is there:
                refused(there, here, said, StudyError)
            else:
                StudySession.open(there, spec, name="solo").__exit__()
                refused(there, here, said, StudyError)


def test_a_store_is_not_taken_into_itself(here):
    played(here, *ONE)
    refused(here, here, "is this store itself", StoreError)


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    store = Store.open(tmp_path_factory.mktemp("original") / "store")
    played(store, *ONE)
    return store.root


def search_folder(root):
    return next((root / "checkpoints/digits-nine.relu").iterdir())


def replace(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def sql(*statements):
    def change(root):
        with closing(sqlite3.connect(root / "optuna.db")) as database:
            for statement in statements:
                database.execute(statement)
            database.commit()

    return change


def link(place, target="/etc/passwd"):
    def change(root):
        path = next(root.glob(place))
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        path.symlink_to(target)

    return change


def moved(place):
    """A folder of the store that lies elsewhere, and a link to it."""

    def change(root):
        path = next(root.glob(place))
        elsewhere = root.with_name("elsewhere")
        path.rename(elsewhere)
        path.symlink_to(elsewhere)

    return change


def npz(**arrays):
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)
    return file.getvalue()


class Bomb:
    def __reduce__(self):
        return (os.system, ("touch /tmp/erpe-was-here",))


STUDY_ROW = "UPDATE studies SET study_name = '{}' WHERE study_name = 'digits-nine.relu'"
ATTRIBUTE = "UPDATE {}_user_attributes SET value_json = '{}' WHERE key = 'erpe.{}'"
HOSTILE = {
    "a linked file": (link("checkpoints/*/*/outcome.json"), "outcome.json: a link or not a plain file"),
    "a linked trial": (moved("checkpoints/digits-nine.relu/*"), "a link"),
    "linked checkpoints": (moved("checkpoints"), "a link"),
    "a linked history": (link("checkpoints/*/*/history.jsonl"), "history.jsonl: a link"),
    "a linked database": (link("optuna.db"), "optuna.db: a link"),
    "a linked lock": (link("locks/*.lock"), "lock: a link"),
    "a pipe": (lambda root: os.mkfifo(search_folder(root) / "config.json"), "not a plain file"),
    "a pickle": (
        lambda root: replace(search_folder(root) / "attention.npz", npz(image=np.array([Bomb()], dtype=object))),
        "attention.npz: missing or damaged",
    ),
    "a bare pickle": (
        lambda root: replace(search_folder(root) / "predictions.npz", pickle.dumps(Bomb())), "predictions.npz: missing"
    ),
    "a file that unfolds": (
        lambda root: replace(search_folder(root) / "attention.npz", npz(image=np.zeros(70 * 2**20, np.uint8))),
        "larger than",
    ),
    "a file too large": (lambda root: replace(search_folder(root) / "config.json", b" " * (2**20 + 1)), "more than"),
    "half a JSON file": (lambda root: replace(search_folder(root) / "outcome.json", '{"metrics": {'), "copy the store"),
    "a deep JSON file": (lambda root: replace(search_folder(root) / "config.json", "[" * 10**5), "damaged"),
    "half a model": (lambda root: replace(search_folder(root) / "model.safetensors", b"\x40" + b"\0" * 9), "damaged"),
    "no outcome": (lambda root: (search_folder(root) / "outcome.json").unlink(), "outcome.json is missing"),
    "no database": (lambda root: (root / "optuna.db").unlink(), "has no optuna.db"),
    "no store": (lambda root: (root / "erpe.json").unlink(), "not a store"),
    "another layout": (lambda root: replace(root / "erpe.json", '{"layout": 99}'), "not a store of this version"),
    "not a database": (lambda root: replace(root / "optuna.db", b"hello" * 1000), "not a database"),
    "half a database": (
        lambda root: replace(root / "optuna.db", (root / "optuna.db").read_bytes()[:9000]), "damaged|malformed"
    ),
    "a view": (sql("CREATE VIEW extra AS SELECT 1"), "not Optuna's tables"),
    "a trigger": (
        sql("CREATE TRIGGER t AFTER INSERT ON trials BEGIN DELETE FROM studies; END"), "not Optuna's tables"
    ),
    "other tables": (sql("ALTER TABLE trials RENAME TO were"), "there/optuna.db: "),
    "a study's name that is a path": (sql(STUDY_ROW.format("../../evil")), "study name '../../evil'"),
    "a study's name of two lines": (sql(STUDY_ROW.format("a\nb")), "study name"),
    "a study of another program": (sql("DELETE FROM study_user_attributes"), "not made by erpe"),
    "a uid that is a query": (
        sql(ATTRIBUTE.format("study", '{"uid": "x'' or 1", "spec": {}, "settings": {}}', "study")), "damaged, or not"
    ),
    "an attribute that is no JSON": (sql(ATTRIBUTE.format("study", "{{{", "study")), "damaged, or not"),
    "a group that is none": (sql(ATTRIBUTE.format("study", '{"evil": 1}', "group")), "damaged, or not"),
    "a group that is a path": (
        sql(ATTRIBUTE.format("study", '{"study": "../x", "arm": "relu", "phase": "", "plan": {}}', "group")), "db: name"
    ),
    "a plan of nonsense": (
        sql(ATTRIBUTE.format("study", '{"study": "x", "arm": "relu", "phase": "", "plan": {}}', "group")), "name: a"
    ),
    "an ending of nonsense": (
        sql(ATTRIBUTE.format("trial", '{"state": "COMPLETE", "metrics": {"params": "many"}, "reason": null}', "end")),
        "damaged, or not",
    ),
    "a trial of nonsense": (sql(ATTRIBUTE.format("trial", '{"model": 1}', "config")), "another version"),
    "a state that is none": (sql("UPDATE trials SET state = 'EVIL'"), "damaged, or not"),
    "a number that is text": (sql("UPDATE trials SET number = '../../x'"), "damaged, or not"),
    "a damaged history": (lambda root: replace(search_folder(root) / "history.jsonl", "[1]"), "copy the store"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_or_damaged_folder_is_refused_before_anything_is_written(original, here, tmp_path, what):
    change, said = HOSTILE[what]
    root = shutil.copytree(original, tmp_path / "there")
    change(root)
    refused(Store(root), here, said)
    assert not any(here.checkpoints.iterdir()) and not Path("/tmp/erpe-was-here").exists()


def test_what_erpe_does_not_write_stays_there(original, here, tmp_path):
    root = shutil.copytree(original, tmp_path / "there")
    (search_folder(root) / "evil.pkl").write_bytes(b"x")
    (search_folder(root) / "deeper").mkdir()
    shutil.copytree(search_folder(root), root / "checkpoints/digits-nine.relu/0099-1")
    adopt(root, here)
    files = {path.name for path in here.checkpoints.rglob("*") if path.is_file()}
    assert files == {"outcome.json", "log.txt", "history.jsonl"}
    assert len(list(here.checkpoints.glob("*/*"))) == 2


def test_what_was_in_the_write_ahead_log_arrives_too(original, here, tmp_path):
    """A copy of a store whose process was killed has an `optuna.db-wal`."""
    database = Database(f"sqlite:///{original / 'optuna.db'}")
    with closing(database):
        study = optuna.load_study(study_name="digits-nine.relu", storage=database.backend)
        study.set_user_attr("late", 1)
        assert (original / "optuna.db-wal").stat().st_size
        root = shutil.copytree(original, tmp_path / "there")
    adopt(root, here)
    assert contents(here)[0]["digits-nine.relu"][1]["late"] == 1


def test_a_checkpoint_of_a_trial_that_ended_does_not_stay_behind(original, here, tmp_path):
    root = shutil.copytree(original, tmp_path / "there")
    adopt(root, here)
    stale = search_folder(here.root) / "training.safetensors"
    stale.write_bytes(b"old")
    adopt(root, here)
    assert not stale.exists()


def test_the_texts_of_a_trial_arrive(original, here, tmp_path):
    root = shutil.copytree(original, tmp_path / "there")
    (search_folder(root) / "plugins.txt").write_text("# a plug-in")
    adopt(root, here)
    assert (search_folder(here.root) / "plugins.txt").read_text() == "# a plug-in"


def test_every_file_of_a_trial_is_known():
    assert set(source.FILES) >= {checkpoint.STATE, checkpoint.MODEL, *artifacts.CHECKPOINT}
    assert set(source.FILES) >= set(artifacts.RESULTS) - {"report.html"}


def erpe(monkeypatch, capsys, *words):
    """Exit code, and what was said."""
    monkeypatch.setattr(sys, "argv", ["erpe", *map(str, words)])
    code = 0
    try:
        app.main()
    except SystemExit as end:
        code = end.code
    return code, "".join(capsys.readouterr())


def test_the_command_takes_over_a_folder_and_sends_a_study(original, tmp_path, monkeypatch, capsys):
    sent, store = [], tmp_path / "runs"

    def send(store, study, tell, mend):
        sent.append((store.root, study))
        tell(study, 0, Repaired())
        return {study: 0}

    monkeypatch.setattr("erpe.cli.sync.sync", send)
    code, said = erpe(monkeypatch, capsys, "sync", original, "--store", store)
    assert code == 0 and said.startswith(f"{NAME}: 2 trials taken over") and "everything arrived" in said
    code, said = erpe(monkeypatch, capsys, "sync", original, "--store", store)
    assert code == 0 and said.startswith(f"{NAME}: no news")
    monkeypatch.chdir(tmp_path)
    (tmp_path / NAME).mkdir()  # of no consequence: it holds no store
    assert erpe(monkeypatch, capsys, "sync", NAME, "--store", store)[0] == 0
    assert sent == [(store, NAME)] * 3
    (tmp_path / "empty").mkdir()
    code, said = erpe(monkeypatch, capsys, "sync", "empty", "--store", tmp_path / "new")
    assert code == 1 and "empty: a folder, but not a store" in said and not (tmp_path / "new").exists()


@pytest.mark.slow
def test_into_postgresql_and_on(there, here, postgres, monkeypatch):
    def into_server():
        with monkeypatch.context() as patch:
            patch.setenv("ERPE_STORAGE_URL", postgres.url)
            return adopt(there.root, here), contents(here)

    with pytest.raises(KeyboardInterrupt):
        play(there, work=interrupted(after=8))
    assert into_server()[1] == contents(there)
    play(there)
    assert into_server()[1] == contents(there)
    assert into_server()[0] == [(NAME, 0)]


@pytest.mark.slow
def test_mlflow_shows_the_study_as_if_it_were_run_here(there, here, empty_database, tmp_path):
    from erpe.tracking.tracker import sync

    with pytest.raises(KeyboardInterrupt):
        play(there, *ONE, work=interrupted(after=2))
    for store in (there, here):
        shutil.copy(empty_database, store.root / "mlflow.db")
    adopt(there.root, here)
    assert sync(here, NAME) == {NAME: 0}
    play(there, *ONE)
    adopt(there.root, here)
    assert sync(here, NAME) == {NAME: 0} == sync(there, NAME)
    adopt(there.root, here)
    assert sync(here, NAME) == {NAME: 0}
    query = """
        SELECT r.name, r.status, r.start_time, r.end_time, {} FROM runs r JOIN {} x USING (run_uuid)
        WHERE x.key NOT LIKE 'mlflow.%' ORDER BY 1, 5, 6, 7
    """
    for what in (
        ("x.key, x.value, x.step, x.timestamp", "metrics"),
        ("x.key, x.value, 0", "params"),
        ("x.key, x.value, 0", "tags"),
    ):
        found = [rows(store.root / "mlflow.db", query.format(*what)) for store in (here, there)]
        assert found[0] == found[1] and found[0]
    for store in (here, there):
        assert rows(store.root / "mlflow.db", "SELECT count(*), count(DISTINCT name) FROM runs") == [(4, 4)]
    figures = [{path.name for path in store.artifacts.rglob("*.*")} for store in (here, there)]
    assert figures[0] == figures[1] and json.dumps(sorted(figures[0]))
