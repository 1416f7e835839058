"""`erpe gc`: what a policy names goes everywhere at once, and what is needed stays, whatever happens in between."""

from __future__ import annotations

import json
import shutil
import sys
import threading
from contextlib import closing
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path

import numpy as np
import optuna
import pytest
from mlflow_server import mlflow_server, rows
from test_run_study import play
from test_tune import logs
from toys import number_of, work
from trials import TINY

from erpe.cli import app
from erpe.errors import BusyError, StoreError, StudyError, TrackingError, TrialError
from erpe.inference import find_folder
from erpe.report.sources.store import load
from erpe.results import load_study
from erpe.retention.gc import gc
from erpe.retention.policy import Policy, decide
from erpe.search.tune import tune
from erpe.store import Store
from erpe.study.reading import mark_removed, read_studies
from erpe.study.records import REMOVED
from erpe.study.session import StudySession
from erpe.study.spec import define
from erpe.study.storage import Database
from erpe.tracking import deletion
from erpe.tracking.cursor import Cursor
from erpe.tracking.tracker import Tracker, sync
from erpe.transfer.importer import adopt
from erpe.transfer.optuna_copy import facts

SPEC = define("relu", "digits", epochs=2, sampler="random", pruner="none")
NAME = SPEC.name
ALL = Policy(older_than=0)
"""Asks for every trial that ended."""


def _fail(folder, epoch):
    if number_of(folder) in (1, 3):
        raise TrialError("the loss is nan")


def search(store, trials=6, spec=SPEC):
    """Trials 1 and 3 fail."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("erpe.tracking.tracker.Tracker", partial(Tracker, send=False))
        return tune(spec, store, trials=trials, executor="inline", work=work(accident=_fail))


@pytest.fixture(scope="module")
def templates(tmp_path_factory):
    """Stores that were filled once, to be copied."""
    root = tmp_path_factory.mktemp("templates")
    search(Store.open(root / "searched"))
    play(Store.open(root / "nine"), "search.trials=3")
    return root


@pytest.fixture
def store(templates, tmp_path):
    """Six trials, of which 1 and 3 failed; MLflow was told nothing."""
    return Store(shutil.copytree(templates / "searched", tmp_path / "store"))


@pytest.fixture
def nine(templates, tmp_path):
    """Three arms, each with three trials and two confirmed runs; MLflow was told nothing."""
    return Store(shutil.copytree(templates / "nine", tmp_path / "nine"))


@pytest.fixture
def empty(tmp_path):
    return Store.open(tmp_path / "empty")


def interrupted(folder, epoch):
    if number_of(folder) == 4:
        raise KeyboardInterrupt
    _fail(folder, epoch)


def optuna_has(store):
    """Every study's attributes and trials, all but places."""
    with closing(Database(store.storage_url)) as database:
        studies = [optuna.load_study(study_name=name, storage=database.backend) for name in database.names()]
        return {each.study_name: (each.user_attrs, [facts(trial) for trial in each.get_trials()]) for each in studies}


def every_file(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def everything(store):
    beside = {path: found for path, found in every_file(store.root).items() if path.parent != store.root}
    return optuna_has(store), {path: found for path, found in beside.items() if path.suffix != ".lock"}


def folders(store):
    return {str(path.relative_to(store.checkpoints)) for path in store.checkpoints.glob("*/*")}


def trials(store, name=NAME):
    return read_studies(store, name)[0].trials


def removed(store):
    """How many trials were."""
    return sum(trial.removed for study in read_studies(store) for trial in study.trials)


def ranked(store):
    """Numbers of the complete trials, best first."""
    complete = [trial for trial in trials(store) if trial.state == "COMPLETE"]
    return [trial.number for trial in sorted(complete, key=lambda trial: -trial.value)]


def database(store):
    """MLflow's."""
    return Path(store.tracking_uri.removeprefix("sqlite:///"))


def check_nothing_dangles(store, experiment=NAME):
    """Database, folders and MLflow, if there is one, agree trial by trial on what was removed."""
    members = [study for study in read_studies(store) if study.experiment == experiment]
    every = [(study.name, trial) for study in members for trial in study.trials]
    alive = {f"{name}/{trial.number:04d}-{trial.config.seed}" for name, trial in every if not trial.removed}
    names = {study.name for study in members}
    assert {folder for folder in folders(store) if folder.partition("/")[0] in names} == alive
    gone = {trial.uid for _, trial in every if trial.removed}
    if (mlflow := database(store)).exists():
        kept = {trial.uid for _, trial in every} - gone
        uids = {uid for (uid,) in rows(mlflow, "SELECT value FROM tags WHERE key = 'erpe.trial_uid'")}
        assert uids == kept
        runs = {run for (run,) in rows(mlflow, "SELECT run_uuid FROM runs")}
        for table in ("metrics", "latest_metrics", "params", "tags"):
            assert {run for (run,) in rows(mlflow, f"SELECT DISTINCT run_uuid FROM {table}")} <= runs
        assert {path.name for path in (store.artifacts / experiment).iterdir()} <= runs


# What goes and what stays


@pytest.mark.slow
def test_a_dry_run_says_what_goes_and_changes_nothing(store):
    before = everything(store)
    said = gc(store, Policy(keep_best=2), dry_run=True)
    assert everything(store) == before
    (swept,) = said.studies
    sizes = [path.stat().st_size for n in swept.going for path in store.checkpoints.glob(f"*/{n:04d}-*/*")]
    assert swept.checkpoints_mib == pytest.approx(sum(sizes) / 2**20)
    assert gc(store, Policy(keep_best=2)) == said
    assert {trial.number for trial in trials(store) if trial.removed} == set(swept.going)
    check_nothing_dangles(store)
    (after,) = gc(store, Policy(keep_best=2)).studies
    assert (after.going, after.removed) == ([], swept.going)


@pytest.mark.parametrize("keep", [1, 3, 99])
def test_the_best_stay(store, keep):
    best = ranked(store)[:keep]
    (swept,) = gc(store, Policy(keep_best=keep)).studies
    assert sorted(swept.staying["best"]) == sorted(best) and sorted([*swept.going, *best]) == list(range(6))
    assert {number_of(Path(folder)) for folder in folders(store)} == set(best)


def test_each_condition_spares_more(store):
    (study,) = read_studies(store)
    now, later = datetime.now(), datetime.now() + timedelta(days=31)
    best = study.best.number
    every = set(range(6)) - {best}

    def going(when=later, **policy):
        return {trial.number for trial in decide(study, Policy(**policy), set(), when).going}

    assert going(failed=True) == {1, 3} and going(older_than=30) == every and going(keep_best=1) == every
    assert going(now, older_than=30) == set() == going(now, older_than=30, failed=True) == going(now)
    assert going(failed=True, older_than=30) == {1, 3} and going(older_than=1e300) == set()
    assert going(older_than=30, keep_best=3) == set(range(6)) - set(ranked(store)[:3])


def test_unfinished_and_registered_trials_stay_whatever_is_asked(empty):
    store = empty
    with pytest.raises(KeyboardInterrupt), pytest.MonkeyPatch.context() as patch:
        patch.setattr("erpe.tracking.tracker.Tracker", partial(Tracker, send=False))
        tune(SPEC, store, trials=6, executor="inline", work=work(accident=interrupted))
    (study,) = read_studies(store)
    other = next(trial for trial in study.trials if trial.state == "COMPLETE" and trial != study.best)
    assert decide(study, ALL, {other.uid}, datetime.now()).staying["registered"] == [other.number]
    (swept,) = gc(store, ALL).studies
    assert swept.going == sorted([1, other.number, 3])
    assert swept.staying == {"unfinished": [4], "best": [study.best.number]}
    check_nothing_dangles(store)
    assert search(store).counts == {"COMPLETE": 4, "FAIL": 2}


@pytest.mark.slow
def test_all_of_a_confirmation_stays_and_so_does_what_is_compared(nine):
    before = load(nine)
    found = gc(nine, ALL, study="digits-nine")
    assert {(swept.study, swept.arm): len(swept.going) for swept in found.studies if swept.going} == {
        ("digits-nine", arm): 2 for arm in ("softmax", "relu", "relu_rope")
    }
    assert all(set(swept.staying) == {"confirmed"} for swept in found.studies if swept.phase == "confirm")
    check_nothing_dangles(nine, "digits-nine")
    after = load(nine)
    for table in ("arms", "runs", "trials", "epochs"):
        assert getattr(after, table).equals(getattr(before, table)), table
    play(nine, "search.trials=3", work=work()._replace(start=pytest.fail, confirm=pytest.fail, time=pytest.fail))


def test_one_arm_of_a_study_can_be_named(nine):
    found = gc(nine, ALL, study="digits-nine/relu")
    assert {(swept.study, swept.arm) for swept in found.studies} == {("digits-nine", "relu")}
    check_nothing_dangles(nine, "digits-nine")


# What goes on afterwards


def test_the_same_command_continues_and_trains_nothing_twice(store):
    (swept,) = gc(store, Policy(keep_best=1)).studies
    rows_before = optuna_has(store)[NAME][1]
    assert search(store).counts == {"COMPLETE": 4, "FAIL": 2}
    assert optuna_has(store)[NAME][1] == rows_before
    assert not {number_of(Path(folder)) for folder in folders(store)} & set(swept.going), "nothing was trained again"
    assert search(store, trials=9).counts == {"COMPLETE": 7, "FAIL": 2}
    assert {number for number, log in logs(store, NAME).items() if "start" in log} == set(range(9)) - set(swept.going)
    check_nothing_dangles(store)


def test_what_was_measured_of_a_removed_trial_can_be_read_and_its_model_is_told_to_be_gone(nine, capsys, monkeypatch):
    gc(nine, ALL)
    gone = next(trial for trial in trials(nine, "digits-nine.relu") if trial.removed)
    with pytest.raises(StudyError, match="`erpe gc` removed its model"):
        find_folder(f"digits-nine/relu/{gone.number}", nine)
    study = load_study("digits-nine", nine.root)
    assert gone.uid in set(study.trials["uid"]) and study.best("relu")
    with pytest.raises(StudyError, match=f"`erpe gc` removed the model of trial {gone.uid}"):
        study.model(gone.uid)
    code, said = erpe(monkeypatch, capsys, "status", "digits-nine/relu", "--store", nine.root)
    assert code == 0 and said.count("complete, removed") == 2
    code, said = erpe(monkeypatch, capsys, "status", "digits-nine/relu", "--store", nine.root, "--json")
    assert sum(trial["removed"] for trial in json.loads(said)[0]["trials"]) == 2


@pytest.mark.slow
def test_a_removed_trial_does_not_return_from_where_it_came(nine, empty):
    adopt(nine.root, empty)
    gc(empty, ALL)
    (found,) = adopt(nine.root, empty)
    assert found.trials == 0
    check_nothing_dangles(empty, "digits-nine")
    play(nine, "search.trials=4", replace=True)
    (found,) = adopt(nine.root, empty)
    assert found.trials
    check_nothing_dangles(empty, "digits-nine")
    assert removed(empty) == 6


@pytest.mark.slow
@pytest.mark.parametrize("ahead", [False, True], ids=["the same", "ahead"])
def test_what_was_removed_there_is_removed_here_too(nine, empty, tmp_path, ahead):
    adopt(nine.root, empty)
    if ahead:
        play(empty, "search.trials=4", replace=True)
    gc(nine, ALL)
    for _ in range(2):
        adopt(nine.root, empty)
        check_nothing_dangles(empty, "digits-nine")
        assert removed(empty) == 6
    fresh = Store.open(tmp_path / "fresh")
    adopt(nine.root, fresh)
    check_nothing_dangles(fresh, "digits-nine")


def test_a_foreign_store_cannot_have_the_best_removed(nine, empty):
    adopt(nine.root, empty)
    before = everything(empty)
    with closing(Database(nine.storage_url)) as database:
        study = optuna.load_study(study_name="digits-nine.relu", storage=database.backend)
        for value, said in (([study.best_trial.number], "were removed, which erpe never does"), (["x"], "damaged")):
            study.set_user_attr(REMOVED, value)
            with pytest.raises(StoreError, match=said):
                adopt(nine.root, empty)
    assert everything(empty) == before


# Killed, running, linked


class Killed(BaseException):
    """Stands for SIGKILL: no handler of ours catches it."""


class Mortal:
    """Makes calls of which the n-th is the last."""

    def __init__(self, patch):
        self.left, self._patch = 0, patch

    def make(self, owner, name, last_breath=lambda *args: None):
        call = getattr(owner, name)

        def killed(*args, **kwargs):
            self.left -= 1
            if self.left == 0:
                last_breath(*args)
                raise Killed
            return call(*args, **kwargs)

        self._patch.setattr(owner, name, killed)


def tear(folder):
    """Remove one file of a folder."""
    next(path for path in folder.rglob("*") if path.is_file()).unlink()


@pytest.mark.slow
def test_killed_before_any_write_the_same_call_finishes(store, monkeypatch):
    mortal = Mortal(monkeypatch)
    mortal.make(optuna.storages.RDBStorage, "set_study_user_attr")
    mortal.make(shutil, "rmtree", tear)
    wanted = set(range(6)) - set(ranked(store)[:2])
    for kill in range(1, 50):
        copy = Store(shutil.copytree(store.root, store.root.with_name(f"killed-{kill}")))
        mortal.left = kill
        try:
            gc(copy, Policy(keep_best=2))
            break
        except Killed:
            mortal.left = 0
        said = gc(copy, Policy(keep_best=2), dry_run=True)
        assert gc(copy, Policy(keep_best=2)) == said
        check_nothing_dangles(copy)
        assert {trial.number for trial in trials(copy) if trial.removed} == wanted
    assert kill == 1 + 1 + 4, "a mark, four folders"


@pytest.mark.parametrize("policy", [Policy(failed=True), Policy(keep_best=99)], ids=str)
def test_what_a_killed_call_has_begun_any_other_finishes(store, monkeypatch, policy):
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda *_: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            gc(store, Policy(failed=True))
    gc(store, policy)
    check_nothing_dangles(store)
    assert {trial.number for trial in trials(store) if trial.removed} == {1, 3}


def test_a_study_that_runs_is_refused_and_left_alone_among_others(store):
    other = define("softmax", "digits", epochs=2, sampler="random", pruner="none")
    search(store, spec=other)
    before = folders(store)
    with StudySession.open(store, SPEC):
        with pytest.raises(BusyError, match=f"study {NAME}: another erpe is running it; wait for it, or stop it"):
            gc(store, ALL, study=NAME)
        assert folders(store) == before
        found = gc(store, ALL)
    assert found.running == [NAME] and [swept.study for swept in found.studies] == [other.name]
    check_nothing_dangles(store, other.name)
    assert {folder for folder in before if folder.startswith(NAME)} <= folders(store)


def test_a_link_in_a_folder_is_not_followed(store):
    outside = store.root.with_name("outside")
    outside.mkdir()
    (outside / "precious").touch()
    (folder,) = store.checkpoints.glob(f"{NAME}/0001-*")
    (folder / "link").symlink_to(outside)
    gc(store, Policy(failed=True))
    assert not folder.exists() and (outside / "precious").exists()


def test_a_study_of_another_store_is_not_touched(store, tmp_path, monkeypatch):
    """Two stores may share a database: each has the files of its own studies."""
    monkeypatch.setenv("ERPE_STORAGE_URL", store.storage_url)
    other = Store.open(tmp_path / "other")
    assert gc(other, ALL).studies == []
    with pytest.raises(StudyError, match="was run from another store"):
        gc(other, ALL, study=NAME)
    assert not any(trial.removed for trial in trials(store))


# What belongs to nothing


def litter(store):
    """Folders and files as kills leave them -> their paths."""
    live = next(store.checkpoints.glob(f"{NAME}/0000-*"))
    left = [store.checkpoints / f"{NAME}/0099-7", store.checkpoints / "gone/0000-1"]
    for folder in left:
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(b"x" * 1000)
    left.append(live / ".training.safetensors.a1b2c3_d")
    left[-1].write_bytes(b"x" * 500)
    return {str(path.relative_to(store.root)) for path in left}


def test_what_belongs_to_nothing_is_shown_and_removed(store):
    before, left = everything(store), litter(store)
    said = gc(store, Policy(), dangling=True, dry_run=True)
    assert {str(path.relative_to(store.root)) for path, _ in said.strays} == left
    assert sum(mib for _, mib in said.strays) == pytest.approx(2500 / 2**20)
    assert all((store.root / path).exists() for path in left)
    assert gc(store, Policy(), dangling=True) == said
    assert everything(store) == before and not (store.checkpoints / "gone").exists()
    assert gc(store, Policy(), dangling=True).strays == []


def test_what_is_not_ours_by_its_name_or_is_a_link_stays(store):
    outside = store.root.with_name("outside")
    (outside / "0000-1").mkdir(parents=True)
    (store.checkpoints / "notes").mkdir()
    (store.checkpoints / "notes/thesis.txt").touch()
    (store.checkpoints / f"{NAME}/backup").mkdir()
    (store.checkpoints / f"{NAME}/0099-7").symlink_to(outside)
    (store.checkpoints / "linked").symlink_to(outside)
    (next(store.checkpoints.glob(f"{NAME}/0000-*")) / ".notes.a1b2c3_d").touch()
    before = every_file(store.root)
    assert gc(store, Policy(), dangling=True).strays == []
    assert every_file(store.root).keys() == before.keys() and (outside / "0000-1").exists()


def test_with_the_wrong_database_nothing_seems_to_belong_to_nothing(store, nine, monkeypatch, tmp_path):
    """Whoever forgets ERPE_STORAGE_URL must not lose all checkpoints: they have a trial's history."""
    monkeypatch.setenv("ERPE_STORAGE_URL", f"sqlite:///{tmp_path / 'other.db'}")
    for each in (store, nine):
        assert gc(each, Policy(), dangling=True).strays == []


def test_a_study_that_runs_keeps_all_its_folders(store):
    left = litter(store)
    with StudySession.open(store, SPEC):
        found = gc(store, Policy(), dangling=True)
    assert {str(path.relative_to(store.root)) for path, _ in found.strays} == {"checkpoints/gone/0000-1"} < left


# The command


def erpe(monkeypatch, capsys, *words):
    """Exit code, and what was said."""
    monkeypatch.setattr(sys, "argv", ["erpe", *map(str, words)])
    code = 0
    try:
        app.main()
    except SystemExit as end:
        code = end.code
    return code, "".join(capsys.readouterr())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "no condition given; use --keep-best K, --older-than DAYS, --failed"),
        (("--dry-run",), "no condition given"),
        (("--keep-best", "0"), "keep best: 0 given; use 1 or more instead"),
        (("--older-than", "-1"), "older than: -1.0 days given"),
        (("--older-than", "nan"), "older than: nan days given"),
        (("--older-than", "inf"), "older than: inf days given"),
        (("digits-rel", "--failed"), f"study digits-rel: not in this store; did you mean {NAME}?"),
    ],
)
def test_what_makes_no_sense_is_one_line_and_removes_nothing(store, monkeypatch, capsys, words, said):
    before = everything(store)
    code, line = erpe(monkeypatch, capsys, "gc", *words, "--store", store.root)
    assert code == 1 and said in line and line.count("\n") == 1
    assert everything(store) == before


def test_the_command_shows_what_goes_and_why_the_rest_stays(store, monkeypatch, capsys):
    where = ("--store", store.root)
    code, said = erpe(monkeypatch, capsys, "gc", "--keep-best", "2", "--dry-run", *where)
    assert code == 0 and "would go" in said and "4 trials, " in said and "nothing was changed" in said
    _, told = erpe(monkeypatch, capsys, "gc", "--keep-best", "2", "--dry-run", "--json", *where)
    found = json.loads(told)
    code, said = erpe(monkeypatch, capsys, "gc", "--keep-best", "2", "--json", *where)
    assert code == 0 and json.loads(said) == found | {"dry_run": False} and len(found["studies"][0]["going"]) == 4
    code, said = erpe(monkeypatch, capsys, "gc", "--failed", *where)
    assert code == 0 and "0 trials, 0.0 MiB: removed" in said


# MLflow

few = pytest.mark.filterwarnings("ignore:.*(regimes|region quantiles):UserWarning")
"""Optuna's plot of importances wants more trials than a test has."""


def embed(store, empty_database):
    shutil.copy(empty_database, store.root / "mlflow.db")


def moved(store, name):
    """A copy of a store, whose MLflow has what that of the original has."""
    copy = Store(shutil.copytree(store.root, store.root.with_name(name)))
    return copy


def uids(store):
    return {uid for (uid,) in rows(database(store), "SELECT value FROM tags WHERE key = 'erpe.trial_uid'")}


def run_of(store, uid):
    ((run,),) = rows(database(store), "SELECT run_uuid FROM tags WHERE value = ? AND key LIKE 'erpe%'", uid)
    return run


@few
@pytest.mark.slow
def test_runs_and_artifacts_go_too_and_a_rebuilt_mlflow_does_not_bring_them_back(store, empty_database, monkeypatch):
    embed(store, empty_database)
    assert sync(store) == {NAME: 0}
    said = gc(store, Policy(keep_best=2), dry_run=True)
    sizes = [run_of(store, trial.uid) for trial in trials(store) if trial.number in said.studies[0].going]
    bytes_ = sum(len(found) for run in sizes for found in every_file(store.artifacts / NAME / run).values())
    assert said.studies[0].artifacts_mib == pytest.approx(bytes_ / 2**20) and bytes_
    assert len(uids(store)) == 6, "a dry run"
    assert gc(store, Policy(keep_best=2)) == said
    check_nothing_dangles(store)
    assert len(uids(store)) == 2
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{store.root / 'rebuilt.db'}")
    shutil.copy(empty_database, database(store))
    assert sync(store) == {NAME: 0}
    assert uids(store) == {trial.uid for trial in trials(store) if not trial.removed}
    lost = {str(path.relative_to(store.root)) for path, _ in gc(store, Policy(), dangling=True).strays}
    assert len(lost) == 2 + 1 and all(path.startswith(f"artifacts/{NAME}/") for path in lost), "the lost runs' folders"
    check_nothing_dangles(store)


@few
@pytest.mark.slow
def test_killed_while_mlflow_is_told_the_same_call_finishes(store, empty_database, monkeypatch):
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    embed(store, empty_database)
    assert sync(store) == {NAME: 0}
    gone = {trial.uid for trial in trials(store) if trial.number in (1, 3)}
    mortal = Mortal(monkeypatch)
    for owner, name in (
        (SqlAlchemyStore, "delete_run"),
        (SqlAlchemyStore, "_hard_delete_run"),
        (Cursor, "write"),
    ):
        mortal.make(owner, name)
    mortal.make(deletion, "remove_folder", tear)
    monkeypatch.setattr(threading, "excepthook", lambda _: None)  # a sender that is killed says nothing
    for kill in range(1, 50):
        copy = moved(store, f"killed-{kill}")
        mortal.left = kill
        if not gc(copy, Policy(failed=True)).lag:
            break
        mortal.left = 0
        assert gc(copy, Policy(failed=True)).lag == 0
        check_nothing_dangles(copy)
        assert len(uids(copy)) == 4 and not uids(copy) & gone
    assert kill == 2 * 3 + 2 + 1, "delete, artifacts, row; and the cursor after each look"


@few
@pytest.mark.slow
def test_in_a_copy_of_a_store_the_original_is_left_alone(store, empty_database):
    embed(store, empty_database)
    assert sync(store) == {NAME: 0}
    copy = moved(store, "copy")
    before = {path.name for path in (store.artifacts / NAME).iterdir()}
    gc(copy, Policy(keep_best=1))
    check_nothing_dangles(copy)
    assert {path.name for path in (store.artifacts / NAME).iterdir()} == before and len(before) == 7


@few
@pytest.mark.slow
def test_a_registered_model_survives_every_policy_and_loads(empty, empty_database):
    import mlflow

    store = empty
    embed(store, empty_database)
    small = {name: value for name, value in TINY.items() if name != "train.epochs"} | {"data.train_limit": 100}
    spec = define("relu", "digits", epochs=1, sampler="random", pruner="none", settings=small | {"train.lr": 1e-3})
    tune(spec, store, trials=3, executor="inline")
    (study,) = read_studies(store)
    other = next(trial for trial in study.trials if trial != study.best)
    client = mlflow.MlflowClient(f"sqlite:///{store.root / 'mlflow.db'}")
    client.create_registered_model("by-hand")
    run = run_of(store, other.uid)
    source = f"{client.get_run(run).info.artifact_uri}/checkpoint"
    client.create_model_version("by-hand", source, run)
    for policy in (Policy(keep_best=1), ALL):
        gc(store, policy)
        check_nothing_dangles(store)
    stays = {trial.number for trial in trials(store) if not trial.removed}
    assert stays == {study.best.number, other.number}
    mlflow.set_tracking_uri(f"sqlite:///{store.root / 'mlflow.db'}")
    model = mlflow.pyfunc.load_model(f"models:/{NAME}@champion")
    assert model.predict(np.zeros((1, 1, 8, 8), np.uint8)).shape == (1, 10)
    assert find_folder(f"{NAME}/{other.number}", store).is_dir()


@few
@pytest.mark.slow
def test_a_model_that_was_registered_meanwhile_keeps_its_run(store, empty_database):
    import mlflow

    embed(store, empty_database)
    assert sync(store) == {NAME: 0}
    failed = next(trial for trial in trials(store) if trial.state == "FAIL")
    client = mlflow.MlflowClient(f"sqlite:///{store.root / 'mlflow.db'}")
    client.create_registered_model("by-hand")
    run = client.get_run(run_of(store, failed.uid))
    client.create_model_version("by-hand", run.info.artifact_uri, run.info.run_id)
    with closing(Database(store.storage_url)) as known:
        mark_removed(known, NAME, {failed.number})
    assert sync(store) == {NAME: 0} and failed.uid in uids(store)


def test_while_mlflow_cannot_be_asked_nothing_is_removed(store, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    before = everything(store)
    with pytest.raises(TrackingError, match="the registered models are unknown, so nothing is removed"):
        gc(store, ALL)
    assert everything(store) == before


@few
@pytest.mark.slow
def test_with_a_tracking_server_and_postgresql(empty, postgres, empty_database, tmp_path, monkeypatch):
    from erpe.report.sources.mlflow import read

    store = empty
    shutil.copy(empty_database, tmp_path / "server.db")
    kept = tmp_path / "server"
    monkeypatch.setenv("ERPE_STORAGE_URL", postgres.url)
    with mlflow_server(tmp_path / "server.db", kept) as url:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", url)
        play(store, "search.trials=3", "confirm.seeds=1", 'variants=["softmax", "relu"]')
        assert sync(store) == {"digits-nine": 0}
        before, files = read(url).arms, every_file(kept)
        said = gc(store, ALL, study="digits-nine", dry_run=True)
        assert every_file(kept) == files and said.on_server
        assert gc(store, ALL, study="digits-nine") == said
        check_nothing_dangles(store, "digits-nine")
        assert read(url).arms.equals(before), "the search is as done as it was"
        mib = sum(len(found) for found in files.values()) - sum(len(found) for found in every_file(kept).values())
        assert sum(swept.artifacts_mib for swept in said.studies) == pytest.approx(mib / 2**20) and mib
        alive = {run for (run,) in rows(tmp_path / "server.db", "SELECT run_uuid FROM runs WHERE deleted_time IS NULL")}
        assert {path.name for path in kept.glob("*/*")} == alive
        gone = {trial.uid for each in read_studies(store) for trial in each.trials if trial.removed}
        active = "SELECT value FROM tags JOIN runs USING (run_uuid) WHERE key = 'erpe.trial_uid' AND {}"
        assert not gone & {uid for (uid,) in rows(tmp_path / "server.db", active.format("deleted_time IS NULL"))}
        with StudySession.open(store, SPEC, name="solo"):
            (store.checkpoints / "solo").mkdir()
            with pytest.raises(BusyError, match="study solo: another erpe is running it"):
                gc(store, ALL, study="solo")
