"""`tune`: the same command continues, whatever stopped it; session, checkpoints and histories tell the same story."""

import json
import re
import signal
import subprocess
import sys

import pytest
from toys import Toy, number_of, once, work

from erpe.cli.tables import result_table
from erpe.errors import ConfigError, DataError, StoreError, TrialError
from erpe.execution.callbacks import Progress
from erpe.execution.executors import ResourceRequest, allocate
from erpe.execution.objective import Objective
from erpe.search.tune import tune
from erpe.store import HISTORY, Store
from erpe.study.reading import read_studies
from erpe.study.session import MAX_ATTEMPTS, StudySession
from erpe.study.spec import define
from erpe.tracking.history import Journal

EPOCHS = 4
SPEC = define("relu_general", "digits", epochs=EPOCHS, sampler="random", pruner="none")


@pytest.fixture
def store(tmp_path):
    return Store.open(tmp_path)


def inline(store, trials=3, **options):
    return tune(SPEC, store, trials=trials, executor="inline", **({"work": work()} | options))


def logs(store, name=SPEC.name):
    """What each trial's training did, by number."""
    paths = (store.checkpoints / name).glob("*/log")
    return {number_of(path.parent): path.read_text().splitlines() for path in paths}


def history(store, name, trial):
    """What is kept of a trial's starts and epochs."""
    path = store.trial_folder(name, trial.number, trial.config.seed) / HISTORY
    return [json.loads(line) for line in path.read_text().splitlines()]


def check_books(store, trials, name=SPEC.name, repeated=0):
    """StudySession, checkpoints and histories agree, trial by trial and epoch by epoch.

    Nothing is there twice, and no more than `repeated` epochs were trained twice.
    """
    (study,) = read_studies(store, name)
    assert len({trial.number for trial in study.trials}) == len(study.trials) == trials
    for trial in study.trials:
        assert trial.state == trial.verdict.state
        lines = history(store, name, trial)
        assert [(line["epoch"], line["val/accuracy"]) for line in lines if "epoch" in line] == [*trial.epochs.items()]
        if trial.state == "COMPLETE":
            assert sorted(trial.epochs) == list(range(1, trial.config.train.epochs + 1))
            saved = json.loads((store.trial_folder(name, trial.number, trial.config.seed) / "toy.json").read_text())
            assert {int(epoch["epoch"]): epoch["val/accuracy"] for epoch in saved} == trial.epochs
    trained = [[what for what in log if what.startswith("epoch")] for log in logs(store, name).values()]
    extra = sum(len(epochs) - len(set(epochs)) for epochs in trained)
    assert extra <= repeated, "at most the work since the last checkpoint is repeated per kill"
    return study


def test_a_study_from_its_first_trial_to_its_test(store, without_mlflow):
    result = inline(store)
    study = check_books(store, 3)
    assert result.counts == {"COMPLETE": 3} and not result.interrupted and result.study == SPEC.name
    best = max(study.trials, key=lambda trial: trial.value)
    assert (result.best, result.value, result.config) == (best.number, best.value, best.config)
    assert result.test == {"test/accuracy": 0.5} and result.metrics["params"] == 7.0
    assert sum("test" in log for log in logs(store).values()) == 1
    assert result.folder == store.trial_folder(SPEC.name, best.number, best.config.seed)


def test_a_finished_study_is_not_touched_again(store, without_mlflow):
    first = inline(store)
    before = [history(store, SPEC.name, trial) for trial in read_studies(store, SPEC.name)[0].trials]
    broken = Objective(*[lambda *_: pytest.fail("was called")] * 5)
    again = tune(SPEC, store, trials=3, work=broken)
    assert (again.best, again.test, again.counts) == (first.best, first.test, first.counts)
    assert [history(store, SPEC.name, trial) for trial in read_studies(store, SPEC.name)[0].trials] == before


def test_more_trials_continue_the_study(store, without_mlflow):
    inline(store, trials=2)
    result = inline(store, trials=4)
    assert result.counts == {"COMPLETE": 4} and all(log.count("start") == 1 for log in logs(store).values())
    check_books(store, 4)


def _diverge(folder, epoch):
    if number_of(folder) == 1 and epoch == 2:
        raise TrialError("step 17: the loss is nan")


def test_a_configuration_that_diverges_fails_and_the_search_goes_on(store, without_mlflow):
    result = inline(store, work=work(accident=_diverge))
    assert result.counts == {"COMPLETE": 2, "FAIL": 1} and result.reasons == {1: "step 17: the loss is nan"}
    assert check_books(store, 3).trials[1].epochs.keys() == {1}


def _bug(folder, epoch):
    if number_of(folder) == 0:
        raise ZeroDivisionError("a bug")


def test_an_exception_nobody_foresaw_fails_the_trial_with_its_traceback_after_a_few_tries(store, without_mlflow):
    result = inline(store, work=work(accident=_bug))
    assert result.counts == {"COMPLETE": 2, "FAIL": 1}
    assert "ZeroDivisionError: a bug" in result.reasons[0] and "in epoch" in result.reasons[0]
    assert logs(store)[0].count("epoch 1") == MAX_ATTEMPTS


def _full_disk(folder, epoch):
    if number_of(folder) == 1 and epoch == 3 and once(folder, "full"):
        raise OSError(28, "No space left on device", str(folder / "x"))


def test_a_full_disk_stops_the_search_and_costs_no_trial(store, without_mlflow):
    with pytest.raises(StoreError, match="No space left on device") as error:
        inline(store, work=work(accident=_full_disk))
    assert "\n" not in str(error.value)
    assert read_studies(store)[0].counts == {"COMPLETE": 1, "RUNNING": 1}
    assert inline(store, work=work(accident=_full_disk)).counts == {"COMPLETE": 3}
    check_books(store, 3, repeated=1)


def test_missing_data_is_told_once_before_any_trial(store, without_mlflow):
    def missing():
        raise DataError("no files")

    with pytest.raises(DataError, match="no files"):
        inline(store, work=work()._replace(prepare=missing))
    assert read_studies(store)[0].trials == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.usefixtures("hangup")
def test_one_signal_ends_the_search_after_the_epoch_and_the_same_call_continues(store, without_mlflow, number, capsys):
    def interrupt(folder, epoch):
        if number_of(folder) == 1 and epoch == 2 and once(folder, "signal"):
            signal.raise_signal(number)

    before = signal.getsignal(number)
    result = inline(store, work=work(accident=interrupt))
    assert result.interrupted and result.counts == {"COMPLETE": 1, "RUNNING": 1} and result.test is None
    result_table(result, SPEC, store.root)
    assert "best of 1 trial\n" in capsys.readouterr().out  # the one that is to be continued is none yet
    assert signal.getsignal(number) is before
    assert list(read_studies(store)[0].trials[1].epochs) == [1, 2]
    result = inline(store)
    assert not result.interrupted and result.counts == {"COMPLETE": 3}
    check_books(store, 3)


def test_a_worker_that_dies_once_an_end_was_asked_for_is_no_fault_of_its_trial(store, without_mlflow):
    """SIGTERM is sent to all processes of a service at once."""

    def stopped(folder, epoch):
        signal.raise_signal(signal.SIGTERM)
        raise RuntimeError("it was sent SIGTERM, too")

    for _ in range(MAX_ATTEMPTS):
        assert inline(store, trials=1, work=work(accident=stopped)).interrupted
    assert inline(store, trials=1).counts == {"COMPLETE": 1}


class Lines(Progress):
    """Epochs as they are shown."""

    def __init__(self):
        self.shown = []

    def on_epoch(self, moment):
        self.shown.append((moment.number, moment.epoch, round(moment.value, 4)))


def test_an_epoch_is_shown_once_with_its_own_value_whatever_was_interrupted(store, without_mlflow):
    def interrupt(folder, epoch):
        if epoch == 2 and once(folder, "signal"):
            signal.raise_signal(signal.SIGINT)

    lines = Lines()
    for _ in range(3):
        inline(store, trials=2, work=work(accident=interrupt), progress=lines)
    recorded = [
        (trial.number, epoch, round(value, 4))
        for trial in read_studies(store)[0].trials
        for epoch, value in trial.epochs.items()
    ]
    assert lines.shown == recorded and len(recorded) == 2 * EPOCHS


def test_the_second_signal_stops_now(store, without_mlflow):
    def interrupt(folder, epoch):
        if epoch == 2 and once(folder, "signals"):
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        inline(store, work=work(accident=interrupt))
    assert inline(store).counts == {"COMPLETE": 3}
    check_books(store, 3, repeated=1)


class Killed(BaseException):
    """Stands for SIGKILL: no handler of ours catches it."""


class Doom:
    """Kills at the write that is so many writes away; 0: never."""

    def __init__(self, monkeypatch):
        from optuna.storages import RDBStorage

        self.left, self.patch = 0, monkeypatch
        for write in ("trial_user_attr", "trial_state_values", "study_user_attr", "trial_intermediate_value"):
            self.may_hit(RDBStorage, f"set_{write}")
        self.may_hit(Journal, "_append")

    def may_hit(self, owner, name):
        call = getattr(owner, name)

        def killed(*args, **kwargs):
            self.left -= 1
            if self.left == 0:
                raise Killed
            return call(*args, **kwargs)

        self.patch.setattr(owner, name, killed)


@pytest.mark.slow
def test_killed_before_any_write_the_same_call_continues(store, without_mlflow, monkeypatch):
    """Every write to the database and to a history, one after the other, is the one that never happens."""
    doom = Doom(monkeypatch)
    doom.may_hit(Toy, "finish")
    spec = define("relu_general", "digits", epochs=2, sampler="random", pruner="none")
    for kill in range(1, 100):
        name, doom.left = f"killed-{kill}", kill
        try:
            tune(spec, store, trials=1, executor="inline", work=work(), name=name)
            break
        except Killed:
            doom.left = 0
        result = tune(spec, store, trials=1, executor="inline", work=work(), name=name)
        assert result.counts == {"COMPLETE": 1} and result.test
        check_books(store, 1, name)
    assert kill > 12, "the writes of a trial of two epochs"


def test_a_trial_finished_by_a_killed_driver_is_not_trained_again(store, without_mlflow, monkeypatch):
    def killed(*_):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(StudySession, "decide", killed)
        with pytest.raises(Killed):
            inline(store)
    inline(store)
    check_books(store, 3)
    assert logs(store)[0].count("start") == 1


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"trials": 0}, "trials: 0 given"),
        ({"concurrency": 0}, "concurrency: 0 given"),
        ({"cpus_per_trial": 0}, "cpus per trial: 0 given"),
        ({"gpus_per_trial": -1}, "gpus per trial: -1 given"),
        ({"gpus_per_trial": 1.5}, "a whole number or a part of 1"),
        ({"gpus_per_trial": float("nan")}, "gpus per trial: nan"),
        ({"ray_address": "127.0.0.1:1"}, "ray address 127.0.0.1:1: no response"),
        ({"ray_address": "ray://head:10001"}, "use HOST:PORT of the cluster's head"),
        ({"ray_address": "head"}, "HOST:PORT"),
    ],
)
def test_numbers_that_make_no_sense_are_refused_before_anything_starts(store, asked, said):
    with pytest.raises(ConfigError, match=said):
        inline(store, **asked)
    assert not (store.root / "optuna.db").exists()


def test_a_gpu_that_is_not_there_is_refused_at_once(store):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(ConfigError, match="torch sees no GPU"):
        tune(SPEC, store, trials=1, gpus_per_trial=0.5, work=work())


HEADLESS = """
import signal, socket, threading, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job begins with it ignored
from erpe.errors import StudyError
from erpe.execution.ray_tune.cluster import watch_head
head = socket.create_server(("127.0.0.1", 0))
address = f"127.0.0.1:{head.getsockname()[1]}"
with watch_head(address, 0.2):
    time.sleep(0.5)
    print("heard", flush=True)
try:
    with watch_head(None, 0.2), watch_head(address, 0.2):
        head.close()
        time.sleep(50)
except StudyError as error:
    print(error)
draining = threading.Event()
draining.set()
try:
    with watch_head(address, 0.2, draining):
        time.sleep(50)
except KeyboardInterrupt:
    print("as asked")
time.sleep(1)
print("goes on")
"""


def test_a_program_whose_head_is_gone_gets_an_error_that_says_so_and_goes_on():
    done = subprocess.run([sys.executable, "-c", HEADLESS], capture_output=True, text=True, timeout=40)
    assert (done.returncode, done.stderr) == (0, "")
    said = r"heard\nray address 127.0.0.1:\d+: the cluster's head is gone, .*continues\nas asked\ngoes on\n"
    assert re.fullmatch(said, done.stdout)


@pytest.mark.parametrize(
    ("asked", "cpus", "gpus", "expected"),
    [
        (ResourceRequest(), 2, 0, (2, 1, 0)),
        (ResourceRequest(), 8, 0, (6, 1, 0)),
        (ResourceRequest(), 16, 4, (4, 1, 1)),
        (ResourceRequest(concurrency=6), 16, 4, (6, 1, 0.5)),
        (ResourceRequest(concurrency=3), 16, 1, (3, 1, 1 / 3)),
        (ResourceRequest(gpus_per_trial=0), 4, 4, (4, 1, 0)),
        (ResourceRequest(gpus_per_trial=0.25), 16, 1, (6, 1, 0.25)),
        (ResourceRequest(cpus_per_trial=2), 8, 0, (4, 2, 0)),
    ],
)
def test_the_machine_is_shared_out(asked, cpus, gpus, expected):
    assert allocate(asked, 6, cpus, gpus) == pytest.approx(expected)


def test_a_cluster_may_grow_unless_the_user_says_how_many():
    """Ray places as many trials as it has room for."""
    assert allocate(ResourceRequest(ray_address="head:6379"), 6, 1, 0).concurrency is None
    assert allocate(ResourceRequest(concurrency=2, ray_address="head:6379"), 6, 8, 0).concurrency == 2


@pytest.mark.parametrize("asked", [ResourceRequest(gpus_per_trial=2), ResourceRequest(cpus_per_trial=9)])
def test_a_trial_that_would_wait_for_ever_is_refused(asked):
    with pytest.raises(ConfigError, match="and Ray sees"):
        allocate(asked, 6, 8, 1)
