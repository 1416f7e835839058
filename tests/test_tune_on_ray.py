"""`tune` on Ray: workers die, machines break, drivers are interrupted and killed; the same command continues."""

import gc
import json
import logging
import os
import signal
import subprocess
import sys
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits
from test_tune import EPOCHS, SPEC, _full_disk, check_books, inline, logs
from toys import number_of, once, toy, work

import erpe
from erpe import plugins, variants
from erpe.errors import StoreError, StudyError, TrialError
from erpe.search.tune import tune
from erpe.store import Store
from erpe.study.distributions import Floats, Space
from erpe.study.reading import read_studies
from erpe.study.session import MAX_ATTEMPTS
from erpe.study.spec import define
from erpe.surroundings import short_folder


@pytest.fixture
def store(tmp_path):
    return Store.open(tmp_path)


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
def test_on_ray_a_dead_worker_is_replaced_and_a_poisonous_trial_ends(store, without_mlflow, ray, capfd):
    result = tune(SPEC, store, trials=5, concurrency=2, work=work(accident=_accidents))
    assert result.counts == {"COMPLETE": 3, "FAIL": 2}
    assert result.reasons[0] == "step 17: the loss is nan"
    assert (
        f"Segmentation fault (crashed {MAX_ATTEMPTS} times" in result.reasons[2] and "_accidents" in result.reasons[2]
    )
    assert capfd.readouterr() == ("", "")
    assert logs(store)[2].count("epoch 1") == MAX_ATTEMPTS
    check_books(store, 5, repeated=MAX_ATTEMPTS + 1)


def test_a_worker_that_tune_ends_before_its_first_step_leaves_another_one_its_last_words(tmp_path):
    from erpe.execution.ray_tune.trainable import LAST_WORDS, Worker

    pack = {"start": toy, "pack": {"0": {"config": SPEC.base.model_dump(), "folder": str(tmp_path)}}}
    trains, waits = Worker.__new__(Worker), Worker.__new__(Worker)
    try:
        for worker in (trains, waits):
            worker.setup(pack)
        trains.step()
        waits.cleanup()
        assert (tmp_path / LAST_WORDS).exists()
        trains.cleanup()
        assert not (tmp_path / LAST_WORDS).exists()
    finally:
        gc.unfreeze()


def _priority():
    return os.nice(0)


@pytest.mark.slow
def test_on_ray_trials_run_at_the_priority_of_the_command(ray):
    assert ray.get(ray.remote(_priority).remote()) == _priority()


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


@pytest.mark.slow
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
def test_on_ray_a_worker_that_dies_between_two_trials_loses_none(store, without_mlflow, ray):
    doomed = work()._replace(start=Deadly(store.root))
    result = tune(SPEC, store, trials=2, concurrency=1, work=doomed)
    assert result.counts == {"COMPLETE": 2} and not result.interrupted and (store.root / "once-handed").exists()
    check_books(store, 2, repeated=0)


def _unimportable(config, folder):
    raise ImportError("No module named 'torch'")


def test_a_worker_that_cannot_import_what_trials_need_stops_the_search_and_fails_no_trial(store, without_mlflow):
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
def test_on_ray_a_worker_that_cannot_begin_stops_the_search_and_fails_no_trial(store, without_mlflow, ray):
    with pytest.raises(StudyError, match=r"a worker cannot begin \(.*No module named 'erpe'.*same command"):
        tune(SPEC, store, trials=2, concurrency=1, work=work()._replace(start=_OnlyHere()))
    assert inline(store, trials=2).counts == {"COMPLETE": 2}
    check_books(store, 2)


@pytest.mark.slow
def test_on_ray_a_broken_machine_stops_the_search(store, without_mlflow, ray):
    with pytest.raises(StoreError, match="No space left on device"):
        tune(SPEC, store, trials=4, concurrency=2, work=work(accident=_full_disk))
    assert tune(SPEC, store, trials=4, concurrency=2, work=work(accident=_full_disk)).counts == {"COMPLETE": 4}
    check_books(store, 4, repeated=2)


@pytest.mark.slow
def test_on_ray_real_training_agrees_in_session_and_checkpoint(store, without_mlflow, ray, tmp_path, monkeypatch):
    """Of own images, with an encoding of a plug-in, for two objectives, asked for by another thread."""
    monkeypatch.setattr(variants, "REGISTERED", {})
    monkeypatch.setattr(plugins, "_LOADED", {})
    images, labels = load_digits(return_X_y=True)
    np.savez(tmp_path / "own.npz", images=(images * 15).astype(np.uint8).reshape(-1, 8, 8), labels=labels)
    ask = partial(
        erpe.tune, "favor_alibi", tmp_path / "own.npz", trials=3, epochs=3, store=store.root, progress=False,
        settings={"model.width": 32, "model.depth": 1, "model.patch": 4}, objective="accuracy,flops",
        plugins=[str(Path(__file__).parents[1] / "studies/plugins/alibi.py")],
    )  # fmt: skip
    with ThreadPoolExecutor(1) as pool:
        result = pool.submit(ask).result().result
    assert sum(result.counts.values()) == 3 and result.front
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
def test_on_ray_packs_lose_nothing_when_a_trial_fails_and_a_worker_dies(store, without_mlflow, ray):
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
from erpe.surroundings import short_folder
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


STOPPING = """
import os, signal, sys, threading, traceback
from erpe.execution.ray_tune.cluster import start, stop

presses, over = [], threading.Event()

def press():
    while not over.wait(0.02):
        os.kill(os.getpid(), signal.SIGINT)

start(None, 1, sys.argv[1])
signal.signal(signal.SIGINT, lambda number, frame: presses.append(str(traceback.extract_stack(frame))))
thread = threading.Thread(target=press)
thread.start()
stop()
over.set()
thread.join()
print(len(presses) > 2, any("in shutdown" in press for press in presses))
"""


@pytest.mark.slow
def test_nothing_cuts_ray_off_in_its_own_end():
    """It would end the process with code 1, and without a word."""
    with short_folder() as folder:
        done = subprocess.run(
            [sys.executable, "-c", STOPPING, folder], capture_output=True, text=True, env=os.environ | PATHS
        )
    assert (done.returncode, done.stdout, done.stderr) == (0, "True False\n", "")


@pytest.mark.slow
def test_on_ray_a_driver_that_was_interrupted_or_killed_is_continued_by_the_same_command(store, without_mlflow):
    """Ctrl-C once finishes the epoch, twice stops now."""
    driver = Driver(store, 0.5)
    driver.until("epoch 0 1")
    with pytest.raises(StudyError, match="another erpe is running it"):
        inline(store)
    driver.process.kill()
    driver.end()
    driver = Driver(store, 0.5)
    driver.until("search")
    driver.until("epoch 0 3")
    for _ in range(2):
        os.killpg(driver.process.pid, signal.SIGINT)  # as a terminal does: to Ray's processes, too
        time.sleep(0.3)
    code, _, err = driver.end()
    # Python ends by the signal, but with 1 if anything that runs at its exit evaluates a text.
    assert code in (-signal.SIGINT, 1) and err.strip().endswith("KeyboardInterrupt"), err
    driver = Driver(store, 1.0)
    driver.until("epoch 2 1")
    os.killpg(driver.process.pid, signal.SIGINT)
    code, out, err = driver.end()
    assert (code, err) == (0, "")
    interrupted, counts = json.loads(out.splitlines()[-1])
    assert interrupted and counts["RUNNING"] and 1 in read_studies(store)[0].trials[2].epochs
    result = inline(store, trials=5)
    assert result.counts == {"COMPLETE": 5} and not result.interrupted
    check_books(store, 5, repeated=2 * 2)  # two trials at a time, stopped twice in an epoch
