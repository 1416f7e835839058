"""`tune`: the same command continues, whatever stopped it; session, checkpoints and outbox tell the same story."""

import gc
import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
import weakref
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
from toys import Toy, number_of, once, toy, work

from erpe.errors import ConfigError, DataError, StoreError, StudyError, TrialError
from erpe.execution.callbacks import Progress
from erpe.execution.executors import ResourceRequest, allocate
from erpe.execution.objective import Objective
from erpe.search.tune import tune
from erpe.store import Store
from erpe.study.distributions import Floats, Space
from erpe.study.records import read_studies
from erpe.study.session import MAX_ATTEMPTS, StudySession
from erpe.study.spec import define
from erpe.tracking.outbox import Outbox
from erpe.tracking.tracker import Tracker

EPOCHS = 4
SPEC = define("relu_general", "digits", epochs=EPOCHS, sampler="random", pruner="none")


@pytest.fixture
def store(tmp_path):
    return Store.open(tmp_path)


@pytest.fixture
def outbox_only(monkeypatch):
    """Everything is recorded, nothing is sent to MLflow."""
    monkeypatch.setattr("erpe.tracking.tracker.Tracker", partial(Tracker, send=False))


def inline(store, trials=3, **options):
    return tune(SPEC, store, trials=trials, executor="inline", **({"work": work()} | options))


def logs(store, name=SPEC.name):
    """What each trial's training did, by number."""
    paths = (store.checkpoints / name).glob("*/log")
    return {number_of(path.parent): path.read_text().splitlines() for path in paths}


def check_books(store, trials, name=SPEC.name, repeated=0):
    """StudySession, checkpoints and outbox agree, trial by trial and epoch by epoch.

    Nothing is there twice, and no more than `repeated` epochs were trained twice.
    """
    (study,) = read_studies(store, name)
    assert len({trial.number for trial in study.trials}) == len(study.trials) == trials
    events = [event for event, _ in Outbox(store.outbox, name).read(0)]
    epochs = Counter((event.uid, event.step) for event in events if event.kind == "epoch")
    assert set(epochs.values()) <= {1}, "an epoch is in the outbox once"
    for trial in study.trials:
        assert trial.state == trial.verdict.state
        mine = [event for event in events if event.uid == trial.uid]
        logged = {event.step: event.metrics["val/accuracy"] for event in mine if event.kind == "epoch"}
        assert logged == trial.epochs
        told = [event for event in mine if event.kind != "epoch"]
        assert told[-1].kind == "end_trial" and told[-1].state == trial.state
        assert {event.state for event in told if event.kind == "end_trial"} == {trial.state}, "told one ending only"
        if trial.state == "COMPLETE":
            assert sorted(trial.epochs) == list(range(1, trial.config.train.epochs + 1))
            saved = json.loads((store.trial_folder(name, trial.number, trial.config.seed) / "toy.json").read_text())
            assert {int(epoch["epoch"]): epoch["val/accuracy"] for epoch in saved} == trial.epochs
    trained = [[what for what in log if what.startswith("epoch")] for log in logs(store, name).values()]
    extra = sum(len(epochs) - len(set(epochs)) for epochs in trained)
    assert extra <= repeated, "at most the work since the last checkpoint is repeated per kill"
    return study


def test_a_study_from_its_first_trial_to_its_test(store, outbox_only):
    result = inline(store)
    study = check_books(store, 3)
    assert result.counts == {"COMPLETE": 3} and not result.interrupted and result.study == SPEC.name
    best = max(study.trials, key=lambda trial: trial.value)
    assert (result.best, result.value, result.config) == (best.number, best.value, best.config)
    assert result.test == {"test/accuracy": 0.5} and result.metrics["params"] == 7.0
    assert sum("test" in log for log in logs(store).values()) == 1
    assert result.folder == store.trial_folder(SPEC.name, best.number, best.config.seed)


def test_a_finished_study_is_not_touched_again(store, outbox_only):
    first = inline(store)
    events = Outbox(store.outbox, SPEC.name).read(0)
    broken = Objective(*[lambda *_: pytest.fail("was called")] * 5)
    again = tune(SPEC, store, trials=3, work=broken)
    assert (again.best, again.test, again.counts) == (first.best, first.test, first.counts)
    assert [event for event, _ in Outbox(store.outbox, SPEC.name).read(0)] == [event for event, _ in events]


def test_more_trials_continue_the_study(store, outbox_only):
    inline(store, trials=2)
    result = inline(store, trials=4)
    assert result.counts == {"COMPLETE": 4} and all(log.count("start") == 1 for log in logs(store).values())
    check_books(store, 4)


def _diverge(folder, epoch):
    if number_of(folder) == 1 and epoch == 2:
        raise TrialError("step 17: the loss is nan")


def test_a_configuration_that_diverges_fails_and_the_search_goes_on(store, outbox_only):
    result = inline(store, work=work(accident=_diverge))
    assert result.counts == {"COMPLETE": 2, "FAIL": 1} and result.reasons == {1: "step 17: the loss is nan"}
    assert check_books(store, 3).trials[1].epochs.keys() == {1}


def _bug(folder, epoch):
    if number_of(folder) == 0:
        raise ZeroDivisionError("a bug")


def test_an_exception_nobody_foresaw_fails_the_trial_with_its_traceback_after_a_few_tries(store, outbox_only):
    result = inline(store, work=work(accident=_bug))
    assert result.counts == {"COMPLETE": 2, "FAIL": 1}
    assert "ZeroDivisionError: a bug" in result.reasons[0] and "in epoch" in result.reasons[0]
    assert logs(store)[0].count("epoch 1") == MAX_ATTEMPTS


def _full_disk(folder, epoch):
    if number_of(folder) == 1 and epoch == 3 and once(folder, "full"):
        raise OSError(28, "No space left on device", str(folder / "x"))


def test_a_full_disk_stops_the_search_and_costs_no_trial(store, outbox_only):
    with pytest.raises(StoreError, match="No space left on device") as error:
        inline(store, work=work(accident=_full_disk))
    assert "\n" not in str(error.value)
    assert read_studies(store)[0].counts == {"COMPLETE": 1, "RUNNING": 1}
    assert inline(store, work=work(accident=_full_disk)).counts == {"COMPLETE": 3}
    check_books(store, 3, repeated=1)


def test_missing_data_is_told_once_before_any_trial(store, outbox_only):
    def missing():
        raise DataError("no files")

    with pytest.raises(DataError, match="no files"):
        inline(store, work=work()._replace(prepare=missing))
    assert read_studies(store)[0].trials == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_one_signal_ends_the_search_after_the_epoch_and_the_same_call_continues(store, outbox_only, number):
    def interrupt(folder, epoch):
        if number_of(folder) == 1 and epoch == 2 and once(folder, "signal"):
            signal.raise_signal(number)

    before = signal.getsignal(number)
    result = inline(store, work=work(accident=interrupt))
    assert result.interrupted and result.counts == {"COMPLETE": 1, "RUNNING": 1} and result.test is None
    assert signal.getsignal(number) is before
    assert list(read_studies(store)[0].trials[1].epochs) == [1, 2]
    result = inline(store)
    assert not result.interrupted and result.counts == {"COMPLETE": 3}
    check_books(store, 3)


class Lines(Progress):
    """Epochs as they are shown."""

    def __init__(self):
        self.shown = []

    def on_epoch(self, moment):
        self.shown.append((moment.number, moment.epoch, round(moment.value, 4)))


def test_an_epoch_is_shown_once_with_its_own_value_whatever_was_interrupted(store, outbox_only):
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


def test_the_second_signal_stops_now(store, outbox_only):
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
        self.may_hit(Outbox, "write")

    def may_hit(self, owner, name):
        call = getattr(owner, name)

        def killed(*args, **kwargs):
            self.left -= 1
            if self.left == 0:
                raise Killed
            return call(*args, **kwargs)

        self.patch.setattr(owner, name, killed)


def test_killed_before_any_write_the_same_call_continues(store, outbox_only, monkeypatch):
    """Every write to the database and to the outbox, one after the other, is the one that never happens."""
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
    assert kill > 15, "the writes of a trial of two epochs"


def test_a_trial_finished_by_a_killed_driver_is_not_trained_again(store, outbox_only, monkeypatch):
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
import signal, socket, time
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
time.sleep(1)
print("goes on")
"""


def test_a_program_whose_head_is_gone_gets_an_error_that_says_so_and_goes_on():
    done = subprocess.run([sys.executable, "-c", HEADLESS], capture_output=True, text=True, timeout=40)
    assert (done.returncode, done.stderr) == (0, "")
    said = r"heard\nray address 127.0.0.1:\d+: the cluster's head is gone, .*continues\ngoes on\n"
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


PATHS = {"PYTHONPATH": os.pathsep.join(map(str, Path(__file__).parents[:2]))}
"""Where workers find the toy, and erpe if it is not installed."""


@pytest.fixture(scope="module")
def ray():
    """One Ray for all tests in this process; `tune` joins what is running."""
    import erpe.execution.ray_tune.trainable  # noqa: F401  Ray's environment

    import ray  # isort: skip

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", PATHS["PYTHONPATH"])
        small = {"num_cpus": 2, "include_dashboard": False, "object_store_memory": 10**8}
        ray.init(address="local", logging_level=logging.ERROR, log_to_driver=False, **small)
        yield ray
        ray.shutdown()


def _accidents(folder, epoch):
    number = number_of(folder)
    if number == 0 and epoch == 2:
        raise TrialError("step 17: the loss is nan")
    if number == 1 and epoch == 3 and once(folder, "death"):
        os.kill(os.getpid(), signal.SIGKILL)
    if number == 2:
        os.kill(os.getpid(), signal.SIGSEGV)
    if number == 3 and epoch == 2 and once(folder, "exception"):
        raise RuntimeError("CUDA out of memory")


@pytest.mark.slow
def test_on_ray_a_dead_worker_is_replaced_and_a_poisonous_trial_ends(store, outbox_only, ray, capfd):
    result = tune(SPEC, store, trials=5, concurrency=2, work=work(accident=_accidents))
    assert result.counts == {"COMPLETE": 3, "FAIL": 2}
    assert result.reasons[0] == "step 17: the loss is nan"
    assert (
        f"Segmentation fault (crashed {MAX_ATTEMPTS} times" in result.reasons[2] and "_accidents" in result.reasons[2]
    )
    assert capfd.readouterr() == ("", "")
    assert logs(store)[2].count("epoch 1") == MAX_ATTEMPTS
    check_books(store, 5, repeated=MAX_ATTEMPTS + 1)


class Deadly:
    """Makes trials; a worker that has trained one and is handed the next dies of it, once."""

    def __init__(self, folder):
        self.folder = folder

    def __call__(self, config, folder):
        os.environ["ERPE_TEST_TRAINED"] = "here"
        return toy(config, folder)

    def __setstate__(self, state):
        self.__dict__ = state
        if "ERPE_TEST_TRAINED" in os.environ and once(self.folder, "handed"):
            os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_lets_go_of_each_trial_and_never_looks_at_what_was_imported_again():
    from erpe.execution.ray_tune.trainable import Worker

    worker = Worker.__new__(Worker)
    try:
        for _ in range(3):
            worker._together = partial(print)
            worker._together.itself = worker._together  # a cycle, as tensors and modules make them
            trial = weakref.ref(worker._together)
            worker.cleanup()
            assert trial() is None
            assert gc.get_freeze_count() > 50_000
    finally:
        gc.unfreeze()


@pytest.mark.slow
def test_on_ray_a_worker_that_dies_between_two_trials_loses_none(store, outbox_only, ray):
    doomed = work()._replace(start=Deadly(store.root))
    result = tune(SPEC, store, trials=2, concurrency=1, work=doomed)
    assert result.counts == {"COMPLETE": 2} and not result.interrupted and (store.root / "once-handed").exists()
    check_books(store, 2, repeated=0)


def _unimportable(config, folder):
    raise ImportError("No module named 'torch'")


def test_a_worker_that_cannot_import_what_trials_need_stops_the_search_and_fails_no_trial(store, outbox_only):
    with pytest.raises(StudyError, match="cannot import what trials need"):
        inline(store, work=work()._replace(start=_unimportable))
    assert inline(store).counts == {"COMPLETE": 3}


class _OnlyHere:
    """What no other process can unpickle, as a function of a module that is not there."""

    def __call__(self, config, folder):
        raise AssertionError("never called")

    def __reduce__(self):
        return _only_in, (os.getpid(),)


def _only_in(process):
    if os.getpid() != process:
        raise ModuleNotFoundError("No module named 'erpe'")
    return _OnlyHere()


@pytest.mark.slow
def test_on_ray_a_worker_that_cannot_begin_stops_the_search_and_fails_no_trial(store, outbox_only, ray):
    with pytest.raises(StudyError, match=r"a worker cannot begin \(.*No module named 'erpe'.*same command"):
        tune(SPEC, store, trials=2, concurrency=1, work=work()._replace(start=_OnlyHere()))
    assert inline(store, trials=2).counts == {"COMPLETE": 2}
    check_books(store, 2)


@pytest.mark.slow
def test_on_ray_a_broken_machine_stops_the_search(store, outbox_only, ray):
    with pytest.raises(StoreError, match="No space left on device"):
        tune(SPEC, store, trials=4, concurrency=2, work=work(accident=_full_disk))
    assert tune(SPEC, store, trials=4, concurrency=2, work=work(accident=_full_disk)).counts == {"COMPLETE": 4}
    check_books(store, 4, repeated=2)


@pytest.mark.slow
def test_on_ray_real_training_agrees_in_session_and_checkpoint(store, outbox_only, ray):
    spec = define("favor_rope", "digits", epochs=3, settings={"model.width": 32, "model.depth": 1, "model.patch": 4})
    result = tune(spec, store, trials=3)
    assert sum(result.counts.values()) == 3
    assert 0.5 < result.test["test/accuracy"] <= 1
    (study,) = read_studies(store)
    for trial in study.trials:
        folder = store.trial_folder(study.name, trial.number, trial.config.seed)
        if trial.state == "COMPLETE":
            outcome = json.loads((folder / "outcome.json").read_text())
            assert outcome["metrics"] == trial.verdict.metrics
            assert {int(e["epoch"]): e["val/accuracy"] for e in outcome["history"]} == trial.epochs
            assert (folder / "model.safetensors").exists()
        else:
            assert trial.state == "PRUNED" and len(trial.epochs) < 3


def _deaths(folder, epoch):
    if number_of(folder) == 1 and epoch == 3 and once(folder, "death"):
        os.kill(os.getpid(), signal.SIGKILL)
    if number_of(folder) == 3 and epoch == 2:
        raise TrialError("step 17: the loss is nan")


@pytest.mark.slow
def test_on_ray_packs_lose_nothing_when_a_trial_fails_and_a_worker_dies(store, outbox_only, ray):
    axes = {"train.lr": Floats(low=1e-4, high=1e-2)}
    spec = define("relu", "digits", space=Space(axes=axes), epochs=EPOCHS, sampler="random", pruner="none")
    result = tune(spec, store, trials=7, name=SPEC.name, concurrency=2, pack=3, work=work(accident=_deaths))
    assert result.counts == {"COMPLETE": 6, "FAIL": 1} and result.reasons == {3: "step 17: the loss is nan"}
    check_books(store, 7, repeated=3)
    found = logs(store)
    assert "beside 2" in found[0] and "beside 2" in found[4]
    trained = [word for word in found[1] if word != "test"]  # the best is tested, too
    assert trained[-3:] == ["epoch 3", "epoch 4", "finish"], "after a crash each goes on alone"


DRIVER = """
import json, sys
from pathlib import Path
from toys import work
from erpe.search.tune import tune
from erpe.execution.objective import Objective
from erpe.store import Store
from erpe.tracking import tracker
from erpe.study.spec import define
from functools import partial
tracker.Tracker = partial(tracker.Tracker, send=False)

class Watch:
    def on_phase(self, phase): print(phase, flush=True)
    def on_start(self, moment): pass
    def on_epoch(self, moment): print("epoch", moment.number, moment.epoch, flush=True)
    def on_end(self, moment): print("end", moment.number, flush=True)

spec = define("relu_general", "digits", epochs=4, sampler="random", pruner="none")  # SPEC
result = tune(spec, Store.open(sys.argv[1]), trials=5, concurrency=2, progress=Watch(),
              work=work(sleep=float(sys.argv[2])))
print(json.dumps([result.interrupted, result.counts]), flush=True)
"""


class Driver:
    """A driver in a process group of its own, as a shell would start it."""

    def __init__(self, store, sleep):
        self.process = subprocess.Popen(
            [sys.executable, "-c", DRIVER, store.root, str(sleep)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
            env=os.environ | PATHS,
        )  # fmt: skip

    def until(self, line):
        for said in self.process.stdout:
            if said.strip() == line:
                return
        pytest.fail(f"never said {line!r}: {self.process.stderr.read()}")

    def end(self):
        out, err = self.process.communicate(timeout=120)
        return self.process.returncode, out, err


@pytest.mark.slow
def test_on_ray_a_driver_that_was_interrupted_or_killed_is_continued_by_the_same_command(store):
    """Ctrl-C once finishes the epoch, twice stops now."""
    driver = Driver(store, 1.0)
    driver.until("epoch 0 1")
    os.killpg(driver.process.pid, signal.SIGINT)  # as a terminal does: to Ray's processes, too
    code, out, err = driver.end()
    assert (code, err) == (0, "")
    assert json.loads(out.splitlines()[-1]) == [True, {"RUNNING": 2}]
    assert 1 in read_studies(store)[0].trials[0].epochs
    driver = Driver(store, 0.5)
    driver.until("search")
    driver.until("epoch 0 3")
    for _ in range(2):
        os.killpg(driver.process.pid, signal.SIGINT)
        time.sleep(0.3)
    code, _, err = driver.end()
    # Python ends by the signal, but with 1 if anything that runs at its exit evaluates a text.
    assert code in (-signal.SIGINT, 1) and err.strip().endswith("KeyboardInterrupt"), err
    driver = Driver(store, 0.5)
    driver.until("epoch 4 1")
    with pytest.raises(StudyError, match="another erpe is running it"):
        inline(store)
    driver.process.kill()
    driver.end()
    code, out, err = Driver(store, 0).end()
    assert (code, err) == (0, "")
    assert json.loads(out.splitlines()[-1]) == [False, {"COMPLETE": 5}]
    check_books(store, 5, repeated=2 * 2)  # two trials at a time, stopped twice in an epoch
