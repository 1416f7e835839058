"""A remote: what counts of a trial comes home whole, whoever else writes there, and it may go away meanwhile."""

import os
import shutil
import signal
import threading
import time
from functools import partial
from gc import collect as gc_now
from zipfile import ZIP_DEFLATED, ZipFile

import pytest
from mlflow_server import free_port
from object_store import BUCKET, ObjectStore
from s3fs import S3FileSystem
from trials import curve, small_study, tiny

from erpe.checkpoints import RemoteCheckpoints, checked_out, find_remote, name_of
from erpe.errors import ConfigError, StoreError
from erpe.execution.objective import vision
from erpe.execution.staging import KEPT_SECONDS, PREFIX, Displaced, StagedTraining, staged
from erpe.execution.trial_loop import play
from erpe.retention.gc import gc
from erpe.retention.policy import Policy
from erpe.store import OUTCOME, STATE
from erpe.study.reading import read_studies
from erpe.training.trial import Trial

WORK = vision("digits", None, "cpu")


@pytest.fixture(scope="module")
def server():
    store = ObjectStore(free_port())
    yield store
    store.end()


@pytest.fixture(params=["folder", "s3", "memory"])
def remote(request, tmp_path, monkeypatch):
    """One of each kind, empty."""
    if request.param == "folder":
        (tmp_path / "remote").mkdir()
        return RemoteCheckpoints(str(tmp_path / "remote"))
    if request.param == "memory":
        return RemoteCheckpoints(f"memory://{tmp_path.name}")
    server = request.getfixturevalue("server")
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    return RemoteCheckpoints(f"s3://{BUCKET}/{tmp_path.name}")


@pytest.fixture
def shared(tmp_path):
    (tmp_path / "remote").mkdir()
    return RemoteCheckpoints(str(tmp_path / "remote"))


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_trial_goes_on_wherever_the_next_worker_is_and_comes_home_as_it_was_trained(remote, tmp_path):
    config, home = tiny(), tmp_path / "runs/checkpoints/study/0003-7"
    whole = Trial(config, tmp_path / "whole")
    while not whole.done:
        whole.epoch()
    begin = partial(staged(WORK, remote).start, config, home)
    first = begin()
    first.epoch()
    first.epoch()
    second = begin()  # of another host: the first one's scratch is out of its reach
    assert curve(second.history) == curve(first.history) and len(second.history) == 2
    second.epoch()
    metrics = second.finish()
    assert curve(second.history) == curve(whole.history)
    assert not home.exists(), "the driver's folder is not a worker's to make"
    remote.collect(home, finished=True)
    assert files(home) == files(second.scratch)
    third = begin()
    assert third.finish() == metrics and curve(third.history) == curve(whole.history), "nothing is trained again"
    remote.remove(name_of(home))
    remote.remove(name_of(home))
    assert not begin().history


def test_an_attempt_that_was_cut_off_overwrites_nothing(remote, tmp_path):
    home = tmp_path / "study/0000-0"
    begin = partial(StagedTraining, remote, WORK.start, tiny(), home)
    old = begin()
    old.epoch()
    new = begin()
    new.epoch()
    for say in (old.epoch, old.epoch, old.finish):
        with pytest.raises(Displaced, match="another attempt"):
            say()
    remote.collect(home, finished=False)
    assert home.joinpath(STATE).read_bytes() == (new.scratch / STATE).read_bytes()
    assert [path.name for path in home.iterdir()] == [STATE], "no results of an attempt that does not count"
    assert len(begin().history) == 2


def test_results_of_another_configuration_are_not_taken_for_a_trials_own(shared, tmp_path):
    home = tmp_path / "study/0000-0"
    other = StagedTraining(shared, WORK.start, tiny(settings={"train.epochs": 1}), home)
    other.epoch()
    other.finish()
    trial = StagedTraining(shared, WORK.start, tiny(), home)
    assert not trial.history
    trial.epoch()
    assert len(StagedTraining(shared, WORK.start, tiny(), home).history) == 1


def test_an_epoch_is_not_told_before_its_checkpoint_is_safe(shared, tmp_path):
    home = tmp_path / "study/0000-0"
    events = play(tiny(), home, partial(StagedTraining, shared, WORK.start))
    next(events), next(events)
    assert next(events).epochs
    shutil.move(tmp_path / "remote", tmp_path / "away")
    broken = next(events)
    assert not broken.epochs and "no such bucket or folder" in str(broken.broken)
    shutil.move(tmp_path / "away", tmp_path / "remote")
    assert len(StagedTraining(shared, WORK.start, tiny(), home).history) == 1


def test_storage_that_is_away_is_waited_for(monkeypatch):
    store = ObjectStore(free_port(), wait=False)
    for name, value in store.environment.items():
        monkeypatch.setenv(name, value)
    S3FileSystem.clear_instance_cache()
    try:
        remote = RemoteCheckpoints(f"s3://{BUCKET}")
        assert remote.read("x/owner") is None, "first nobody listens, then there is no such file"
        store.wait()
        remote.write("x/owner", b"0")
        store.process.send_signal(signal.SIGSTOP)
        threading.Timer(0.5, store.process.send_signal, [signal.SIGCONT]).start()
        assert remote.read("x/owner") == b"0"
    finally:
        S3FileSystem.clear_instance_cache()
        store.end()


def _zip(**files):
    def write(path):
        with ZipFile(path, "w", ZIP_DEFLATED) as archive:
            for name, content in files.items():
                archive.writestr(name.replace("__", "."), content)

    return write


@pytest.mark.parametrize(
    ("damage", "line"),
    [
        (lambda path: path.write_bytes(path.read_bytes().replace(b"head.weight", b"dead.weight")), "damaged"),
        (lambda path: path.write_bytes(path.read_bytes()[:-9]), "damaged"),
        (_zip(outcome__json="[" * 2**21, config__json=" " * 2**21), "other files"),
        (_zip(**{"outcome__json": "{}", "../../erpe__json": "0"}), "other files"),
        (lambda path: (path.unlink(), path.symlink_to("/etc/hostname")), "no plain file"),
        (lambda path: (path.unlink(), path.mkdir()), "no plain file"),
    ],
)
def test_what_comes_from_elsewhere_is_looked_at(shared, tmp_path, damage, line):
    home = tmp_path / "study/0000-0"
    trial = StagedTraining(shared, WORK.confirm, tiny(), home)
    while len(trial.history) < 3:
        trial.epoch()
    trial.finish()
    (path,) = (tmp_path / "remote" / name_of(home)).glob("*.zip")
    damage(path)
    with pytest.raises(StoreError, match=line) as said:
        shared.collect(home, finished=True)
    assert "\n" not in str(said.value)
    assert not (home / OUTCOME).exists() and not list(home.glob(".*")), "no finished trial, and no half of a file"


@pytest.mark.parametrize(
    ("url", "error", "line"),
    [
        ("nosuch://x", ConfigError, "use s3://BUCKET/FOLDER instead"),
        ("s3://bucket/x", StoreError, "cannot be reached"),
        ("gdrive://folder", ConfigError, "pip install"),
    ],
)
def test_a_wrong_place_is_one_line(monkeypatch, url, error, line):
    monkeypatch.setenv("ERPE_CHECKPOINTS", url)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    S3FileSystem.clear_instance_cache()  # it has read its environment
    with pytest.raises(error, match=line) as said:
        find_remote()
    assert "\n" not in str(said.value)


@pytest.mark.slow
def test_a_study_through_remote_checkpoints_is_the_same_study_and_leaves_nothing_there(monkeypatch, tmp_path):
    (tmp_path / "remote").mkdir()
    near = small_study(tmp_path / "near", arms=("relu",))
    monkeypatch.setenv("ERPE_CHECKPOINTS", str(tmp_path / "remote"))
    far = small_study(tmp_path / "far", arms=("relu",))
    assert not [path for path in (tmp_path / "remote").rglob("*") if path.is_file()]

    def told(store):
        return {(s.name, t.number): (t.state, t.epochs) for s in read_studies(store) for t in s.trials}

    def kept(store):
        return {path.relative_to(store.checkpoints) for path in store.checkpoints.rglob("*") if path.is_file()}

    assert told(far) == told(near) and kept(far) == kept(near)


def test_a_study_begun_without_remote_checkpoints_goes_on_with_one(shared, tmp_path):
    home = tmp_path / "runs/checkpoints/study/0000-0"
    here = Trial(tiny(), home)
    here.epoch()
    shared.upload(home)
    there = StagedTraining(shared, WORK.start, tiny(), home)
    assert curve(there.history) == curve(here.history)
    there.epoch()
    shared.upload(home)  # the remote is ahead of the store now
    assert len(StagedTraining(shared, WORK.start, tiny(), home).history) == 2


def test_finished_trials_are_lent_to_be_measured_and_what_was_measured_comes_home(shared, tmp_path):
    home = tmp_path / "study/0000-0"
    here = Trial(tiny(), home)
    while not here.done:
        here.epoch()
    here.finish()
    work = staged(WORK, shared)
    with checked_out(shared, home):
        tested = work.evaluate(home)
    assert (home / "test.json").exists() and tested["test/accuracy"] > 0
    with checked_out(shared, home):
        (times,) = work.time([home])
    assert times["time/train_seconds_per_epoch"] > 0
    assert not [path for path in (tmp_path / "remote").rglob("*") if path.is_file()]


@pytest.mark.slow
def test_gc_removes_what_lies_there_too(monkeypatch, tmp_path):
    (tmp_path / "remote").mkdir()
    store = small_study(tmp_path / "runs", arms=("relu",))
    monkeypatch.setenv("ERPE_CHECKPOINTS", str(tmp_path / "remote"))
    study = read_studies(store, "digits-nine.relu")[0]
    folders = [store.trial_folder(study.name, trial.number, trial.config.seed) for trial in study.trials]
    for folder in folders:
        find_remote().upload(folder)
    (swept,) = (each for each in gc(store, Policy(keep_best=1), study="digits-nine/relu").studies if each.going)
    there = {path.name for path in (tmp_path / "remote" / study.name).iterdir()}
    assert there == {folder.name for folder in folders if int(folder.name[:4]) not in swept.going} and there


@pytest.mark.slow
def test_scratch_folders_go_with_their_training_and_those_of_killed_processes_after_a_while(
    shared, tmp_path, monkeypatch
):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    old, young = tmp_path / f"{PREFIX}old", tmp_path / f"{PREFIX}young"
    for folder in (old, young):
        folder.mkdir()
    os.utime(old, (0, time.time() - KEPT_SECONDS - 60))
    trial = StagedTraining(shared, WORK.start, tiny(), tmp_path / "study/0000-0")
    assert trial.scratch.is_dir() and young.is_dir() and not old.exists()
    place = trial.scratch
    del trial
    gc_now()
    assert not place.exists()
